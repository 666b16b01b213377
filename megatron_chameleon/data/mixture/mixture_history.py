"""The mixtures of a run, one after the other: what a checkpoint keeps of the order of the data.

A run that is resumed with another mixture uses the new one from the sample at which it is resumed.
The history keeps each mixture with its first sample, and where each source stood then: its position
in its stream, and the document parts that the block in progress had taken but not used yet. So
every sample of the run can be computed again, and an edit repeats or skips no document of a source.

The number of processes and the micro-batch size may change freely, because the order does not
depend on them. Neither does it depend on the global batch size, but the history keeps each size
that the run has had, because they tell which samples belong to a step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.mixture.corpus import Corpus
from megatron_chameleon.data.mixture.mixture import (
    BLOCK_SEQUENCES,
    ORDER_VERSION,
    Mixture,
)
from megatron_chameleon.data.mixture.phases import MixtureWeights, SourceWeight
from megatron_chameleon.data.mixture.sources import (
    DataSource,
    SourceSnapshot,
    check_known_sources,
    move_snapshot,
    read_backlog,
    stage2_token_share,
    take_snapshots,
)
from megatron_chameleon.data.mixture.stream import Cursor, SourceStream
from megatron_chameleon.errors import ConfigError, ConfigErrors
from megatron_chameleon.schedules.batch_sizes import (
    BatchSize,
    batch_of,
    continue_batches,
    plan_batches,
    samples_before,
    steps_before,
)
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

FORMAT = "megatron_chameleon.order/1"


@dataclass(frozen=True)
class MixtureEntry:
    """One mixture of a run."""

    first_sample: int
    weights: MixtureWeights
    sources: dict[str, SourceSnapshot]
    """By key, including those that the mixture no longer uses."""
    block_sequences: int
    order_version: int = 1
    """Of ``mixture.py``; checkpoints of version 1 do not name it."""

    def same_mixture(self, other: "MixtureEntry") -> bool:
        """Whether both give the same samples, apart from where stage 2 begins."""
        return self._what_counts() == other._what_counts()

    def _what_counts(self) -> object:
        weights = replace(self.weights, stage1_samples=0)
        used = {source.key for source in (*weights.stage1, *weights.stage2)}
        return weights, {key: self.sources[key].image_first for key in sorted(used)}


@dataclass(frozen=True)
class MixtureHistory:
    """All mixtures and batch sizes of a run; the last of each is in use."""

    seed: int
    seq_length: int
    isolated: bool
    """Whether attention ends at the borders of documents."""
    entries: tuple[MixtureEntry, ...]
    batches: tuple[BatchSize, ...]
    lr_warmup_begin: int = 0
    """See ``LearningRate.warmup_begin``; histories of earlier versions do not have it. It is kept
    here because every conversion of a checkpoint keeps the history."""
    format: str = field(default=FORMAT)

    def first_sample(self, steps_done: int) -> int:
        """The first sample of the step after ``steps_done`` steps: the samples consumed by them."""
        return samples_before(self.batches, steps_done)

    def steps_before(self, sample: int) -> int:
        """Number of steps whose first sample comes before a sample."""
        return steps_before(self.batches, sample)

    def batch_size(self, steps_done: int) -> int:
        """Number of sequences of the step after ``steps_done`` steps."""
        return batch_of(self.batches, steps_done).global_batch_size

    def entry(self, sample: int) -> MixtureEntry:
        """The mixture that a sample belongs to."""
        return next(e for e in reversed(self.entries) if e.first_sample <= sample)

    def to_json(self) -> dict[str, Any]:
        """The history as a checkpoint stores it."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "MixtureHistory":
        """Read what ``to_json`` returned.

        Raises:
            KeyError, TypeError or ValueError: The record is something else.
        """
        values = dict(record)
        if values["format"] != FORMAT:
            raise ValueError(f"the format is {values['format']!r}")
        values["entries"] = tuple(_entry_from_json(entry) for entry in values["entries"])
        values["batches"] = tuple(BatchSize(**batch) for batch in values["batches"])
        history = cls(**values)
        _check_values(history)
        return history


def _entry_from_json(record: Mapping[str, Any]) -> MixtureEntry:
    values, weights = dict(record), dict(record["weights"])
    for stage in ("stage1", "stage2"):
        weights[stage] = tuple(SourceWeight(**source) for source in weights[stage])
    values["weights"] = MixtureWeights(**weights)
    values["sources"] = {
        key: SourceSnapshot(**{**source, "backlog": tuple(map(tuple, source["backlog"]))})
        for key, source in values["sources"].items()
    }
    return MixtureEntry(**values)


