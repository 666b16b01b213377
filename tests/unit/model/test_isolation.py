"""Attention within documents, compared with a dense mask, which exists only here."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_chameleon.config.schema import Config
from megatron_chameleon.model.backend import ScaledDotProductAttention
from megatron_chameleon.model.chameleon import transformer_config
from megatron_chameleon.model.isolation import IsolatedDocuments

Lengths = list[list[int]]


def documents_of(lengths: Lengths) -> IsolatedDocuments:
    flat = list(itertools.chain(*lengths))
    positions = torch.cat([torch.arange(length) for length in flat]).view(len(lengths), -1)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(flat)], dtype=torch.int32)
    return IsolatedDocuments.grouped(cu_seqlens, positions)


def hidden_of(lengths: Lengths) -> Tensor:
    """[B, 1, S, S], True where a token (row) must not see another (column)."""
    numbers = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    other = numbers[:, :, None] != numbers[:, None, :]
    return (other | torch.ones_like(other).triu(1)).unsqueeze(1)


def dense(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """Attention with a mask, written out in float64; S B N D like its inputs."""
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) / q.size(-1) ** 0.5
    out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return out.permute(2, 0, 1, 3).flatten(2)


@pytest.fixture
def attention() -> Callable[..., Tensor]:
    config = transformer_config(Config())
    return ScaledDotProductAttention(config)


def draw(length: int, batch: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values, and a gradient; the first three are parts of one tensor."""
    generator = torch.Generator().manual_seed(length)
    mixed = torch.randn(length, batch, heads + 2 * groups, 8, generator=generator).to(dtype)
    grad = torch.randn(length, batch, heads * 8, generator=generator).to(dtype)
    return [*mixed.requires_grad_().split([heads, groups, groups], dim=2), grad]


@pytest.mark.parametrize(
    "lengths",
    [
        [[12]],
        [[1] * 12],
        [[5, 7], [12]],
        [[3, 3, 3, 3], [4, 4, 4], [1, 11]],
        [[1, 2, 3, 4, 2], [2, 4, 3, 2, 1]],
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_result_and_gradients(
    attention: Callable[..., Tensor], lengths: Lengths, groups: int, dtype: torch.dtype
) -> None:
    # fp32 is precise to 6e-8, bf16 to 4e-3; each value is the sum of about ten products
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float64: 1e-14}[dtype]
    *inputs, grad = draw(12, len(lengths), 4, groups, dtype)
    found = attention(*inputs, None, packed_seq_params=documents_of(lengths))
    expected = dense(*inputs, hidden_of(lengths))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    ours = torch.autograd.grad(found, inputs, grad, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, grad.double())
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact.to(mine.dtype), rtol=tolerance, atol=tolerance)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With several, torch's attention adds up in an order that depends on the size of the batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_document_is_computed_as_if_it_were_alone(attention: Callable[..., Tensor]) -> None:
    """To the bit, whatever else is in the micro-batch and wherever it stands."""
    *inputs, _ = draw(40, 2, 4, 2, torch.float32)
    lengths = [[7, 13, 7, 13], [13, 7, 20]]
    found = attention(*inputs, None, packed_seq_params=documents_of(lengths))
    for row, parts in enumerate(lengths):
        for end, length in zip(itertools.accumulate(parts), parts, strict=True):
            own = [x[end - length : end, row : row + 1] for x in inputs]
            assert torch.equal(attention(*own, None), found[end - length : end, row : row + 1])


@pytest.mark.usefixtures("one_thread")
def test_whole_sequences_are_plain_causal(attention: Callable[..., Tensor]) -> None:
    *inputs, _ = draw(16, 3, 4, 4, torch.float32)
    isolated = attention(*inputs, None, packed_seq_params=documents_of([[16]] * 3))
    assert torch.equal(isolated, attention(*inputs, None))


def test_documents_of_a_length_share_a_call() -> None:
    calls = []

    def count(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((q.size(0), q.size(2)))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    *inputs, _ = draw(40, 2, 4, 4, torch.float32)
    groups = documents_of([[7, 13, 7, 13], [13, 7, 20]]).groups
    assert groups is not None
    groups.attend(count, *inputs)
    assert calls == [(3, 7), (3, 13), (1, 20)]


def test_dropout_is_kept(attention: Callable[..., Tensor]) -> None:
    *inputs, _ = draw(12, 2, 4, 4, torch.float32)
    documents = documents_of([[5, 7], [12]])
    attention.dropout = 0.5  # type: ignore[attr-defined]
    first, second = (attention(*inputs, None, packed_seq_params=documents) for _ in range(2))
    assert not torch.equal(first, second)
    attention.eval()  # type: ignore[attr-defined]
    first, second = (attention(*inputs, None, packed_seq_params=documents) for _ in range(2))
    assert torch.equal(first, second)


def test_a_mask_is_refused(attention: Callable[..., Tensor]) -> None:
    *inputs, _ = draw(12, 1, 4, 4, torch.float32)
    with pytest.raises(AssertionError, match="documents are isolated by their lengths"):
        attention(*inputs, hidden_of([[12]]))
