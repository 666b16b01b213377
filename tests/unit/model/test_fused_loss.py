"""The Triton loss compared with float64 autograd and with the torch loss.

Without a GPU its kernels run in Triton's interpreter (see ``tests/conftest.py``), which is slow, so
the shapes are small.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatron_chameleon.model.loss import (
    fused_vocab_parallel_cross_entropy,
    select_loss_parts,
    vocab_parallel_cross_entropy,
)
from megatron_chameleon.parallel import platform

pytest.importorskip("triton")
Z_LOSS = 0.1

# fp32: 6e-8 times about 50 additions and the exponential of numbers up to 20. bf16: the gradient is
# rounded at the end, towards 0 in the interpreter, and so by up to 2^-7 of each entry.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    meeting: Path = tmp_path_factory.mktemp("gloo") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def draw(vocab: int, dtype: torch.dtype, scale: float = 5.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [3, 2, vocabulary], labels at both ends and between, and weights with a zero."""
    generator = torch.Generator().manual_seed(vocab)
    logits = scale * torch.randn(3, 2, vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (3, 2), generator=generator)
    labels[0, 0], labels[2, 1], labels[1, 0] = 0, vocab - 1, vocab // 2
    weights = torch.rand(3, 2, generator=generator)
    weights[1, 1] = 0.0  # an ignored position
    device = platform.device()
    return logits.to(device, dtype), labels.to(device), weights.to(device)


def exact(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64 by torch's own functions."""
    logits = logits.double().clone().requires_grad_()
    log_p = functional.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    loss = ((Z_LOSS * logits.logsumexp(-1).square() - log_p) * weights).sum()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def fused(
    logits: Tensor, labels: Tensor, weights: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    parts = fused_vocab_parallel_cross_entropy(leaf * 1.0, labels, group)
    loss = ((parts[0] + Z_LOSS * parts[1].square()) * weights).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.dtype == logits.dtype
    assert parts[0].dtype == torch.float32
    return loss.detach(), grad


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype], error


# powers of two, odd sizes, and less than one load
@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [
        (64, torch.bfloat16),
        (51, torch.bfloat16),
        (57, torch.float32),
        (32, torch.float32),
        (2, torch.bfloat16),
    ],
)
def test_loss_and_gradient(group: dist.ProcessGroup, vocab: int, dtype: torch.dtype) -> None:
    drawn = draw(vocab, dtype)
    expected_loss, expected_grad = exact(*drawn)
    loss, grad = fused(*drawn, group)
    assert_close(loss, expected_loss, torch.float32)
    assert_close(grad, expected_grad, dtype)
    assert not grad[1, 1].any()


def test_a_row_of_several_blocks(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at real sizes, where a row takes many loads and the running maximum changes."""
    from megatron_chameleon.model.kernels import cross_entropy as kernels

    monkeypatch.setattr(kernels, "STATISTICS_LANES", 2)
    monkeypatch.setattr(kernels, "GRADIENT_BYTES", 64)
    for vocab, dtype in ((96, torch.float32), (83, torch.float32), (80, torch.bfloat16)):
        drawn = draw(vocab, dtype)  # whole blocks only, and with a masked end
        expected_loss, expected_grad = exact(*drawn)
        loss, grad = fused(*drawn, group)
        assert_close(loss, expected_loss, torch.float32)
        assert_close(grad, expected_grad, dtype)


def test_extreme_logits(group: dist.ProcessGroup) -> None:
    drawn = draw(40, torch.float32, scale=1e4)
    drawn[0][2, 1, :39] = float("-inf")
    expected, expected_grad = exact(*drawn)
    loss, grad = fused(*drawn, group)
    assert_close(loss, expected, torch.float32)
    assert_close(grad, expected_grad, torch.float32)


def test_nan_and_infinity_are_those_of_torch(group: dist.ProcessGroup) -> None:
    logits, labels, _ = draw(40, torch.bfloat16)
    logits[0, 0, 3] = float("nan")
    logits[0, 1, 7] = float("inf")
    logits[1, 0] = float("-inf")
    logits[1, 1, 39], logits[1, 1, 2] = float("nan"), float("inf")
    logits[2, 0, labels[2, 0]] = float("-inf")  # the cross-entropy is infinite

    def values(loss: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        parts = loss(leaf * 1.0, labels, group)
        (grad,) = torch.autograd.grad(parts[0].sum() + parts[1].sum(), leaf)
        return [*parts, grad.float()]

    found, expected = (
        values(fused_vocab_parallel_cross_entropy),
        values(vocab_parallel_cross_entropy),
    )
    for ours, torchs in zip(found[:3], expected[:3], strict=True):
        finite = torchs.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        torch.testing.assert_close(ours[finite], torchs[finite], rtol=1e-6, atol=0)
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[3].isnan(), expected[3].isnan())


def test_the_gradient_overwrites_the_logits(group: dist.ProcessGroup) -> None:
    logits, labels, _ = draw(64, torch.bfloat16)
    logits.requires_grad_()
    cross_entropy, _, _ = fused_vocab_parallel_cross_entropy(logits, labels, group)
    (grad,) = torch.autograd.grad(cross_entropy.sum(), logits)
    assert grad.data_ptr() == logits.data_ptr()


def test_a_second_backward_pass_is_refused(group: dist.ProcessGroup) -> None:
    logits, labels, _ = draw(64, torch.bfloat16)
    leaf = logits.requires_grad_()
    cross_entropy, _, _ = fused_vocab_parallel_cross_entropy(leaf * 1.0, labels, group)
    torch.autograd.grad(cross_entropy.sum(), leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(cross_entropy.sum(), leaf)


@pytest.mark.parametrize("shape", ["transposed", "expanded", "padded", "reversed"])
def test_logits_labels_and_gradients_in_any_layout(group: dist.ProcessGroup, shape: str) -> None:
    logits, labels, weights = draw(48, torch.float32)
    if shape == "transposed":
        logits, labels, weights = logits.transpose(0, 1), labels.t(), weights.t()
    elif shape == "expanded":
        logits = logits[:1, :1].expand(3, 2, -1)
    elif shape == "padded":
        wide = torch.zeros(3, 2, 56, device=logits.device)
        wide[..., :48] = logits
        logits = wide[..., :48]
    else:
        logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    expected_loss, expected_grad = exact(logits, labels, weights)
    leaf = logits.detach().requires_grad_()
    parts = fused_vocab_parallel_cross_entropy(leaf, labels, group)
    loss = ((parts[0] + Z_LOSS * parts[1].square()) * weights).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    assert_close(loss.detach(), expected_loss, torch.float32)
    assert_close(grad, expected_grad, torch.float32)


def test_fp64_is_computed_by_torch(group: dist.ProcessGroup) -> None:
    logits, labels, _ = draw(50, torch.float64)
    found = fused_vocab_parallel_cross_entropy(logits.clone(), labels, group)
    expected = vocab_parallel_cross_entropy(logits.clone(), labels, group)
    for ours, torchs in zip(found, expected, strict=True):
        assert torch.equal(ours, torchs)


def test_the_choice_of_the_loss() -> None:
    assert select_loss_parts(False) is vocab_parallel_cross_entropy
    assert select_loss_parts(True) is fused_vocab_parallel_cross_entropy
