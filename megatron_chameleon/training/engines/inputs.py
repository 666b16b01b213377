"""What the model is given of a micro-batch on this rank.

Without isolated documents, and with torch's attention, the tensors keep their shape
[samples, seq_length], of which context parallelism assigns a part to each rank. For Transformer
Engine, isolated documents are packed: the sequences of a micro-batch become one. Context
parallelism then cuts every document into 2 x size chunks, as Transformer Engine expects, so that
each document is filled up to a multiple of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.batch import Batch
from megatron_chameleon.data.batches.pairs import AnswerPairs
from megatron_chameleon.model.backend import packs_documents
from megatron_chameleon.model.isolation import IsolatedDocuments
from megatron_chameleon.parallel import platform

ROWS, ROWS_OF_SPLIT = 16, 8
"""FP8 products need multiples of so many tokens on each rank; the second if tensor-parallel ranks
split them."""


@dataclass(frozen=True)
class MicroBatchShape:
    """The shape of all micro-batches of a step, before tensor and context parallelism split it.

    Pipeline stages exchange tensors of one shape. They find it without a message, because the
    stages of a pipeline read the same micro-batches.
    """

    samples: int
    tokens: int
    """Of each sample."""
    packed: bool = False


def micro_batch_shape(config: Config, micro_batches: Sequence[Batch]) -> MicroBatchShape:
    """The shape in which the model receives these micro-batches.

    Args:
        config: A checked config.
        micro_batches: Of one step; the same on all ranks of a model.
    """
    samples, length = micro_batches[0].tokens.shape
    if not packs_documents(config):
        return MicroBatchShape(samples, length)
    parallel = config.parallel
    size = parallel.context_parallel_size
    if size == 1:
        return MicroBatchShape(1, samples * length, packed=True)
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    unit = size * max(ROWS, ROWS_OF_SPLIT * split)
    borders = [batch.cu_seqlens.numpy() for batch in micro_batches if batch.cu_seqlens is not None]
    longest = max(_filled_lengths(cu_seqlens, size).sum() for cu_seqlens in borders)
    return MicroBatchShape(1, -(-int(longest) // unit) * unit, packed=True)


def own_part(batch: Batch, shape: MicroBatchShape) -> tuple[Batch, IsolatedDocuments | None]:
    """This rank's part of a micro-batch on its device, and its documents if they are isolated.

    The model takes the documents as ``packed_seq_params``.

    Args:
        batch: On the CPU.
        shape: From ``micro_batch_shape``.
    """
    tensors: dict[str, Tensor] = {
        name: tensor
        for name, tensor in vars(batch).items()
        if isinstance(tensor, Tensor) and name != "cu_seqlens"
    }
    if batch.pairs is not None:
        tensors["answer"] = batch.pairs.answer
    if shape.packed:
        return _pack(tensors, batch, shape)
    on_device = {name: platform.copy_to_device(tensor) for name, tensor in tensors.items()}
    own = _batch(get_batch_on_this_cp_rank(on_device), batch.pairs)
    if batch.cu_seqlens is None:
        return own, None
    return own, IsolatedDocuments.grouped(batch.cu_seqlens, own.position_ids)


def run_model(model: Any, batch: Batch, documents: IsolatedDocuments | None) -> Any:
    """The forward pass on what ``own_part`` returned; the only call of a training model.

    Args:
        model: This rank's part of the model, as the engine has wrapped it.
        batch: On this process's device.
        documents: Its documents if they are isolated.

    Returns:
        What ``summed_loss`` takes; on a pipeline stage before the last one, its hidden states.
    """
    return model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        packed_seq_params=documents,
    )


def _pack(
    tensors: dict[str, Tensor], batch: Batch, shape: MicroBatchShape
) -> tuple[Batch, IsolatedDocuments]:
    """A packed micro-batch; ``tensors`` are those of its tensors that have a value per token."""
    size = parallel_state.get_context_parallel_world_size()
    position_ids = tensors["position_ids"]
    assert batch.cu_seqlens is not None
    cu_seqlens = batch.cu_seqlens.numpy()
    tensors = {name: tensor.reshape(1, -1) for name, tensor in tensors.items()}
    if size > 1:
        rank = parallel_state.get_context_parallel_rank()
        filled = FilledDocuments.of(cu_seqlens, shape.tokens, size)
        own_T = torch.from_numpy(filled.of_rank(rank, size))
        source_T = torch.from_numpy(filled.source_T)[own_T]
        tensors = {name: tensor[:, source_T] for name, tensor in tensors.items()}
        tensors["loss_mask"] *= torch.from_numpy(filled.is_token_T)[own_T]
        tensors["position_ids"] = position_ids = torch.from_numpy(filled.position_T)[None, own_T]
        cu_seqlens = filled.cu_seqlens
    longest = int(np.diff(cu_seqlens).max())
    documents = IsolatedDocuments.packed(
        platform.copy_to_device(torch.from_numpy(cu_seqlens).int()),
        longest,
        platform.copy_to_device(position_ids),
        in_parts=size > 1,
    )
    on_device = {name: platform.copy_to_device(tensor) for name, tensor in tensors.items()}
    return _batch(on_device, batch.pairs), documents


def _batch(tensors: dict[str, Tensor], pairs: AnswerPairs | None) -> Batch:
    """A micro-batch of tensors on the device; ``answer`` among them is that of its pairs."""
    if pairs is not None:
        reference = platform.copy_to_device(pairs.reference)
        pairs = AnswerPairs(tensors.pop("answer"), reference, pairs.documents)
    return Batch(**tensors, pairs=pairs)


@dataclass(frozen=True)
class FilledDocuments:
    """The documents of a micro-batch, each filled up so that context parallelism can cut it.

    A document is filled up with copies of its last token. They do not count in the loss, and no
    other token sees them, because they come last. So attention needs no notion of padding.
    """

    cu_seqlens: np.ndarray
    """[documents + 1] Where each filled document begins, and the end of the last one."""
    source_T: np.ndarray
    """For each token, its place in the micro-batch."""
    is_token_T: np.ndarray
    """False for the copies."""
    position_T: np.ndarray
    """Counted from the start of each document."""

    @classmethod
    def of(cls, cu_seqlens: np.ndarray, tokens: int, size: int) -> "FilledDocuments":
        """Fill up the documents.

        Args:
            cu_seqlens: See ``Batch.cu_seqlens``.
            tokens: Number of tokens in the end, a multiple of 2 x ``size``. What the documents do
                not fill becomes one more document.
            size: Of the context-parallel group.
        """
        start, length = cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens)
        filled = _filled_lengths(cu_seqlens, size)
        if rest := tokens - filled.sum():
            start, length = np.append(start, cu_seqlens[-1] - 1), np.append(length, 0)
            filled = np.append(filled, rest)
        borders = np.append(0, np.cumsum(filled))
        position_T = np.arange(tokens) - borders[:-1].repeat(filled)
        last_T = np.maximum(length - 1, 0).repeat(filled)
        source_T = start.repeat(filled) + np.minimum(position_T, last_T)
        return cls(borders, source_T, position_T < length.repeat(filled), position_T)

    def of_rank(self, rank: int, size: int) -> np.ndarray:
        """Which tokens a rank computes: of each document the chunks ``rank`` and its mirror image.

        Source: ``thd_get_partitioned_indices`` in Transformer Engine.
        """
        chunk_T = (
            self.position_T * 2 * size // np.diff(self.cu_seqlens).repeat(np.diff(self.cu_seqlens))
        )
        return np.flatnonzero((chunk_T == rank) | (chunk_T == 2 * size - 1 - rank))


def _filled_lengths(cu_seqlens: np.ndarray, size: int) -> np.ndarray:
    """Lengths of the documents, rounded up to multiples of 2 x ``size``."""
    return -(-np.diff(cu_seqlens).astype(np.int64) // (2 * size)) * 2 * size
