"""How a micro-batch gets to its device, and how its documents are packed."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_chameleon.config.schema import Config, ParallelConfig
from megatron_chameleon.data.batches.batch import Batch
from megatron_chameleon.parallel import platform
from megatron_chameleon.training.engines import inputs
from megatron_chameleon.training.engines.inputs import (
    FilledDocuments,
    MicroBatchShape,
    micro_batch_shape,
    own_part,
)


def make_batch(lengths: list[list[int]]) -> Batch:
    """Sequences of documents with these lengths; every token has an id of its own."""
    tokens = torch.arange(100, 100 + sum(map(sum, lengths))).view(len(lengths), -1)
    flat = list(itertools.chain(*lengths))
    positions = torch.cat([torch.arange(length) for length in flat]).view_as(tokens)
    borders = torch.tensor([0, *itertools.accumulate(flat)], dtype=torch.int32)
    mask = (tokens % 3 > 0).float()
    return Batch(tokens, tokens + 1, mask, tokens % 2 == 0, positions, borders)


def test_a_gpu_gets_its_batch_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        assert 0 not in tensor.stride()  # torch refuses to pin an expanded tensor
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(platform, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(inputs, "get_batch_on_this_cp_rank", lambda tensors: tensors)
    ids, positions = torch.arange(8).view(2, 4), torch.arange(4).expand(2, -1)
    batch = Batch(ids, ids + 1, torch.ones(2, 4), ids < 4, positions)
    shape = MicroBatchShape(2, 4)
    assert torch.equal(own_part(batch, shape)[0].position_ids, positions)
    assert not pinned  # a CPU needs no pinned memory
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    found, documents = own_part(batch, shape)
    assert len(pinned) == 5 and found.cu_seqlens is None and documents is None
    for name, tensor in vars(found).items():
        assert tensor is None or torch.equal(tensor, getattr(batch, name)), name


def ranks(monkeypatch: pytest.MonkeyPatch, batch: Batch, shape: MicroBatchShape, size: int) -> list:
    """What each rank of a context-parallel group gets of a packed micro-batch."""
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: size)
    found = []
    for rank in range(size):
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda r=rank: r)
        found.append(own_part(batch, shape))
    return found


def packing(monkeypatch: pytest.MonkeyPatch, **parallel: Any) -> Config:
    """A config on a machine with Transformer Engine."""
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: True)
    config = Config(parallel=ParallelConfig(**parallel))
    config.data.reset_attention, config.training.dtype = True, "bf16"
    return config


def test_a_packed_micro_batch_is_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([[3, 5], [1, 7], [8]])
    shape = micro_batch_shape(packing(monkeypatch), [batch])
    assert shape == MicroBatchShape(1, 24, packed=True)
    ((own, documents),) = ranks(monkeypatch, batch, shape, 1)
    for name in ("tokens", "labels", "loss_mask", "image_mask", "position_ids"):
        assert torch.equal(getattr(own, name), getattr(batch, name).view(1, 24)), name
    assert documents.qkv_format == "thd" and documents.cu_seqlens_q.dtype == torch.int32
    assert documents.cu_seqlens_q.tolist() == [0, 3, 8, 9, 16, 24]
    assert documents.cu_seqlens_q is documents.cu_seqlens_kv
    assert documents.cu_seqlens_q_padded is documents.cu_seqlens_kv_padded is None
    assert documents.max_seqlen_q == documents.max_seqlen_kv == 8
    assert torch.equal(documents.position_ids, batch.position_ids)


def test_only_transformer_engine_in_bf16_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, plain = make_batch([[3, 5], [1, 7]]), MicroBatchShape(2, 8)
    config = packing(monkeypatch)
    config.training.dtype = "fp32"
    assert micro_batch_shape(config, [batch]) == plain
    config = packing(monkeypatch)
    config.data.reset_attention = False
    assert micro_batch_shape(config, [batch]) == plain
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: False)
    assert micro_batch_shape(config, [batch]) == plain


def test_context_parallel_ranks_share_the_chunks_of_each_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The example of Transformer Engine: documents of 8 and 4 tokens on two ranks."""
    filled = FilledDocuments.of(np.array([0, 8, 12], np.int32), 12, 2)
    assert filled.of_rank(0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert filled.of_rank(1, 2).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_every_token_is_on_one_context_parallel_rank(
    monkeypatch: pytest.MonkeyPatch, size: int, split: bool
) -> None:
    batches = [make_batch([[3, 5, 24], [1, 31]]), make_batch([[32], [1] * 32])]
    config = packing(monkeypatch, context_parallel_size=size, tensor_model_parallel_size=4)
    config.parallel.sequence_parallel = split
    shape = micro_batch_shape(config, batches)
    assert shape.tokens % (size * (4 * 8 if split else 16)) == 0  # each rank's FP8 products
    for batch in batches:
        found = ranks(monkeypatch, batch, shape, size)
        own = [part.tokens[0, part.loss_mask[0] > 0].tolist() for part, _ in found]
        counted = batch.tokens[batch.loss_mask > 0].tolist()
        assert sorted(itertools.chain(*own)) == counted
        for part, documents in found:
            assert part.tokens.shape == (1, shape.tokens // size)
            borders = documents.cu_seqlens_q_padded
            assert torch.equal(borders, documents.cu_seqlens_q) and borders[-1] == shape.tokens
            lengths = borders.diff()
            assert (lengths % (2 * size) == 0).all() and lengths.max() <= documents.max_seqlen_q
            # every token is where it was in its document, and has its own label
            known = part.loss_mask[0] > 0
            place = part.tokens[0, known] - 100
            assert torch.equal(part.position_ids[0, known], batch.position_ids.flatten()[place])
            assert torch.equal(part.labels[0], part.tokens[0] + 1)
            assert torch.equal(documents.position_ids, part.position_ids)


def test_what_fills_a_document_up_comes_last() -> None:
    filled = FilledDocuments.of(np.array([0, 3, 4, 9], np.int32), 24, 2)
    assert filled.cu_seqlens.tolist() == [0, 4, 8, 16, 24]
    assert filled.source_T.tolist() == [0, 1, 2, 2, *[3] * 4, 4, 5, 6, 7, *[8] * 4, *[8] * 8]
    real = [1, 1, 1, 0, 1, 0, 0, 0, *[1] * 5, *[0] * 3, *[0] * 8]
    assert filled.is_token_T.tolist() == [bool(value) for value in real]
    assert filled.position_T.tolist() == [*range(4), *range(4), *range(8), *range(8)]
