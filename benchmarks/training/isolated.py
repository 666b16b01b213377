"""What isolated documents cost: a training step, and core attention alone.

    python -W ignore -m benchmarks.training.train_step --isolated          # minutes
    python -W ignore -m benchmarks.training.train_step --isolated --quick  # tiny sizes, as a check

A step of the same model over the same tokens is timed in three ways: attention is causal over the
sequence; documents are isolated; documents are isolated by a dense mask, as in earlier versions.
The losses of the last two are compared before anything is timed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.data.batches.batch import Batch
from megatron_chameleon.model.backend import ScaledDotProductAttention
from megatron_chameleon.model.chameleon import transformer_config
from megatron_chameleon.model.isolation import IsolatedDocuments

PLAIN, ISOLATED, MASKED = "not isolated", "isolated", "isolated by a dense mask"
TOLERANCE = 1e-6
"""Of the losses, relative: rounding in fp32."""

Measured = dict[str, float]


@dataclass(frozen=True)
class IsolatedSize:
    model: ModelConfig
    vocab_size: int
    samples: int
    documents: int
    """In each sequence."""


def _shape(length: int) -> ModelConfig:
    return ModelConfig(8, 256, 688, 4, seq_length=length)


FULL = (IsolatedSize(_shape(256), 8192, 4, 10), IsolatedSize(_shape(4096), 8192, 1, 16))
QUICK = (IsolatedSize(ModelConfig(2, 32, 64, 2, seq_length=32), 128, 2, 4),)
ATTENTION, QUICK_ATTENTION = (4096, 8, 64), (256, 2, 16)
"""Tokens, heads and head size of core attention alone, whose documents are equally long."""


def isolate(batch: Batch, documents: int, seed: int) -> Batch:
    """The same tokens, with documents of random lengths."""
    samples, length = batch.tokens.shape
    generator = torch.Generator().manual_seed(seed)
    borders = [0]
    for sample in range(samples):
        inner = torch.randperm(length - 1, generator=generator)[: documents - 1] + 1
        borders += [sample * length + end for end in (*sorted(inner.tolist()), length)]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(borders)])
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    return replace(batch, cu_seqlens=cu_seqlens, position_ids=positions.view(samples, length))


@contextmanager
def dense_masks() -> Iterator[None]:
    """Let core attention use a mask of all pairs of tokens, which it makes once per micro-batch."""
    masks: dict[int, tuple[IsolatedDocuments, Tensor]] = {}

    def forward(
        module: ScaledDotProductAttention,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        mask: None,
        *,
        packed_seq_params: IsolatedDocuments,
        **kwargs: Any,
    ) -> Tensor:
        if (found := masks.get(0)) is None or found[0] is not packed_seq_params:
            masks[0] = found = packed_seq_params, dense_mask(packed_seq_params)
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        out_BNSD = functional.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BGSD, attn_mask=found[1]
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)

    own = ScaledDotProductAttention.forward
    ScaledDotProductAttention.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        ScaledDotProductAttention.forward = own  # type: ignore[method-assign]


def dense_mask(documents: IsolatedDocuments) -> Tensor:
    """True where a token (row) sees another (column): [B, 1, S, S]."""
    assert documents.position_ids is not None
    place_S = torch.arange(documents.position_ids.size(1))
    first_BS = place_S - documents.position_ids
    earlier_SS = place_S <= place_S.unsqueeze(1)
    return (earlier_SS & (first_BS.unsqueeze(2) <= place_S)).unsqueeze(1)


def make_steps(
    make_step: Callable[[Sequence[Batch]], Callable[[int], float]],
    batches: Sequence[Batch],
    documents: int,
) -> dict[str, Callable[[int], float]]:
    """The steps to compare, each with a model of its own, and a check of their losses.

    Args:
        make_step: Builds an engine that trains on the given batches, and returns its step.
        batches: Without documents.
        documents: In each sequence.
    """
    isolated = [isolate(batch, documents, seed) for seed, batch in enumerate(batches)]
    masked = make_step(isolated)

    def step_with_masks(number: int) -> float:
        with dense_masks():
            return masked(number)

    steps = {PLAIN: make_step(batches), ISOLATED: make_step(isolated), MASKED: step_with_masks}
    losses = {name: [step(number) for number in range(2)] for name, step in steps.items()}
    for ours, dense, plain in zip(*(losses[n] for n in (ISOLATED, MASKED, PLAIN)), strict=True):
        if abs(ours / dense - 1) > TOLERANCE or ours == plain:
            raise SystemExit(f"the losses differ where they should not, or not at all: {losses}")
    return steps


def measure_attention(
    shape: tuple[int, int, int], documents: int, repeats: int, clock: Callable[[], float]
) -> Measured:
    """Best seconds of core attention, forward and backward, over documents of equal lengths."""
    length, heads, size = shape
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(length, 1, heads, size, generator=generator).requires_grad_() for _ in range(3)
    ]
    grad = torch.randn(length, 1, heads * size, generator=generator)
    own = length // documents
    cu_seqlens = torch.arange(0, length + 1, own, dtype=torch.int32)
    isolated = IsolatedDocuments.grouped(cu_seqlens, (torch.arange(length) % own)[None])
    attention = ScaledDotProductAttention(transformer_config(Config()))

    def alone() -> Tensor:
        """Each document by a call of its own, as a lower bound."""
        parts = zip(*(x.split(own) for x in inputs), strict=True)
        return torch.cat([attention(*part, None) for part in parts])

    def with_masks() -> Tensor:
        with dense_masks():
            return attention(*inputs, None, packed_seq_params=isolated)

    seconds: Measured = {}
    for name, run in (
        ("document by document", alone),
        (ISOLATED, partial(attention, *inputs, None, packed_seq_params=isolated)),
        (PLAIN, partial(attention, *inputs, None)),
        (MASKED, with_masks),
    ):
        times = []
        for _ in range(repeats):
            start = clock()
            torch.autograd.grad(run(), inputs, grad)
            times.append(clock() - start)
        seconds[name] = min(times)
    return seconds


def print_ratios(seconds: Measured, of: str) -> None:
    for name, value in seconds.items():
        print(f"  {name:26} {value * 1e3:9.1f} ms   {value / seconds[of]:6.2f} of {of}")
