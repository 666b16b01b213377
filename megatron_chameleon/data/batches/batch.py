"""Tensors of packed sequences: tokens, labels and masks.

The labels are the tokens shifted by one within each part of a document; this is the only place that
shifts. So when a document is cut at the end of a sequence, its last label there is the first token
of its next part. The last token of a document has no label, which is written as ``<pad>``.

Every label counts in the loss except ``<pad>`` and ``<s>``. ``<s>`` is certain, and generation is
always given it, so it would only flatter the mean. In a conversation only the answers count
(``data.loss_on``).

Attention is causal over the whole sequence, across the documents that are packed in it (this is
megatron's default, and the paper names no other), or with ``data.reset_attention`` within each
document. In that case positions count from the start of each document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_chameleon.data.batches.pairs import (
    AnswerPairs,
    ReferenceTables,
    find_second,
    pairs_of_samples,
)
from megatron_chameleon.data.mixture.corpus import OrderedDocuments
from megatron_chameleon.data.mixture.packing import PackedSequences
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

_COLUMNS = ("epoch", "document", "start", "stop", "length")
"""The fields of ``DocumentParts`` that say what to read."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU; the tensors are [samples, seq_length] unless stated otherwise."""

    tokens: torch.Tensor
    """Input ids, int64; ``<pad>`` after the last document."""
    labels: torch.Tensor
    """The id that follows each token in its document, int64; ``<pad>`` if none follows."""
    loss_mask: torch.Tensor
    """1 where the label counts in the loss, else 0; float32."""
    image_mask: torch.Tensor
    """Where the label stands inside an image: its codes, and with shapes its grid and the ends of
    rows; bool."""
    position_ids: torch.Tensor
    """Counted from 0 in each sequence, or in each isolated document; int64."""
    cu_seqlens: torch.Tensor | None = None
    """[parts + 1], int32: where each isolated part begins in the micro-batch, whose sequences are
    counted one after the other, and last the number of all its tokens. A part is what a sequence
    holds of a document, or its padding. None: attention is causal over each sequence."""
    pairs: AnswerPairs | None = None
    """The pairs of answers that it holds; None unless preferences are trained."""


@dataclass(frozen=True)
class PackedSample:
    """One sequence of packed documents; the arrays are [seq_length]."""

    tokens: np.ndarray
    """int64, ``<pad>`` after the last part."""
    labels: np.ndarray
    """int64."""
    in_loss: np.ndarray
    """Whether each label counts in the loss; bool."""
    part: np.ndarray
    """Number of the part that each token belongs to, from 0; the padding is a part too; int64."""
    packed: PackedSequences
    """The document parts."""
    source_names: list[str]
    """Names of the sources, by the numbers in ``packed.source``."""
    reference: np.ndarray | None = None
    """The reference's log-probabilities of the sequence's pairs, float64 [pairs, 2]: see
    ``AnswerPairs``. None unless preferences are trained."""


def read_sample(
    packed: PackedSequences,
    documents: Sequence[OrderedDocuments],
    source_names: list[str],
    seq_length: int,
    vocabulary: Vocabulary,
    *,
    answers_only: bool,
    paired: bool = False,
    references: ReferenceTables | None = None,
) -> PackedSample:
    """Read the tokens of one packed sequence, and find its labels.

    Args:
        packed: The document parts of the sequence.
        documents: Where to read them, by the numbers in ``packed.source``.
        source_names: Names of the sources, by the same numbers.
        seq_length: Tokens of a sequence.
        vocabulary: Of the tokens.
        answers_only: Whether only the answers of conversations count in the loss.
        paired: Whether each document is a pair of conversations, which are two parts.
        references: Of the pairs of each source, by its name; None if they are not known yet.

    Raises:
        DataError: A document is not a pair although ``paired``.
    """
    tokens = np.full(seq_length, vocabulary.pad, dtype=np.int64)
    labels = tokens.copy()
    in_loss = np.zeros(seq_length, dtype=bool)
    sizes = packed.parts.tokens
    firsts: list[int] = []  # tokens of the first conversation of each pair
    columns = (packed.source, *(getattr(packed.parts, name) for name in _COLUMNS))
    begin = 0
    for source, epoch, document, start, stop, whole in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        # One token more than the part, if the document has it: the label of the last one.
        last = min(stop + 1, whole)
        ids = documents[source].read(epoch, document, start, last, whole)
        end, labels_end = begin + stop - start, begin + last - start - 1
        tokens[begin:end] = ids[: stop - start]
        labels[begin:labels_end] = ids[1:]
        in_loss[begin:labels_end] = True
        if answers_only and documents[source].corpus.longest_conversation:
            in_loss[begin:labels_end] = documents[source].trained(document, start + 1, last)
        if paired:
            where = f"{documents[source].corpus.prefix}: document {document}"
            firsts.append(find_second(ids, vocabulary.bos, where))
        begin = end
    if paired:
        first = np.array(firsts, dtype=np.int64)
        sizes = np.stack([first, sizes - first], axis=1).reshape(-1)
    part = np.repeat(np.arange(len(sizes) + 1), np.append(sizes, seq_length - sizes.sum()))
    in_loss &= (labels != vocabulary.pad) & (labels != vocabulary.bos)
    reference = _references(packed, source_names, references) if paired else None
    return PackedSample(tokens, labels, in_loss, part, packed, source_names, reference)


def _references(
    packed: PackedSequences, source_names: list[str], tables: ReferenceTables | None
) -> np.ndarray:
    """The reference's log-probabilities of the pairs of a sequence: float64 [pairs, 2]."""
    if tables is None:
        return np.zeros((len(packed.parts), 2))
    found = [
        tables[source_names[source]][document]
        for source, document in zip(packed.source, packed.parts.document, strict=True)
    ]
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def _pairs(samples: Sequence[PackedSample]) -> AnswerPairs | None:
    """The pairs of a micro-batch; None unless preferences are trained."""
    references = [sample.reference for sample in samples if sample.reference is not None]
    if not references:
        return None
    counts = [2 * len(sample.packed.parts) for sample in samples]
    answers = [
        np.where(sample.part < count, sample.part, -1)
        for sample, count in zip(samples, counts, strict=True)
    ]
    documents = [sample.packed.parts.document for sample in samples]
    return pairs_of_samples(answers, documents, references)


def make_batch(samples: Sequence[PackedSample], vocabulary: Vocabulary, *, isolated: bool) -> Batch:
    """Stack sequences of the same length.

    Args:
        samples: At least one.
        vocabulary: Of the tokens.
        isolated: Whether each document attends only to itself (``data.reset_attention``).
    """
    labels = np.stack([sample.labels for sample in samples])
    in_loss = np.stack([sample.in_loss for sample in samples])
    positions = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)
    borders = None
    if isolated:
        part_BS = np.stack([sample.part for sample in samples])
        first = np.flatnonzero(np.diff(part_BS, axis=1, prepend=-1))
        borders = np.append(first, labels.size)
        positions = (np.arange(labels.size) - first.repeat(np.diff(borders))).reshape(labels.shape)
    return Batch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples])),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(in_loss.astype(np.float32)),
        image_mask=torch.from_numpy(vocabulary.is_inside_image(labels)),
        position_ids=torch.tensor(positions),
        cu_seqlens=None if borders is None else torch.tensor(borders, dtype=torch.int32),
        pairs=_pairs(samples),
    )
