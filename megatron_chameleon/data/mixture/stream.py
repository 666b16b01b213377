"""The endless stream of one source: its documents, shuffled again for each epoch, by position.

A position is a number of tokens from the start of the stream; each epoch has as many as the corpus.
The documents between two positions are found without going through those before them:

1. The corpus is cut into chunks of ``CHUNK_TOKENS`` in the order of the file. Chunk j begins after
   the document that holds token j * CHUNK_TOKENS (or at that token, if the document may be cut
   there), so one binary search in the .idx finds it.
2. Each epoch takes the chunks in an order of its own, a keyed permutation that needs no memory
   (``permutation.py``). The last chunk, which is shorter, comes last.
3. About ``WINDOW_CHUNKS`` consecutive chunks of that order make a shuffle window. Its documents,
   which come from as many places of the corpus, are shuffled among each other. Only the windows in
   use are in memory, with 40 bytes per document.

If all documents were shuffled together, a position could only be found through the sum of all
lengths before it, which takes a table of the size of the corpus for each epoch. Here that sum is
known, apart from the documents that straddle the borders of chunks. A window therefore holds a few
documents' tokens more or less than its share, and positions inside it are stretched accordingly (by
0.03% for documents of 1,000 tokens). A corpus of one window is exact.

A position in the middle of a document is moved to where the document may be cut. A document that is
only text and may flow from one sequence to the next can be cut anywhere. One that is longer than a
sequence is cut at text, never inside an image. For any other document the position moves to its
nearer end.

A conversation is never cut, because an answer without its question teaches nothing. Conversations
that are longer than a sequence are left out.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.mixture.corpus import Corpus, OrderedDocuments
from megatron_chameleon.data.mixture.permutation import Permutation, shuffled
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

CHUNK_TOKENS = 1 << 18
WINDOW_CHUNKS = 64
_CACHED_WINDOWS = 3

_CHUNK_ORDER, _DOCUMENT_ORDER, _PAIR_ORDER = 1, 2, 3
"""The uses of random numbers: no two of them share a key."""


@dataclass(frozen=True)
class DocumentParts:
    """Documents or parts of them, in order; all arrays are [parts]."""

    epoch: np.ndarray
    """int64."""
    document: np.ndarray
    """int64."""
    start: np.ndarray
    """First token within the document, int64."""
    stop: np.ndarray
    """The token after the last, int64."""
    length: np.ndarray
    """Tokens of the whole document, int64."""
    stays_whole: np.ndarray
    """Whether the document must not be cut because it has images or is a conversation; bool."""

    def __len__(self) -> int:
        return len(self.document)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each part, int64."""
        return self.stop - self.start

    def take(self, chosen: np.ndarray | slice) -> "DocumentParts":
        """The chosen parts, in the order of the choice."""
        return DocumentParts(*(array[chosen] for array in vars(self).values()))

    def between(self, first: tuple[int, int], last: tuple[int, int]) -> "DocumentParts":
        """The parts between two cuts; a cut is the index of a part and a token inside that part."""
        (index, inside), (last_index, last_inside) = first, last
        chosen = self.take(slice(index, last_index + (last_inside > 0)))
        start, stop = chosen.start.copy(), chosen.stop.copy()
        if last_inside:
            stop[-1] = start[-1] + last_inside
        if len(chosen):
            start[0] += inside
        chosen = DocumentParts(
            chosen.epoch, chosen.document, start, stop, chosen.length, chosen.stays_whole
        )
        return chosen.take(start < stop)

    @classmethod
    def join(cls, groups: "list[DocumentParts]") -> "DocumentParts":
        """All parts of all groups, in order; no parts if there are no groups."""
        groups = [chosen for chosen in groups if len(chosen)]
        if len(groups) == 1:
            return groups[0]
        if not groups:
            none = np.zeros(0, dtype=np.int64)
            return cls(none, none, none, none, none, none.astype(bool))
        return cls(*(np.concatenate(arrays) for arrays in zip(*map(_arrays, groups), strict=True)))


def _arrays(parts: DocumentParts) -> list[np.ndarray]:
    return list(vars(parts).values())


@dataclass(frozen=True, order=True)
class Cut:
    """A place at which a stream may be cut; places of the same stream can be compared."""

    epoch: int
    window: int
    index: int
    inside: int


@dataclass(frozen=True)
class _ShuffleWindow:
    parts: DocumentParts
    ends: np.ndarray
    """Tokens of the window up to the end of each part, int64."""