def _check_values(history: MixtureHistory) -> None:
    """Refuse values that no run writes. A checkpoint's files may come from anywhere.

    Raises:
        TypeError or ValueError: One of them is wrong.
    """
    _check_counts(history, seed=0, seq_length=1, lr_warmup_begin=0)
    if history.lr_warmup_begin > 1:
        raise ValueError(f"lr_warmup_begin is {history.lr_warmup_begin}, not 0 or 1")
    if type(history.isolated) is not bool:
        raise TypeError(f"isolated is {history.isolated!r}")
    for batch in history.batches:
        _check_counts(batch, first_step=0, first_sample=0, global_batch_size=1)
    for entry in history.entries:
        _check_counts(entry, first_sample=0, block_sequences=1, order_version=1)
        if entry.order_version > ORDER_VERSION:
            raise ValueError(f"it has version {entry.order_version}; {ORDER_VERSION} is known")
        _check_counts(entry.weights, stage1_samples=0)
        _check_share("stage2_share", entry.weights.stage2_share)
        _check_share("reserve", entry.weights.reserve)
        if not entry.weights.stage1:
            raise ValueError("a mixture has no source")
        for source in (*entry.weights.stage1, *entry.weights.stage2):
            if source.key not in entry.sources:
                raise ValueError(f"nothing is known of the source {source.key!r}")
            _check_number("weight", source.weight)
            if source.weight == 0:
                raise ValueError(f"the source {source.key!r} has the weight 0")
            if source.epochs is not None:
                _check_number("epochs", source.epochs)
        for snapshot in entry.sources.values():
            _check_snapshot(snapshot)
    starts = [
        [batch.first_step for batch in history.batches],
        [batch.first_sample for batch in history.batches],
        [entry.first_sample for entry in history.entries],
    ]
    if any(numbers[:1] != [0] or numbers != sorted(numbers) for numbers in starts):
        raise ValueError("its mixtures or batch sizes do not follow each other")


def _check_snapshot(snapshot: SourceSnapshot) -> None:
    if not isinstance(snapshot.prefix, str):
        raise TypeError(f"prefix is {snapshot.prefix!r}")
    _check_counts(snapshot, stream=0, tokens=0, documents=0, position=0)
    if snapshot.image_first is not None:
        _check_share("image_first", snapshot.image_first)
    for part in snapshot.backlog:
        if len(part) != 4 or any(type(number) is not int or number < 0 for number in part):
            raise ValueError(f"{part} is not an epoch, a document, a start and a stop")


def _check_counts(owner: object, **least: int) -> None:
    for name, lowest in least.items():
        value = getattr(owner, name)
        if type(value) is not int or not lowest <= value < 1 << 63:
            raise ValueError(f"{name} is {value!r}, not a whole number from {lowest} on")


def _check_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}, not a number from 0 on")


def _check_share(name: str, value: Any) -> None:
    _check_number(name, value)
    if value > 1:
        raise ValueError(f"{name} is {value!r}, above 1")


def begin_history(config: Config, sources: Sequence[DataSource]) -> MixtureHistory:
    """Begin the history of a new run.

    Args:
        config: Of the run.
        sources: Its data sources.
    """
    batches = plan_batches(config.training)
    return MixtureHistory(
        config.training.seed,
        config.model.seq_length,
        bool(config.data.reset_attention),
        (_new_entry(config, sources, take_snapshots(sources, {}), batches, 0),),
        batches,
        lr_warmup_begin=1,
    )


