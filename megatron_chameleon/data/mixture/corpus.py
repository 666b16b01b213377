"""The documents of one source as the order of the data sees them.

Only what is asked for is read: lengths and positions stay in the memory-mapped .idx, and nothing
here grows with the number of documents.
"""

import bisect
from typing import Protocol

import numpy as np

from megatron_chameleon.data.mixture.permutation import uniform
from megatron_chameleon.data.token_files.reader import TokenFile
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary


class Corpus(Protocol):
    """Consecutive documents, numbered from 0; tokens are counted through all of them."""

    prefix: str
    """Path of its files, for errors and for people."""
    tokens: int
    """Tokens of all documents, at least 1."""
    documents: int
    images: int
    """Number of images in all documents; 0 promises that no document has any."""
    longest_conversation: int
    """In tokens; 0 promises that no document is a conversation."""

    def at(self, token: int) -> int:
        """The document that holds this token, in [0, documents)."""

    def starts(self, first: int, stop: int) -> np.ndarray:
        """Where documents ``first`` to ``stop`` - 1 begin, and where the last of them ends.

        Returns:
            int64 [stop - first + 1], tokens from the start of the corpus.
        """

    def stay_whole(self, first: int, stop: int) -> np.ndarray:
        """Which of the documents ``first`` to ``stop`` - 1 must not be cut.

        These are documents with images, and conversations.

        Returns:
            bool [stop - first].
        """

    def are_conversations(self, first: int, stop: int) -> np.ndarray:
        """Which of the documents ``first`` to ``stop`` - 1 are conversations.

        Returns:
            bool [stop - first].
        """

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Token ids ``start`` to ``stop`` - 1 of a document, as they were written."""

    def answers(self, document: int) -> np.ndarray:
        """Where the answers of a document are.

        Returns:
            int64 [answers, 2], first token and number of tokens; empty if the document is not a
            conversation.
        """


class TokenFileCorpus:
    """A token file as a corpus.

    Args:
        token_file: An open token file, which has been checked.
    """

    def __init__(self, token_file: TokenFile) -> None:
        self.token_file = token_file
        self.prefix = token_file.prefix
        self.tokens = token_file.info.tokens
        self.documents = token_file.info.documents
        self.images = token_file.info.images
        self.longest_conversation = token_file.info.longest_conversation
        self._itemsize = np.dtype(token_file.info.dtype).itemsize

    def at(self, token: int) -> int:
        # np.searchsorted would copy the whole memory-mapped array, because it is not aligned.
        return bisect.bisect_right(self.token_file.offsets, token * self._itemsize) - 1

    def starts(self, first: int, stop: int) -> np.ndarray:
        lengths = self.token_file.lengths[first:stop].astype(np.int64)
        begin = int(self.token_file.offsets[first]) // self._itemsize if first < stop else 0
        starts = np.concatenate([[begin], begin + np.cumsum(lengths)])
        stored = self.token_file.offsets[first:stop] // self._itemsize
        if (lengths < 0).any() or not np.array_equal(stored, starts[:-1]):
            raise DataError(
                f"{self.prefix}.idx",
                f"the positions of documents {first} to {stop - 1} do not follow from their "
                "lengths",
                "Copy the file again or run chameleon preprocess again",
            )
        return starts

    def have_images(self, first: int, stop: int) -> np.ndarray:
        """Which of the documents ``first`` to ``stop`` - 1 hold images: bool [stop - first]."""
        if self.images == 0 or first == stop:
            return np.zeros(stop - first, dtype=bool)
        counts = self.token_file.image_counts(first, stop)
        if (counts < 0).any():
            raise DataError(
                f"{self.prefix}.documents",
                f"the images of documents {first} to {stop - 1} are not in order",
                "Copy the file again or run chameleon preprocess again",
            )
        return counts > 0

    def stay_whole(self, first: int, stop: int) -> np.ndarray:
        return self.have_images(first, stop) | self.are_conversations(first, stop)

    def are_conversations(self, first: int, stop: int) -> np.ndarray:
        return self.token_file.are_conversations(first, stop)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.token_file.read(document, start, stop - start)

    def answers(self, document: int) -> np.ndarray:
        return self.token_file.answer_spans(document)


def image_spans(token_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Find where images begin and end, including their begin and end tokens.

    Args:
        token_ids: int [tokens].
        vocabulary: Of the tokens.

    Returns:
        int64 [images, 2], ascending: first token, and the one after the last. An image without an
        end token reaches to the next image or to the end of the tokens.
    """
    begins = np.flatnonzero(token_ids == vocabulary.begin_image)
    ends = np.flatnonzero(token_ids == vocabulary.end_image) + 1
    limits = np.append(begins[1:], len(token_ids)) if len(begins) else begins
    found = np.append(ends, len(token_ids))[np.searchsorted(ends, begins, side="right")]
    return np.stack([begins, np.minimum(found, limits)], axis=1)


