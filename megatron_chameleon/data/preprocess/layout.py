"""The layout of a document: which tokens stand where.

A document becomes ``<s>``, its parts in order, ``</s>``; an image becomes begin-image, its codes
row by row (with shapes also its grid and the ends of rows: ``Vocabulary.image_tokens``), end-image.
Conversations consist of turns (``conversations.py``), and their answers are marked. A pair of a
chosen and a rejected answer is two conversations, one behind the other, each with an ``<s>`` of its
own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.documents.conversations import turns_of
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.data.token_files.format import TOKEN_SPAN
from megatron_chameleon.tokenizer.common.grids import Grid
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

TokenSpans = list[list[tuple[int, ...]]]
"""For each document: the first token of each image or answer, and its number of tokens; of an image
with a shape also its rows and columns."""

ShapedCodes = tuple[Grid, np.ndarray]
"""A picture: its grid, and its codes int64 [grid.codes], row-major."""


@dataclass(frozen=True)
class EncodedDocuments:
    """The tokens of documents, and where their images and answers are."""

    token_ids: np.ndarray
    """The documents one after the other, in the dtype of the token file."""
    lengths: Sequence[int] | np.ndarray
    """Tokens of each document."""
    images: TokenSpans
    answers: TokenSpans


def lay_out_texts(
    token_ids: np.ndarray, offsets: np.ndarray, vocabulary: Vocabulary, dtype: np.dtype
) -> EncodedDocuments:
    """Lay out documents that are one text each.

    Args:
        token_ids: The texts one after the other.
        offsets: Where each text begins, and the end: int64 [documents + 1].
        vocabulary: For the ids of ``<s>`` and ``</s>``.
        dtype: Type of the token file.
    """
    lengths = np.diff(offsets) + 2
    ends = np.cumsum(lengths)
    tokens = np.empty(int(ends[-1]) if len(ends) else 0, dtype=dtype)
    is_text = np.ones(len(tokens), dtype=bool)
    is_text[ends - lengths] = is_text[ends - 1] = False
    tokens[is_text] = token_ids
    tokens[ends - lengths] = vocabulary.bos
    tokens[ends - 1] = vocabulary.eos
    return EncodedDocuments(tokens, lengths, [[] for _ in lengths], [[] for _ in lengths])


def lay_out(
    documents: Sequence[Document],
    texts: Iterator[np.ndarray],
    codes: Sequence[Sequence[ShapedCodes]],
    vocabulary: Vocabulary,
    dtype: np.dtype,
) -> EncodedDocuments:
    """Lay out documents of any kind.

    Args:
        documents: In order.
        texts: Token ids of all their text parts, in order.
        codes: Grid and image codes of each document's images.
        vocabulary: Turns codes into ids, and has those of the special tokens.
        dtype: Type of the token file.
    """
    layout = _Layout(vocabulary)
    for document, image_codes in zip(documents, codes, strict=True):
        layout.add(document, texts, iter(image_codes))
    arrays = layout.arrays
    token_ids = np.concatenate(arrays) if arrays else np.empty(0)
    return EncodedDocuments(token_ids.astype(dtype), layout.lengths, layout.images, layout.answers)


class _Layout:
    """Collects the tokens of documents as a list of arrays."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.arrays: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.images: TokenSpans = []
        self.answers: TokenSpans = []
        self._vocabulary = vocabulary
        self._bos, self._eos, self._separator, self._begin_image, self._end_image = (
            np.array([token_id])
            for token_id in (
                vocabulary.bos,
                vocabulary.eos,
                vocabulary.separator,
                vocabulary.begin_image,
                vocabulary.end_image,
            )
        )

    def add(
        self, document: Document, texts: Iterator[np.ndarray], codes: Iterator[ShapedCodes]
    ) -> None:
        """Add a document, taking as many texts and codes as it has parts."""
        images: list[tuple[int, ...]] = []
        answers: list[tuple[int, ...]] = []
        length = 0
        for turn in turns_of(document):
            if turn.begins:
                self.arrays.append(self._bos)
                length += 1
            first = length
            for part in turn.parts:
                if isinstance(part, TextPart):
                    text = next(texts)
                    self.arrays.append(text)
                    length += len(text)
                else:
                    grid, image_codes = next(codes)
                    token_ids = self._vocabulary.image_tokens(image_codes, grid)
                    self.arrays += [self._begin_image, token_ids, self._end_image]
                    shape = grid if self._vocabulary.grids else ()
                    images.append((length, len(token_ids) + 2, *shape))
                    length += len(token_ids) + 2
            self.arrays.append(self._separator if turn.is_prompt else self._eos)
            length += 1
            if turn.is_answer:
                answers.append((first, length - first))
        self.lengths.append(length)
        self.images.append(images)
        self.answers.append(answers)


def span_records(spans: TokenSpans, record: np.dtype = TOKEN_SPAN) -> np.ndarray:
    """The spans of all documents, one after the other, as records."""
    return np.array([span for document in spans for span in document], dtype=record)


def span_counts(spans: TokenSpans) -> np.ndarray:
    """How many spans each document has: int64 [documents]."""
    return np.array([len(document) for document in spans], dtype=np.int64)
