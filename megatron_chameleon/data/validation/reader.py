"""Held-out micro-batches: the same documents each time, each of them once, dealt out to the ranks.

    reader = HeldOutReader(config, tokenizer)
    with reader.read_ahead(data_rank, data_size, multiple) as chunks:
        for chunk in chunks:                      # a list of (number of the source, micro-batch)

Each micro-batch holds sequences of one source, so that the loss of each source can be told. The
last one of a source may have fewer; the rest of it, and the micro-batches that some ranks get so
that all have as many, are padding without a label that counts.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.batch import make_batch, read_sample
from megatron_chameleon.data.batches.loss_on import check_loss_on, source_warnings
from megatron_chameleon.data.batches.open_sources import open_listed
from megatron_chameleon.data.batches.pairs import ReferenceTables
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.data.mixture.packing import PackedSequences
from megatron_chameleon.data.mixture.sources import DataSource
from megatron_chameleon.data.mixture.stream import DocumentParts, SourceStream
from megatron_chameleon.data.validation.same_documents import warn_of_same
from megatron_chameleon.data.validation.source import HeldOutSource
from megatron_chameleon.errors import ChameleonError, ConfigErrors
from megatron_chameleon.tokenizer.folder import Tokenizer

CHUNK_MICRO_BATCHES = 8
"""How many micro-batches of a rank are in memory together."""

T = TypeVar("T")

Chunk = list[tuple[int, Batch]]
"""Micro-batches of one rank with the numbers of their sources."""


class HeldOutReader:
    """Opens the sources of ``data.validation``.

    Args:
        config: A checked config; data, model.seq_length and training.micro_batch_size are read.
        tokenizer: The tokenizer that the token files were written with.
        where: What errors call the list of sources.

    Attributes:
        sources: In the order of the config.
        references: See ``BatchReader``; by the names of the sources.

    Raises:
        ConfigErrors: Some sources cannot be used; it names all of them.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, where: str = "data.validation.sources"
    ) -> None:
        self.config, self._vocabulary = config, tokenizer.vocabulary
        validation = config.data.validation
        listed = [SourceConfig(s.prefix, 1.0, s.image_first, False) for s in validation.sources]
        opened, problems = open_listed(where, 0, listed, config.model.seq_length, tokenizer)
        if problems:
            raise ConfigErrors(problems)
        check_loss_on(config, opened)
        names = _names([s.name or Path(s.prefix).name for s in validation.sources])
        self.sources = [
            HeldOutSource(name, source, self._stream(source), validation.max_tokens)
            for name, source in zip(names, opened, strict=True)
        ]
        self.references: ReferenceTables | None = None
        self._documents = [source.stream.documents for source in self.sources]

    def _stream(self, source: DataSource) -> SourceStream:
        """Cuts documents and orders pairs as training does, but the same for every seed."""
        return SourceStream(
            source.corpus,
            self._vocabulary,
            seed=0,
            stream=0,
            seq_length=self.config.model.seq_length,
            isolated=bool(self.config.data.reset_attention),
            image_first=source.config.image_first,
        )

    @property
    def names(self) -> list[str]:
        """The sources' names in the metrics."""
        return [source.name for source in self.sources]

    def warnings(self, trained: Sequence[DataSource]) -> list[str]:
        """What the owner should know, one line each.

        Args:
            trained: The sources that the run is trained on.
        """
        opened = [source.source for source in self.sources]
        return [*warn_of_same(opened, trained), *source_warnings(self.config, opened)]

    @contextmanager
    def read_ahead(
        self, data_rank: int, data_size: int, multiple: int = 1
    ) -> Iterator[Iterator[Chunk]]:
        """Read one rank's micro-batches chunk by chunk, each while the one before it is computed.

        Every rank gets as many chunks, and as many micro-batches in each.

        Args:
            data_rank: In [0, data_size).
            data_size: Number of ranks that share the documents.
            multiple: The number of micro-batches of a chunk is a multiple of it.
        """
        chunks = self._chunks(data_rank, data_size, multiple)
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="held-out")

        def ahead() -> Iterator[Chunk]:
            following = pool.submit(next, chunks, None)
            while (chunk := following.result()) is not None:
                following = pool.submit(next, chunks, None)
                yield chunk

        try:
            yield ahead()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def chunk_sequences(self, data_size: int, multiple: int = 1) -> int:
        """How many sequences the chunks of all ranks hold together, with the padding."""
        return _micro_batches(multiple) * data_size * self.config.training.micro_batch_size

    def _chunks(self, data_rank: int, data_size: int, multiple: int) -> Iterator[Chunk]:
        together, size = self.config.training.micro_batch_size, _micro_batches(multiple)
        groups = (
            (number, group)
            for number, source in enumerate(self.sources)
            for group in _batched(source.sequences(), together)
        )
        for dealt in _batched(groups, size * data_size):
            own = dealt[data_rank::data_size]
            most = -(-len(dealt) // data_size)
            own += [(0, [])] * (-(-most // multiple) * multiple - len(own))
            yield [(number, self._batch(number, group)) for number, group in own]

    def _batch(self, number: int, group: Sequence[PackedSequences]) -> Batch:
        """The sequences of a micro-batch, filled up with empty ones."""
        none = DocumentParts.join([])
        empty = PackedSequences(none, none.document, none.document, 1)
        missing = self.config.training.micro_batch_size - len(group)
        samples = [
            read_sample(
                packed,
                self._documents[number : number + 1],
                self.names[number : number + 1],
                self.config.model.seq_length,
                self._vocabulary,
                answers_only=self.config.data.loss_on != "all",
                paired=self.config.training.objective == "dpo",
                references=self.references,
            )
            for packed in [*group, *[empty] * missing]
        ]
        isolated = bool(self.config.data.reset_attention)
        return make_batch(samples, self._vocabulary, isolated=isolated)


def next_or_failure(chunks: Iterator[Chunk]) -> tuple[Chunk | None, ChameleonError | None]:
    """The next chunk, None after the last one, and why it cannot be read.

    A rank that fails must tell the others before it raises, or they would wait for it.
    """
    try:
        return next(chunks, None), None
    except ChameleonError as error:
        return None, error


def _micro_batches(multiple: int) -> int:
    """Micro-batches of a chunk on one rank."""
    return -(-CHUNK_MICRO_BATCHES // multiple) * multiple


def _batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while group := list(itertools.islice(items, size)):
        yield group


def _names(wanted: Sequence[str]) -> list[str]:
    """The names, with a number where two sources would have the same."""
    found: list[str] = []
    for name in wanted:
        unique, number = name, 1
        while unique in found:
            number += 1
            unique = f"{name}#{number}"
        found.append(unique)
    return found
