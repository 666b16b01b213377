"""The data sources of a run: as the config lists them, and as a checkpoint remembers them.

A source is recognized by its name, or by its prefix if it has no name, and not by its place in the
list, which may change. The order of its documents depends on what its files hold, not on where they
lie.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_chameleon.config.schema import SourceConfig
from megatron_chameleon.data.mixture.corpus import Corpus
from megatron_chameleon.data.mixture.stream import Cursor, DocumentParts
from megatron_chameleon.errors import ConfigError, ConfigErrors


@dataclass(frozen=True)
class DataSource:
    """A data source of the config, opened."""

    key: str
    """Its name or prefix."""
    stage: int
    """The stage that lists it, 1 or 2."""
    where: str
    """Its place in the config, for errors: ``data.stage1[0]``."""
    config: SourceConfig
    corpus: Corpus
    share: float = 1.0
    """Its weight among the sources of its stage, in what ``data.weights_by`` names."""
    tokens_per_unit: float = 1.0
    """Tokens of the stream for each unit of that: 1 for tokens, the mean length for samples."""
    epochs: int | float | None = None
    """How often its documents may be read at most; None for no limit."""

    @property
    def weight(self) -> float:
        """Its weight in tokens."""
        return self.share * self.tokens_per_unit


def stage2_token_share(sources: Sequence[DataSource], share: float) -> float:
    """The share of the tokens of stage 2 that its own sources have.

    Args:
        sources: All sources.
        share: Their share of what ``data.weights_by`` names.
    """
    if all(source.tokens_per_unit == 1 for source in sources):
        return share
    tokens = {}
    for stage, part in ((1, 1 - share), (2, share)):
        of_stage = [source for source in sources if source.stage == stage]
        total = sum(source.share for source in of_stage)
        tokens[stage] = part * sum(source.weight for source in of_stage) / max(total, 1e-300)
    return tokens[2] / (tokens[1] + tokens[2])


@dataclass(frozen=True)
class SourceSnapshot:
    """A data source at the moment when a mixture began; a checkpoint stores it as JSON."""

    prefix: str
    stream: int
    """Distinguishes the order of its documents from that of other sources."""
    tokens: int
    documents: int
    image_first: float | None
    position: int = 0
    """Tokens from the start of its stream."""
    backlog: tuple[tuple[int, int, int, int], ...] = ()
    """Document parts that come before that position: epoch, document, start, stop."""


def take_snapshots(
    sources: Sequence[DataSource], known: Mapping[str, SourceSnapshot]
) -> dict[str, SourceSnapshot]:
    """Record all sources; those that the run knows already stay where they are.

    Args:
        sources: The sources of the config.
        known: Snapshots of the run so far, by key.

    Returns:
        Snapshots of both, by key.
    """
    snapshots = dict(known)
    for source in sources:
        corpus = source.corpus
        old = snapshots.get(source.key)
        if old is None:
            taken = {snapshot.stream for snapshot in snapshots.values()}
            stream = _stream_number(corpus, taken)
            old = SourceSnapshot(corpus.prefix, stream, corpus.tokens, corpus.documents, None)
        snapshots[source.key] = replace(
            old, prefix=corpus.prefix, image_first=source.config.image_first
        )
    return snapshots


def _stream_number(corpus: Corpus, taken: set[int]) -> int:
    """A number that depends on what the files hold, not on where they lie or are listed."""
    number = 0
    while True:
        key = struct.pack("<4Q", corpus.tokens, corpus.documents, corpus.images, number)
        digest = hashlib.blake2b(key, digest_size=8).digest()
        # 52 bits, which every reader of JSON keeps exactly
        stream = int.from_bytes(digest, "little") >> 12
        if stream not in taken:
            return stream
        number += 1


def move_snapshot(snapshot: SourceSnapshot, cursor: Cursor) -> SourceSnapshot:
    """The snapshot with the position and the backlog of a cursor."""
    parts = cursor.backlog
    columns = (parts.epoch, parts.document, parts.start, parts.stop)
    rows = np.stack(columns, axis=1).tolist()
    return replace(snapshot, position=cursor.base, backlog=tuple(tuple(row) for row in rows))


def read_backlog(corpus: Corpus, backlog: Sequence[tuple[int, int, int, int]]) -> DocumentParts:
    """The document parts that a snapshot lists."""
    if not backlog:
        return DocumentParts.join([])
    epoch, document, start, stop = np.array(backlog, dtype=np.int64).T
    lengths = [int(np.diff(corpus.starts(d, d + 1))[0]) for d in document.tolist()]
    flags = [bool(corpus.stay_whole(d, d + 1)[0]) for d in document.tolist()]
    return DocumentParts(epoch, document, start, stop, np.array(lengths), np.array(flags))


def check_known_sources(known: Mapping[str, SourceSnapshot], sources: Sequence[DataSource]) -> None:
    """Refuse files that have changed, and known files under an unknown name.

    Args:
        known: Snapshots of the run so far, by key.
        sources: The sources of the config.

    Raises:
        ConfigErrors: All such sources.
    """
    problems: list[ConfigError] = []
    keys = {source.key for source in sources}
    unlisted = {key: snapshot for key, snapshot in known.items() if key not in keys}
    for source in sources:
        snapshot = known.get(source.key)
        if snapshot is not None:
            problems += _changed(source, snapshot)
        elif not source.config.name:
            problems += _renamed(source, unlisted)
    if problems:
        raise ConfigErrors(problems)


def _changed(source: DataSource, snapshot: SourceSnapshot) -> Iterator[ConfigError]:
    """The error for files that hold something else than when the run read them."""
    corpus = source.corpus
    if (snapshot.tokens, snapshot.documents) != (corpus.tokens, corpus.documents):
        what = (
            f"{corpus.prefix} holds {corpus.documents:,} documents of {corpus.tokens:,} tokens, "
            f"but held {snapshot.documents:,} of {snapshot.tokens:,} when the run read it"
        )
        remedy = "Put the old files back, or give the source a new name to read it from the start"
        yield ConfigError(f"{source.where}.prefix", what, remedy)


def _renamed(source: DataSource, unlisted: Mapping[str, SourceSnapshot]) -> Iterator[ConfigError]:
    """The errors for a source without a name that holds as much as one that is not listed now."""
    corpus = source.corpus
    for key, snapshot in unlisted.items():
        if (snapshot.tokens, snapshot.documents) == (corpus.tokens, corpus.documents):
            what = (
                f"{corpus.prefix} is new to the run, but holds the same {corpus.documents:,} "
                f"documents of {corpus.tokens:,} tokens as {key}, which is no longer listed"
            )
            remedy = f"Add `name: {key}` to continue with it, or a new name to read it from the "
            remedy += "start"
            yield ConfigError(f"{source.where}.prefix", what, remedy)