class SourceStream:
    """The stream of one corpus.

    Args:
        corpus: The documents.
        vocabulary: Their tokens.
        seed: Seed of the run, >= 0.
        stream: Distinguishes sources of the same corpus and seed; an integer in [0, 2^63).
        seq_length: Tokens of a training sequence.
        isolated: Whether text that fits into a sequence must stay whole.
        image_first: See ``OrderedDocuments``.
        chunk_tokens: Smallest number of tokens of a chunk.
        window_chunks: Largest number of chunks of a shuffle window.
    """

    def __init__(
        self,
        corpus: Corpus,
        vocabulary: Vocabulary,
        seed: int,
        stream: int,
        seq_length: int,
        isolated: bool = False,
        image_first: float | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        window_chunks: int = WINDOW_CHUNKS,
    ) -> None:
        self.corpus = corpus
        self.stream = stream
        self.seq_length = seq_length
        self.isolated = isolated
        self._key = (seed, stream)
        self.documents = OrderedDocuments(
            corpus, vocabulary, image_first, (*self._key, _PAIR_ORDER)
        )
        # A chunk has room for many documents that must stay whole, so that no window is empty.
        self._chunk_tokens = max(chunk_tokens, 16 * seq_length)
        self._chunks = -(-corpus.tokens // self._chunk_tokens)
        self._windows = -(-self._chunks // window_chunks)
        self._cache: OrderedDict[tuple[int, int], _ShuffleWindow] = OrderedDict()

    @property
    def is_exact(self) -> bool:
        """Whether the stream can be cut at any position."""
        corpus = self.corpus
        return not self.isolated and corpus.images == 0 and corpus.longest_conversation == 0

    @property
    def leaves_out(self) -> bool:
        """Whether some conversations are left out because they are longer than a sequence."""
        return self.corpus.longest_conversation > self.seq_length

    def cut(self, position: int) -> Cut:
        """Find the place of a position, moved to where documents may be cut.

        Args:
            position: Tokens from the start of the stream, >= 0; there is no upper bound.
        """
        epoch, place = divmod(position, self.corpus.tokens)
        chunk = place // self._chunk_tokens
        window = chunk * self._windows // self._chunks
        while place >= self._window_start(window + 1):
            window += 1
        begin, end = self._window_start(window), self._window_start(window + 1)
        content = self._window(epoch, window)
        tokens = int(content.ends[-1]) if len(content.ends) else 0
        stretched = (place - begin) * tokens // (end - begin)
        index, inside = self.nearest_cut(content.parts, content.ends, stretched)
        return Cut(epoch, window, index, inside)

    def between(self, first: Cut, last: Cut) -> DocumentParts:
        """The document parts from one cut to a later one."""
        groups, epoch, window = [], first.epoch, first.window
        begin = (first.index, first.inside)
        while (epoch, window) < (last.epoch, last.window):
            parts = self._window(epoch, window).parts
            groups.append(parts.between(begin, (len(parts), 0)))
            begin = (0, 0)
            epoch, window = (epoch, window + 1) if window + 1 < self._windows else (epoch + 1, 0)
        parts = self._window(epoch, window).parts
        groups.append(parts.between(begin, (last.index, last.inside)))
        return DocumentParts.join(groups)

    def nearest_cut(self, parts: DocumentParts, ends: np.ndarray, token: int) -> tuple[int, int]:
        """Find the cut that is nearest to a token.

        Args:
            parts: Consecutive parts of the stream.
            ends: Tokens up to the end of each part; int64 [parts].
            token: Counted from the start of the first part.

        Returns:
            Index of a part, and a token inside that part.
        """
        index = int(np.searchsorted(ends, token, side="right"))
        if index == len(parts):
            return index, 0
        length = int(parts.stop[index] - parts.start[index])
        inside = token - (int(ends[index]) - length)
        if inside == 0 or (not self.isolated and not parts.stays_whole[index]):
            return index, inside
        if length <= self.seq_length:
            return (index, 0) if 2 * inside < length else (index + 1, 0)
        part = parts.take(slice(index, index + 1))
        return index, self.last_cut(part, inside)

    def last_cut(self, part: DocumentParts, inside: int) -> int:
        """Find the last place up to ``inside`` where a document may be cut as a last resort.

        Args:
            part: A single part.
            inside: Tokens from the start of the part, at most its length.

        Returns:
            Tokens from the start of the part; 0 if there is no such place.
        """
        if not part.stays_whole[0]:
            return inside
        spans = self.documents.spans(int(part.epoch[0]), int(part.document[0]))
        start = int(part.start[0])
        within = (spans[:, 0] < start + inside) & (start + inside < spans[:, 1])
        return max(0, int(spans[within, 0][0]) - start) if within.any() else inside

    def _window_start(self, window: int) -> int:
        """The position of a shuffle window within its epoch."""
        chunks = window * self._chunks // self._windows
        return min(chunks * self._chunk_tokens, self.corpus.tokens)

    def _window(self, epoch: int, window: int) -> _ShuffleWindow:
        found = self._cache.get((epoch, window))
        if found is None:
            first, stop = (w * self._chunks // self._windows for w in (window, window + 1))
            chunks = np.arange(first, stop)
            if self._chunks > 1:
                order = Permutation(self._chunks - 1, *self._key, _CHUNK_ORDER, epoch)
                equal = chunks < self._chunks - 1
                chunks[equal] = order(chunks[equal])
            parts = DocumentParts.join([self._chunk(epoch, chunk) for chunk in chunks.tolist()])
            mixed = shuffled(len(parts), *self._key, _DOCUMENT_ORDER, epoch, window)
            parts = parts.take(mixed)
            found = _ShuffleWindow(parts, np.cumsum(parts.tokens))
            self._cache[epoch, window] = found
            if len(self._cache) > _CACHED_WINDOWS:
                self._cache.popitem(last=False)
        self._cache.move_to_end((epoch, window))
        return found

    def _chunk(self, epoch: int, chunk: int) -> DocumentParts:
        """The documents of a chunk in the order of the file."""
        (first, inside), (last, last_inside) = (
            self._chunk_border(epoch, border) for border in (chunk, chunk + 1)
        )
        stop = last + (last_inside > 0)
        lengths = np.diff(self.corpus.starts(first, stop))
        documents = np.arange(first, stop)
        starts, stops = np.zeros_like(lengths), lengths.copy()
        if last_inside:
            stops[-1] = last_inside
        if inside and stop > first:
            starts[0] = inside
        flags = self.corpus.stay_whole(first, stop)
        parts = DocumentParts(
            np.full_like(documents, epoch), documents, starts, stops, lengths, flags
        )
        kept = starts < stops  # leaves out empty documents
        if self.leaves_out:
            too_long = lengths > self.seq_length
            kept &= ~(too_long & self.corpus.are_conversations(first, stop))
        return parts.take(kept)

    def _chunk_border(self, epoch: int, chunk: int) -> tuple[int, int]:
        """The document and the token inside it with which a chunk begins."""
        corpus = self.corpus
        if chunk in (0, self._chunks):
            return (0 if chunk == 0 else corpus.documents), 0
        token = chunk * self._chunk_tokens
        document = corpus.at(token)
        start, stop = corpus.starts(document, document + 1).tolist()
        inside, length = token - start, stop - start
        if inside == 0:
            return document, 0
        stays_whole = corpus.stay_whole(document, document + 1)
        if not stays_whole[0] and not self.isolated:
            return document, inside
        if length <= self.seq_length:
            return document + 1, 0
        one = np.array([document])
        zero = np.zeros_like(one)
        part = DocumentParts(zero + epoch, one, zero, zero + length, zero + length, stays_whole)
        return document, self.last_cut(part, inside)


class Cursor:
    """A stream from some position on, preceded by parts that were taken earlier but not used.

    Args:
        stream: The stream.
        base: The position at which it continues.
        backlog: The parts that come first.
    """

    def __init__(
        self, stream: SourceStream, base: int = 0, backlog: DocumentParts | None = None
    ) -> None:
        self.stream = stream
        self.base = base
        self.backlog = DocumentParts.join([]) if backlog is None else backlog
        self._ends = np.cumsum(self.backlog.tokens)
        self.backlog_tokens = int(self._ends[-1]) if len(self._ends) else 0

    def tokens_left(self, epochs: int | float) -> int:
        """Number of tokens until the stream has given so many epochs."""
        last = round(epochs * self.stream.corpus.tokens)
        return max(0, self.backlog_tokens + last - self.base)

    def parts(self, first: int, last: int) -> DocumentParts:
        """The document parts between two positions, which count from the cursor."""
        (begin, begin_cut), (end, end_cut) = self._cut(first), self._cut(last)
        groups = [self.backlog.between(begin, end)]
        if end_cut is not None:
            begin_cut = self.stream.cut(self.base) if begin_cut is None else begin_cut
            groups.append(self.stream.between(begin_cut, end_cut))
        return DocumentParts.join(groups)

    def moved(self, position: int, unused: DocumentParts) -> "Cursor":
        """The cursor after ``position``, with a backlog of parts that were taken but not used."""
        index, cut = self._cut(position)
        base = self.base if cut is None else self.base + position - self.backlog_tokens
        rest = self.backlog.between(index, (len(self.backlog), 0))
        return Cursor(self.stream, base, DocumentParts.join([unused, rest]))

    def _cut(self, position: int) -> tuple[tuple[int, int], Cut | None]:
        """The place of a position in the backlog, and in the stream if it lies beyond that."""
        if position < self.backlog_tokens:
            return self.stream.nearest_cut(self.backlog, self._ends, position), None
        cut = self.stream.cut(self.base + position - self.backlog_tokens)
        return (len(self.backlog), 0), cut