def resume_history(
    history: MixtureHistory,
    config: Config,
    sources: Sequence[DataSource],
    steps_done: int,
    open_mixture: Callable[[MixtureEntry], Mixture],
) -> MixtureHistory:
    """Continue the history of a run that resumes after some steps with this config.

    Args:
        history: The history in the checkpoint.
        config: The config as it is now.
        sources: Its data sources.
        steps_done: Number of steps done.
        open_mixture: Gives the samples of the mixture that was in use so far.

    Raises:
        ConfigErrors: A source has changed, or the order cannot be continued with this config.
    """
    _check_same_order(history, config)
    old = history.entries[-1]
    check_known_sources(old.sources, sources)
    sample = history.first_sample(steps_done)
    batches = continue_batches(history.batches, config.training, steps_done)
    snapshots = take_snapshots(sources, old.sources)
    new = _new_entry(config, sources, snapshots, batches, sample)
    if new.same_mixture(old):
        # Stage 2 cannot begin in the past, and stays where it has begun.
        border = max(new.weights.stage1_samples, sample)
        if old.weights.stage2 and sample > old.weights.stage1_samples:
            border = old.weights.stage1_samples
        weights = replace(old.weights, stage1_samples=border)
        old = replace(old, weights=weights, sources={**old.sources, **snapshots})
        return replace(history, entries=(*history.entries[:-1], old), batches=batches)
    cursors = open_mixture(old).cursors_at(sample)
    moved = {
        key: move_snapshot(snapshot, cursors[key]) if key in cursors else snapshot
        for key, snapshot in snapshots.items()
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
    """Open one mixture of a history, which gives its samples.

    Args:
        history: Of the run.
        entry: One of its mixtures.
        corpora: Opens the files of a source, given its key and snapshot.
        vocabulary: Of the tokens.
    """
    used = {source.key: None for source in (*entry.weights.stage1, *entry.weights.stage2)}
    cursors = {}
    for key in used:
        snapshot = entry.sources[key]
        stream = SourceStream(
            corpora(key, snapshot),
            vocabulary,
            history.seed,
            snapshot.stream,
            history.seq_length,
            history.isolated,
            snapshot.image_first,
        )
        backlog = read_backlog(stream.corpus, snapshot.backlog)
        cursors[key] = Cursor(stream, snapshot.position, backlog)
    return Mixture(
        entry.weights,
        cursors,
        history.seed,
        history.seq_length,
        entry.first_sample,
        entry.block_sequences,
        entry.order_version,
    )


def order_notes(history: MixtureHistory) -> list[str]:
    """What the owner should know about the order of the data, one line each."""
    if history.entries[-1].order_version == ORDER_VERSION:
        return []
    return [
        "the run began with version 1 of the order of the samples and keeps it: the last sequences "
        f"of each {history.entries[-1].block_sequences:,} may be nearly empty. A new run, or one "
        "that is resumed with another mixture, reads even steps"
    ]


def count_stage2_steps(history: MixtureHistory, steps: int) -> int:
    """How many of a run's steps belong to stage 2: those whose first sample does.

    Args:
        history: What the run has done so far, and does next. A config alone does not say it: stage
            2 stays where it began when a run is made longer.
        steps: Of the whole run.
    """
    count = 0
    ends = [entry.first_sample for entry in history.entries[1:]] + [history.first_sample(steps)]
    for entry, end in zip(history.entries, ends, strict=True):
        if entry.weights.stage2:
            first = min(end, max(entry.first_sample, entry.weights.stage1_samples))
            count += history.steps_before(end) - history.steps_before(first)
    return count


def stage2_begin(history: MixtureHistory, steps: int) -> int | None:
    """Number of steps before the stage 2 in which a run ends; None if it does not end in one.

    Args:
        history: See ``count_stage2_steps``.
        steps: Of the whole run.
    """
    sample = history.first_sample(steps)
    for entry in reversed(history.entries):
        if not entry.weights.stage2 or entry.weights.stage1_samples >= sample:
            break
        sample = max(entry.first_sample, entry.weights.stage1_samples)
        if sample > entry.first_sample:
            break
    begin = history.steps_before(sample)
    return begin if begin < steps else None


def _new_entry(
    config: Config,
    sources: Sequence[DataSource],
    snapshots: dict[str, SourceSnapshot],
    batches: tuple[BatchSize, ...],
    sample: int,
) -> MixtureEntry:
    """The mixture of a config, from a sample on."""
    data = config.data
    if data.stage1_tokens is not None:
        border = math.ceil(data.stage1_tokens / config.model.seq_length)
    else:
        steps = round(config.training.steps * data.stage1_fraction)
        border = samples_before(batches, steps)
    stages: dict[int, list[SourceWeight]] = {1: [], 2: []}
    for source in sources:
        stages[source.stage].append(SourceWeight(source.key, source.weight, source.epochs))
    weights = MixtureWeights(
        tuple(stages[1]),
        tuple(stages[2]),
        stage2_token_share(sources, data.stage2_share),
        border if data.stage2 else 0,
        data.packing_reserve,
    )
    # A small corpus needs no large blocks: each would go through it many times.
    tokens = sum(source.corpus.tokens for source in sources)
    block_sequences = min(BLOCK_SEQUENCES, max(64, 8 * tokens // config.model.seq_length))
    return MixtureEntry(sample, weights, snapshots, block_sequences, ORDER_VERSION)


def _check_same_order(history: MixtureHistory, config: Config) -> None:
    """Refuse changes of values on which the order of the whole run depends."""
    values = {
        "training.seed": (config.training.seed, history.seed),
        "model.seq_length": (config.model.seq_length, history.seq_length),
        "data.reset_attention": (bool(config.data.reset_attention), history.isolated),
    }
    problems = [
        ConfigError(
            key,
            f"the run began with {old}, but the config now says {new}",
            "Put the old value back, or start a new run",
        )
        for key, (new, old) in values.items()
        if new != old
    ]
    if problems:
        raise ConfigErrors(problems)
