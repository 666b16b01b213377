"""One held-out source: which of its documents are measured, and in which sequences."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.mixture.block_items import cut_long_parts
from megatron_chameleon.data.mixture.packing import PackedSequences
from megatron_chameleon.data.mixture.sources import DataSource
from megatron_chameleon.data.mixture.stream import Cursor, DocumentParts, SourceStream
from megatron_chameleon.data.validation.packing import pack_in_order

BLOCK_DOCUMENTS = 1 << 14
"""How many consecutive documents are packed together, so that memory does not grow with the file.
The sequences depend on it."""


@dataclass(frozen=True)
class HeldOutSource:
    """A source that is open."""

    name: str
    """As in the metrics, ``validation/NAME/loss``."""
    source: DataSource
    """Its place in the config and its files."""
    stream: SourceStream
    """The order of its text-image pairs, and where its documents may be cut."""
    max_tokens: int | None
    """About how many tokens are measured; None for all."""

    @property
    def documents(self) -> int:
        """How many documents are measured, before those that cannot be are left out."""
        corpus = self.source.corpus
        if self.max_tokens is None or self.max_tokens >= corpus.tokens:
            return corpus.documents
        return max(1, corpus.documents * self.max_tokens // corpus.tokens)

    def sequences(self) -> Iterator[PackedSequences]:
        """The sequences in their order, which depends on the files and the config only."""
        for first in range(0, self.source.corpus.documents, BLOCK_DOCUMENTS):
            stop = min(first + BLOCK_DOCUMENTS, self.source.corpus.documents)
            parts = self._parts(first, stop)
            flows = ~parts.stays_whole & (not self.stream.isolated)
            length = self.stream.seq_length
            parts, flows = cut_long_parts(parts, flows, Cursor(self.stream), length)
            packed = pack_in_order(parts, flows, length)
            yield from map(packed.of, range(packed.sequences))

    def _parts(self, first: int, stop: int) -> DocumentParts:
        """The documents of a block that are measured.

        As in training, conversations that are longer than a sequence are left out.
        """
        corpus, total = self.source.corpus, self.source.corpus.documents
        lengths = np.diff(corpus.starts(first, stop))
        # Document d is taken where the number of documents to take up to d grows.
        taken = np.arange(first, stop + 1) * self.documents // total
        kept = (np.diff(taken) > 0) & (lengths > 0)
        if corpus.longest_conversation > self.stream.seq_length:
            is_long = lengths > self.stream.seq_length
            kept &= ~(is_long & corpus.are_conversations(first, stop))
        documents, zeros = np.arange(first, stop), np.zeros_like(lengths)
        flags = corpus.stay_whole(first, stop)
        return DocumentParts(zeros, documents, zeros, lengths, lengths, flags).take(kept)