class OrderedDocuments:
    """The documents of a source, with each text-image pair in the order that its epoch gives it.

    Args:
        corpus: The documents.
        vocabulary: Their tokens.
        image_first: Share of the text-image pairs, in [0, 1], whose image comes before the text. It
            is drawn again for each document and epoch. None leaves each pair as it was written.
            Source: paper, section 2.2.1 (50%).
        key: What the draw depends on, besides epoch and document.
    """

    def __init__(
        self,
        corpus: Corpus,
        vocabulary: Vocabulary,
        image_first: float | None,
        key: tuple[int, ...],
    ) -> None:
        self.corpus = corpus
        self.image_first = image_first
        self._vocabulary = vocabulary
        self._key = key

    def read(self, epoch: int, document: int, start: int, stop: int, length: int) -> np.ndarray:
        """Token ids ``start`` to ``stop`` - 1 of a document of ``length`` tokens in an epoch."""
        if self.image_first is None or not self._may_be_pair(document, length):
            return self.corpus.read(document, start, stop)
        whole = self.corpus.read(document, 0, length)
        image_first = uniform(*self._key, epoch, document) < self.image_first
        return order_pair(whole, self._vocabulary, image_first)[start:stop]

    def trained(self, document: int, start: int, stop: int) -> np.ndarray:
        """Which of the tokens ``start`` to ``stop`` - 1 of a document are trained.

        Returns:
            bool [stop - start]: the answers of a conversation, all tokens of any other document.
        """
        spans = self.corpus.answers(document)
        if not len(spans):
            return np.ones(stop - start, dtype=bool)
        flags = np.zeros(stop - start, dtype=bool)
        for first, tokens in spans:
            flags[max(0, first - start) : max(0, first + tokens - start)] = True
        return flags

    def spans(self, epoch: int, document: int) -> np.ndarray:
        """Where the images of a document lie in an epoch: see ``image_spans``."""
        length = int(np.diff(self.corpus.starts(document, document + 1))[0])
        return image_spans(self.read(epoch, document, 0, length, length), self._vocabulary)

    def _may_be_pair(self, document: int, length: int) -> bool:
        """Whether an image stands at either end, so that long documents need not be read.

        A conversation is never a pair: its question comes first.
        """
        if length < 5:  # <s>, begin, end, one token of text, </s>
            return False
        corpus = self.corpus
        if corpus.longest_conversation and corpus.are_conversations(document, document + 1)[0]:
            return False
        vocabulary, read = self._vocabulary, self.corpus.read
        if read(document, 1, 2)[0] == vocabulary.begin_image:
            return True
        return bool(read(document, length - 2, length - 1)[0] == vocabulary.end_image)


def order_pair(token_ids: np.ndarray, vocabulary: Vocabulary, image_first: bool) -> np.ndarray:
    """Put the image of a text-image pair before or after its text.

    Args:
        token_ids: One document, [tokens].
        vocabulary: Its tokens.
        image_first: Which of the two comes first.

    Returns:
        The document in that order, of the same length. A pair has exactly one image, text on
        exactly one side of it, and ``<s>`` and ``</s>`` around them; any other document is returned
        as it is.
    """
    begins = np.flatnonzero(token_ids == vocabulary.begin_image)
    ends = np.flatnonzero(token_ids == vocabulary.end_image)
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        return token_ids
    if token_ids[0] != vocabulary.bos or token_ids[-1] != vocabulary.eos:
        return token_ids
    begin, end = int(begins[0]), int(ends[0]) + 1
    before, after = token_ids[1:begin], token_ids[end:-1]
    if (len(before) > 0) == (len(after) > 0):
        return token_ids
    image, text = token_ids[begin:end], np.concatenate([before, after])
    middle = [image, text] if image_first else [text, image]
    return np.concatenate([token_ids[:1], *middle, token_ids[-1:]])
