"""The endless stream of one source: its documents, shuffled each epoch, cut into windows.

Window k holds tokens [k * seq_length, (k + 1) * seq_length] of the stream, both ends included: the
last token of a window is the first of the next, so that each token is a label exactly once.
Documents run on across window borders and epochs straddle them; nothing is padded, repeated or left
out. A window is a pure function of (data, seed, source, k).

Random bits come from ``PCG64.random_raw`` and BLAKE2b, which do not change with the version of
numpy, as the methods of ``np.random.Generator`` may: a run can be continued after an upgrade.
"""

import hashlib
import struct
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.indexed import TokenFile
from megatron_chameleon.tokenizer.vocabulary import Vocabulary

CACHED_EPOCHS = 2
"""Consecutive samples meet at most two epochs at a time; an epoch takes 16 bytes a document."""


@dataclass(frozen=True)
class _Epoch:
    order: np.ndarray
    """Document at each place: int64 [documents]."""
    ends: np.ndarray
    """Tokens of the epoch up to the end of that document: int64 [documents]."""


class DocumentStream:
    """Windows of one token file.

    Args:
        token_file: The documents.
        vocabulary: Their tokens.
        seed: Seed of the run, >= 0.
        source_index: Which source of the run this is: sources of the same file and seed differ in
            order.
        seq_length: Tokens of a training sequence; a window has one more.
        image_first: Share of the text-image pairs, in [0, 1], whose image comes before the text,
            drawn anew for each document and epoch; None leaves each pair as it was written. Source:
            paper, section 2.2.1 (50%).
    """

    def __init__(
        self,
        token_file: TokenFile,
        vocabulary: Vocabulary,
        seed: int,
        source_index: int,
        seq_length: int,
        image_first: float | None = None,
    ) -> None:
        self.token_file = token_file
        self.vocabulary = vocabulary
        self.seed = seed
        self.source_index = source_index
        self.seq_length = seq_length
        self.image_first = image_first
        self.epoch_tokens = int(token_file.lengths.sum(dtype=np.int64))
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def window(self, index: int) -> np.ndarray:
        """Token ids of one window, int64 [seq_length + 1].

        Args:
            index: Its place in the stream, >= 0, without an upper bound.
        """
        tokens = np.empty(self.seq_length + 1, dtype=np.int64)
        epoch_index, position = divmod(index * self.seq_length, self.epoch_tokens)
        epoch = self._epoch(epoch_index)
        place = int(np.searchsorted(epoch.ends, position, side="right"))
        filled = 0
        while filled < len(tokens):
            if place == len(epoch.order):
                epoch_index, position, place = epoch_index + 1, 0, 0
                epoch = self._epoch(epoch_index)
            document = int(epoch.order[place])
            length = int(self.token_file.lengths[document])
            start = position - (int(epoch.ends[place]) - length)
            count = min(length - start, len(tokens) - filled)
            tokens[filled : filled + count] = self._read(epoch_index, document, start, count)
            filled, position, place = filled + count, position + count, place + 1
        return tokens

    def _epoch(self, index: int) -> _Epoch:
        epoch = self._epochs.get(index)
        if epoch is None:
            seed = np.random.SeedSequence([self.seed, self.source_index, index])
            keys = np.random.PCG64(seed).random_raw(len(self.token_file))
            order = np.argsort(keys, kind="stable")
            epoch = _Epoch(order, np.cumsum(self.token_file.lengths[order], dtype=np.int64))
            self._epochs[index] = epoch
            if len(self._epochs) > CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(index)
        return epoch

    def _read(self, epoch: int, document: int, start: int, count: int) -> np.ndarray:
        """Part of a document, after its image and text have been put in this epoch's order."""
        if self.image_first is None or not self._may_be_pair(document):
            return self.token_file.read(document, start, count)
        whole = self.token_file.read(document)
        image_first = uniform(self.seed, self.source_index, epoch, document) < self.image_first
        return order_pair(whole, self.vocabulary, image_first)[start : start + count]

    def _may_be_pair(self, document: int) -> bool:
        """Whether an image stands at either end; saves reading long documents that are no pair."""
        if self.token_file.lengths[document] < 5:  # <s>, begin, end, one token of text, </s>
            return False
        last = int(self.token_file.lengths[document]) - 2
        return bool(
            self.token_file.read(document, 1, 1)[0] == self.vocabulary.begin_image
            or self.token_file.read(document, last, 1)[0] == self.vocabulary.end_image
        )


def order_pair(token_ids: np.ndarray, vocabulary: Vocabulary, image_first: bool) -> np.ndarray:
    """Put the image of a text-image pair before or after its text.

    Args:
        token_ids: One document, [tokens].
        vocabulary: Its tokens.
        image_first: Which of the two comes first.

    Returns:
        The document in that order, of the same length; a document that is no pair (exactly one
        image, text on exactly one side of it, between ``<s>`` and ``</s>``) is returned as it is.
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


def uniform(*key: int) -> float:
    """A number in [0, 1) that depends on nothing but the key, integers >= 0."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}Q", *key), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
