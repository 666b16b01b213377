"""Which tokens of a micro-batch belong to which answer of which pair, for preference tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_chameleon.errors import DataError

ReferenceTables = Mapping[str, np.ndarray]
"""For each source, the log-probabilities that the reference gives to the chosen and the rejected
answer of each document: float64 [documents, 2]; NaN for pairs that no sequence can hold."""


@dataclass(frozen=True)
class AnswerPairs:
    """The pairs of a micro-batch, numbered from 0."""

    answer: torch.Tensor
    """int64 [samples, seq_length]: 2p for the tokens of pair p's chosen conversation, 2p + 1 for
    those of its rejected one, and 2 x pairs for padding."""
    reference: torch.Tensor
    """The reference's log-probabilities of the chosen and the rejected answers; float64 [pairs, 2];
    zeros if they are not known yet."""
    documents: np.ndarray
    """The document of each pair, in its source; int64 [pairs]."""

    @property
    def count(self) -> int:
        """How many pairs there are."""
        return len(self.documents)


def find_second(ids: np.ndarray, bos: int, where: str) -> int:
    """The token with which the rejected conversation of a pair begins.

    Args:
        ids: All tokens of the pair.
        bos: The id of ``<s>``.
        where: The document, for errors.

    Raises:
        DataError: These are not two conversations.
    """
    begins = np.flatnonzero(ids == bos)
    if len(begins) != 2 or begins[0] != 0:
        what = f"is not a pair of two conversations: it has {len(begins)} of <s>"
        raise DataError(where, what, "Run chameleon preprocess again")
    return int(begins[1])


def pairs_of_samples(
    answers: Sequence[np.ndarray],
    documents: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
) -> AnswerPairs:
    """Number the pairs of several sequences through.

    Args:
        answers: Of each sequence, the number of each token's answer, -1 for padding.
        documents: Of each sequence, the documents of its pairs.
        references: Of each sequence, float64 [pairs, 2].
    """
    counts = [len(these) for these in documents]
    total, first = sum(counts), np.cumsum([0, *counts])
    shifted = [
        np.where(answer < 0, 2 * total, answer + 2 * begin)
        for answer, begin in zip(answers, first[:-1].tolist(), strict=True)
    ]
    return AnswerPairs(
        torch.from_numpy(np.stack(shifted)),
        torch.from_numpy(np.concatenate(references).astype(np.float64)),
        np.concatenate(documents),
    )
