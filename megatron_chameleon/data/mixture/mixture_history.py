"""The mixtures of a run, one after the other: what a checkpoint keeps of the order of the data.

A run that is resumed with another mixture goes on with it from the sample at which it is resumed.
The history keeps each mixture with its first sample, and where each source stood then: its position
in its stream, and the parts of documents that the block in progress had taken and not used yet. So
every sample of the run can be computed again, and no document of a source is repeated or skipped by
an edit. A source is known by its name, or by its prefix if it has none: not by its place in the
list, which may change.

What the order does not depend on may change freely: the number of processes, the micro-batch, and
the global batch, whose sizes the history keeps too.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.mixture.corpus import Corpus
from megatron_chameleon.data.mixture.mixture import (
    BLOCK_SEQUENCES,
    Mixture,
    MixtureWeights,
    SourceWeight,
)
from megatron_chameleon.data.mixture.stream import Cursor, DocumentParts, SourceStream
from megatron_chameleon.errors import ConfigError, ConfigErrors
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

FORMAT = "megatron_chameleon.order/1"


@dataclass(frozen=True)
class DataSource:
    """A source of the config, opened."""

    key: str
    """Its name or prefix."""
    stage: int
    """1 or 2."""
    where: str
    """Its place in the config, for errors: ``data.stage1[0]``."""
    config: SourceConfig
    corpus: Corpus


@dataclass(frozen=True)
class SourceSnapshot:
    """A source when a mixture began."""

    prefix: str
    stream: int
    """Tells its order from those of others."""
    tokens: int
    documents: int
    image_first: float | None
    position: int = 0
    """Tokens from the start of its stream."""
    backlog: tuple[tuple[int, int, int, int], ...] = ()
    """Parts of documents that come before that position: epoch, document, start, stop."""


@dataclass(frozen=True)
class MixtureEntry:
    """One mixture of a run."""

    first_sample: int
    weights: MixtureWeights
    sources: dict[str, SourceSnapshot]
    """Also those that the mixture does not use any more."""
    block_sequences: int

    def same_mixture(self, other: "MixtureEntry") -> bool:
        """Whether both give the same samples, but for where stage 2 begins."""
        return self._what_counts() == other._what_counts()

    def _what_counts(self) -> object:
        weights = replace(self.weights, stage1_samples=0)
        used = {share.key for share in (*weights.stage1, *weights.stage2)}
        return weights, {key: self.sources[key].image_first for key in sorted(used)}


@dataclass(frozen=True)
class BatchSize:
    """From a step on, so many sequences a step."""

    first_step: int
    first_sample: int
    global_batch_size: int


@dataclass(frozen=True)
class MixtureHistory:
    """All mixtures and batch sizes of a run, the last of each being in use."""

    seed: int
    seq_length: int
    isolated: bool
    entries: tuple[MixtureEntry, ...]
    batches: tuple[BatchSize, ...]
    format: str = field(default=FORMAT)

    def first_sample(self, step: int) -> int:
        """The first sample of a step, counted from 0: what was consumed before it."""
        batch = next(b for b in reversed(self.batches) if b.first_step <= step)
        return batch.first_sample + (step - batch.first_step) * batch.global_batch_size

    def batch_size(self, step: int) -> int:
        """Sequences of a step."""
        return next(b for b in reversed(self.batches) if b.first_step <= step).global_batch_size

    def entry(self, sample: int) -> MixtureEntry:
        """The mixture that a sample belongs to."""
        return next(e for e in reversed(self.entries) if e.first_sample <= sample)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "MixtureHistory":
        """What ``to_json`` gave; ``KeyError``, ``TypeError`` or ``ValueError`` if it is not."""
        values = dict(record)
        if values["format"] != FORMAT:
            raise ValueError(f"the format is {values['format']!r}")
        values["entries"] = tuple(_entry(entry) for entry in values["entries"])
        values["batches"] = tuple(BatchSize(**batch) for batch in values["batches"])
        return cls(**values)


def begin_history(config: Config, sources: Sequence[DataSource]) -> MixtureHistory:
    """The history of a run that begins."""
    batches = (BatchSize(0, 0, config.training.global_batch_size),)
    return MixtureHistory(
        config.training.seed,
        config.model.seq_length,
        config.data.reset_attention,
        (_new_entry(config, sources, _records(sources, {}), batches, 0),),
        batches,
    )


def resume_history(
    history: MixtureHistory,
    config: Config,
    sources: Sequence[DataSource],
    step: int,
    open_mixture: Callable[[MixtureEntry], Mixture],
) -> MixtureHistory:
    """The history of a run that goes on after ``step`` updates with this config.

    Args:
        history: Of the checkpoint.
        config: As it is now.
        sources: Its sources.
        step: Updates done.
        open_mixture: Gives the samples of the mixture that was in use so far.

    Raises:
        ConfigErrors: A source is not what it was, or the order cannot go on.
    """
    _check_same_order(history, config)
    old = history.entries[-1]
    _check_sources(old, sources)
    sample = history.first_sample(step)
    batches = history.batches
    if history.batch_size(step) != config.training.global_batch_size:
        kept = (b for b in batches if b.first_step < step)
        batches = (*kept, BatchSize(step, sample, config.training.global_batch_size))
    records = _records(sources, old.sources)
    new = _new_entry(config, sources, records, batches, sample)
    border = max(new.weights.stage1_samples, sample)
    if old.weights.stage2 and sample > old.weights.stage1_samples:
        border = old.weights.stage1_samples
    if new.same_mixture(old):
        weights = replace(old.weights, stage1_samples=border)
        old = replace(old, weights=weights, sources={**old.sources, **records})
        return replace(history, entries=(*history.entries[:-1], old), batches=batches)
    cursors = open_mixture(old).cursors_at(sample)
    moved = {
        key: _at(record, cursors[key]) if key in cursors else record
        for key, record in records.items()
    }
    new = replace(new, sources=moved)
    earlier = tuple(e for e in history.entries if e.first_sample < sample)
    return replace(history, entries=(*earlier, new), batches=batches)


def open_mixture(
    history: MixtureHistory,
    entry: MixtureEntry,
    corpora: Callable[[str, SourceSnapshot], Corpus],
    vocabulary: Vocabulary,
) -> Mixture:
    """The samples of one mixture of the history.

    Args:
        history: The run's.
        entry: One of its mixtures.
        corpora: Opens the files of a source, given its key.
        vocabulary: Of the tokens.
    """
    used = {share.key: None for share in (*entry.weights.stage1, *entry.weights.stage2)}
    cursors = {}
    for key in used:
        record = entry.sources[key]
        stream = SourceStream(
            corpora(key, record),
            vocabulary,
            history.seed,
            record.stream,
            history.seq_length,
            history.isolated,
            record.image_first,
        )
        cursors[key] = Cursor(
            stream, record.position, _backlog_parts(stream.corpus, record.backlog)
        )
    return Mixture(
        entry.weights,
        cursors,
        history.seed,
        history.seq_length,
        entry.first_sample,
        entry.block_sequences,
    )


def stage1_steps(config: Config) -> int:
    """Steps of the run that belong to stage 1, if all of its batches were of one size."""
    if config.data.stage1_tokens is not None:
        tokens = config.training.global_batch_size * config.model.seq_length
        return min(config.training.steps, math.ceil(config.data.stage1_tokens / tokens))
    return round(config.training.steps * config.data.stage1_fraction)


def _new_entry(
    config: Config,
    sources: Sequence[DataSource],
    records: dict[str, SourceSnapshot],
    batches: tuple[BatchSize, ...],
    sample: int,
) -> MixtureEntry:
    data = config.data
    if data.stage1_tokens is not None:
        border = math.ceil(data.stage1_tokens / config.model.seq_length)
    else:
        last = batches[-1]
        steps = round(config.training.steps * data.stage1_fraction)
        border = last.first_sample + (steps - last.first_step) * last.global_batch_size
    stages: dict[int, list[SourceWeight]] = {1: [], 2: []}
    for source in sources:
        repeat = source.config.repeat
        epochs = None if repeat is True else max(1, int(repeat))
        stages[source.stage].append(SourceWeight(source.key, source.config.weight, epochs))
    weights = MixtureWeights(
        tuple(stages[1]),
        tuple(stages[2]),
        data.stage2_share,
        max(0, border) if data.stage2 else 0,
        data.packing_reserve,
    )
    # a small corpus needs no large blocks: they would go through it many times
    tokens = sum(source.corpus.tokens for source in sources)
    block_sequences = min(BLOCK_SEQUENCES, max(64, 8 * tokens // config.model.seq_length))
    return MixtureEntry(sample, weights, records, block_sequences)


def _records(
    sources: Sequence[DataSource], known: Mapping[str, SourceSnapshot]
) -> dict[str, SourceSnapshot]:
    """Records of all sources, known ones as they were."""
    records = dict(known)
    for source in sources:
        corpus = source.corpus
        old = records.get(source.key)
        if old is None:
            taken = {record.stream for record in records.values()}
            old = SourceSnapshot(
                corpus.prefix, _stream_of(corpus, taken), corpus.tokens, corpus.documents, None
            )
        records[source.key] = replace(
            old, prefix=corpus.prefix, image_first=source.config.image_first
        )
    return records


def _stream_of(corpus: Corpus, taken: set[int]) -> int:
    """A number that depends on what the files hold, not on where they lie or are listed."""
    number = 0
    while True:
        key = struct.pack("<4Q", corpus.tokens, corpus.documents, corpus.images, number)
        digest = hashlib.blake2b(key, digest_size=8).digest()
        stream = int.from_bytes(digest, "little") >> 12  # exact in any reader of JSON
        if stream not in taken:
            return stream
        number += 1


def _at(record: SourceSnapshot, cursor: Cursor) -> SourceSnapshot:
    parts = cursor.backlog
    columns = (parts.epoch, parts.document, parts.start, parts.stop)
    rows = np.stack(columns, axis=1).tolist()
    return replace(record, position=cursor.base, backlog=tuple(tuple(row) for row in rows))


def _backlog_parts(corpus: Corpus, backlog: Sequence[tuple[int, int, int, int]]) -> DocumentParts:
    if not backlog:
        return DocumentParts.join([])
    epoch, document, start, stop = np.array(backlog, dtype=np.int64).T
    lengths = [int(np.diff(corpus.starts(d, d + 1))[0]) for d in document.tolist()]
    flags = [bool(corpus.stay_whole(d, d + 1)[0]) for d in document.tolist()]
    return DocumentParts(epoch, document, start, stop, np.array(lengths), np.array(flags))


def _entry(record: Mapping[str, Any]) -> MixtureEntry:
    values, weights = dict(record), dict(record["weights"])
    for stage in ("stage1", "stage2"):
        weights[stage] = tuple(SourceWeight(**share) for share in weights[stage])
    values["weights"] = MixtureWeights(**weights)
    values["sources"] = {
        key: SourceSnapshot(**{**source, "backlog": tuple(map(tuple, source["backlog"]))})
        for key, source in values["sources"].items()
    }
    return MixtureEntry(**values)


def _check_same_order(history: MixtureHistory, config: Config) -> None:
    """What no mixture may change."""
    now = {
        "training.seed": (config.training.seed, history.seed),
        "model.seq_length": (config.model.seq_length, history.seq_length),
        "data.reset_attention": (config.data.reset_attention, history.isolated),
    }
    problems = [
        ConfigError(key, f"is {new} and was {old}", "Put the old value back, or train anew")
        for key, (new, old) in now.items()
        if new != old
    ]
    if problems:
        raise ConfigErrors(problems)


def _check_sources(old: MixtureEntry, sources: Sequence[DataSource]) -> None:
    """Refuse files that changed, and known files under an unknown name."""
    problems = []
    keys = {source.key for source in sources}
    gone = {key: record for key, record in old.sources.items() if key not in keys}
    for source in sources:
        corpus, record = source.corpus, old.sources.get(source.key)
        found = f"{corpus.documents:,} documents of {corpus.tokens:,} tokens"
        if record is not None and (record.tokens, record.documents) != (
            corpus.tokens,
            corpus.documents,
        ):
            what = (
                f"{corpus.prefix} holds {found}, and held {record.documents:,} of "
                f"{record.tokens:,} when the run read it"
            )
            remedy = "Put the old files back, or give the source a name of its own to start it anew"
            problems.append(ConfigError(f"{source.where}.prefix", what, remedy))
        if record is not None or source.config.name:
            continue
        for key, other in gone.items():
            if (other.tokens, other.documents) == (corpus.tokens, corpus.documents):
                what = (
                    f"{corpus.prefix} is unknown to the run, and holds the {found} that it "
                    f"knows as {key}"
                )
                remedy = f"Add `name: {key}` to go on in it, or another name to start it anew"
                problems.append(ConfigError(f"{source.where}.prefix", what, remedy))
    if problems:
        raise ConfigErrors(problems)
