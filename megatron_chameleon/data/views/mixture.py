"""The mixture of a run, planned to its end: its sources, and what each stage takes from them.

It is written twice from the same numbers: as text for the terminal, and as blocks of a page.

Try: ``chameleon inspect CONFIG``
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.batches.shares import amounts_of
from megatron_chameleon.data.mixture.corpus import Corpus
from megatron_chameleon.data.mixture.phases import Phase
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.pages.charts import COLORS, Chart, Line
from megatron_chameleon.pages.elements import Cell, bar, heading, how, notes, table
from megatron_chameleon.wording import counted


@dataclass(frozen=True)
class MixturePart:
    """What a stretch of a run takes from one source."""

    key: str
    share: float
    """Of the tokens."""
    others: tuple[tuple[str, float], ...]
    """Of the samples and of the trained tokens, with these names; none of a source that the config
    no longer lists."""
    epochs: tuple[float, float]
    """How many times the source has been read when the stretch begins, and when it ends. Within a
    packing block it is in proportion."""

    @property
    def times(self) -> float:
        """How many times the stretch reads the source."""
        return self.epochs[1] - self.epochs[0]


@dataclass(frozen=True)
class MixtureSpan:
    """A stretch of samples with the same shares."""

    first: int
    end: int
    """The sample after the last."""
    stage: int
    parts: tuple[MixturePart, ...]
    problem: str = ""
    """Why the shares are not known; there are no parts then."""


def mixture_spans(reader: BatchReader) -> list[MixtureSpan]:
    """What the run takes from its sources, from its first sample to its last."""
    history = reader.history
    ends = [entry.first_sample for entry in history.entries[1:]] + [reader.samples]
    spans: list[MixtureSpan] = []
    for entry, end in zip(history.entries, ends, strict=True):
        if entry.first_sample < end:
            spans += _spans(reader, entry.first_sample, end)
    return spans


def _spans(reader: BatchReader, first: int, samples: int) -> Iterator[MixtureSpan]:
    """Those of the mixture from a sample on, up to another."""
    try:
        mixture = reader.mixture(first)
    except ConfigError as error:  # the run has used it before, and needs its files no more
        yield MixtureSpan(first, samples, 0, (), error.what)
        return
    for phase in mixture.phases_to_end(samples):
        end = samples if phase.end_sample is None else min(samples, phase.end_sample)
        others = _other_shares(reader, phase)
        blocks = -(-(end - phase.first_sample) // phase.sequences)
        used = (end - phase.first_sample) / (blocks * phase.sequences)
        parts = []
        for key, share in phase.shares().items():
            cursor = phase.cursors[key]
            tokens = cursor.stream.corpus.tokens
            before = max(0, cursor.base - cursor.backlog_tokens) / tokens
            epochs = (before, before + used * phase.position(key, blocks) / tokens)
            parts.append(MixturePart(key, share, tuple(others[key]), epochs))
        yield MixtureSpan(phase.first_sample, end, phase.stage, tuple(parts))


def _other_shares(reader: BatchReader, phase: Phase) -> dict[str, list[tuple[str, float]]]:
    """The shares of the samples and of the trained tokens that each source of a phase has.

    There are none of a source that the config no longer lists.
    """
    sources = {source.key: source for source in reader.sources}
    shares = phase.shares()
    if not all(key in sources for key in shares):
        return {key: [] for key in shares}
    amounts = {key: amounts_of(reader.config, sources[key]) for key in shares}
    parts = {key: share / sources[key].corpus.tokens for key, share in shares.items()}
    found: dict[str, list[tuple[str, float]]] = {key: [] for key in shares}
    for unit, counts in (
        ("samples", {key: amount.documents for key, amount in amounts.items()}),
        ("trained tokens", {key: amount.trained_tokens for key, amount in amounts.items()}),
    ):
        total = sum(parts[key] * count for key, count in counts.items())
        for key, count in counts.items():
            found[key].append((unit, parts[key] * count / total if total else 0.0))
    return found


def _length(reader: BatchReader) -> list[str]:
    """How long the run is, in words."""
    config = reader.config
    epochs = reader.epochs_end
    return [
        *([] if epochs is None else [epochs.description]),
        f"{config.training.steps:,} steps, {reader.samples:,} sequences of "
        f"{config.model.seq_length:,} tokens; {counted(len(reader.history.entries), 'mixture')}",
    ]


def _sources(reader: BatchReader) -> dict[str, Corpus]:
    """The sources of the last mixture of the run."""
    first = reader.history.entries[-1].first_sample
    mixture = reader.mixture(max(first, reader.samples - 1))
    return {key: cursor.stream.corpus for key, cursor in mixture.cursors.items()}


def mixture_summary(reader: BatchReader) -> str:
    """Describe the sources, their sizes, and what each stage takes from them, for people."""
    sources = _sources(reader)
    width = max(map(len, (*sources, "source")))
    lines = [
        *_length(reader),
        "",
        f"{'source':{width}} {'documents':>14} {'tokens':>18} {'images':>13} {'mean length':>12}",
    ]
    for key, corpus in sources.items():
        lines.append(
            f"{key:{width}} {corpus.documents:>14,} {corpus.tokens:>18,} {corpus.images:>13,} "
            f"{corpus.tokens / corpus.documents:>12,.1f}"
        )
    if answers := reader.describe_answers():
        lines += ["", *answers]
    for span in mixture_spans(reader):
        lines += ["", *_span_lines(span, width)]
    return "\n".join(lines)


def _span_lines(span: MixtureSpan, width: int) -> list[str]:
    last = span.end - 1
    if span.problem:
        return [f"samples {span.first:,} to {last:,}: not known ({span.problem})"]
    lines = [f"stage {span.stage}, samples {span.first:,} to {last:,}:"]
    for part in span.parts:
        text = "".join(f", {100 * share:.2f}% of the {unit}" for unit, share in part.others)
        lines.append(
            f"{part.key:{width}} {100 * part.share:6.2f}% of the tokens{text}, "
            f"{part.times:,.3f} epochs"
        )
    return lines


def mixture_blocks(reader: BatchReader) -> list[str]:
    """The same as blocks of a page: tables, and the shares over the run as charts."""
    spans = mixture_spans(reader)
    rows = [
        (
            *(Cell(key, "long"), f"{corpus.documents:,}", f"{corpus.tokens:,}"),
            *(f"{corpus.images:,}", f"{corpus.tokens / corpus.documents:,.1f}"),
        )
        for key, corpus in _sources(reader).items()
    ]
    numbers = (Cell(name, "n") for name in ("documents", "tokens", "images", "mean length"))
    return [
        *map(how, _length(reader)),
        table(["source", *numbers], rows, "The sources of the mixture"),
        notes((line, "") for line in reader.describe_answers()),
        *itertools.chain.from_iterable(_span_blocks(reader, span) for span in spans),
        mixture_charts(reader, spans),
    ]


def _span_blocks(reader: BatchReader, span: MixtureSpan) -> list[str]:
    steps = _steps(reader, span)
    where = f"samples {span.first:,} to {span.end - 1:,}"
    if span.problem:
        return [notes([(f"{steps}, {where}: not known ({span.problem})", "warn")])]
    units = [unit for unit, _ in span.parts[0].others] if span.parts else []
    heads: list[str | Cell] = [
        "source",
        *(Cell(f"of the {unit}", "n") for unit in ("tokens", *units)),
    ]
    heads += [Cell("times read", "n"), Cell("read before", "n")]
    rows = [
        (
            Cell(part.key, "long"),
            _percent(part.share),
            *(_percent(share) for _, share in part.others),
            f"{part.times:,.3f}",
            f"{part.epochs[0]:,.3f}",
        )
        for part in span.parts
    ]
    title = f"Stage {span.stage}, {steps}"
    return [heading(title, 3), table(heads, rows, f"{title}, {where}")]


def _steps(reader: BatchReader, span: MixtureSpan) -> str:
    """The steps that read a stretch, in words; two stretches may share one."""
    first, last = (reader.history.steps_before(s + 1) for s in (span.first, span.end - 1))
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _percent(share: float) -> Cell:
    return Cell("", "n", f"{100 * share:.2f}%{bar(share)}")


def mixture_charts(reader: BatchReader, spans: Sequence[MixtureSpan]) -> str:
    """The shares of the sources over the run, and how many times each has been read."""
    known = [span for span in spans if span.parts]
    tokens: dict[str, float] = {}
    for span in known:
        for part in span.parts:
            tokens[part.key] = tokens.get(part.key, 0) + part.share * (span.end - span.first)
    keys = sorted(tokens, key=lambda key: -tokens[key])
    charts = []
    if len(keys) > 1:
        lines = [_share_line(reader, known, *entry) for entry in enumerate(keys[:COLORS])]
        charts.append(Chart("Share of the tokens", lines, "%"))
    lines = [_epoch_line(reader, known, *entry) for entry in enumerate(keys[:COLORS])]
    charts.append(Chart("Times that each source has been read", lines))
    more = len(keys) - COLORS
    note = f"The largest {COLORS} of {counted(len(keys), 'source')} are drawn." if more > 0 else ""
    drawn = "".join(chart.html() for chart in charts)
    return f'<div class="charts">{drawn}</div>{how(note) if note else ""}'


def _share_line(reader: BatchReader, spans: Sequence[MixtureSpan], color: int, key: str) -> Line:
    points = [
        (place, 100 * next((part.share for part in span.parts if part.key == key), 0.0))
        for span in spans
        for place in _places(reader, span)
    ]
    return _line(key, color, points)


def _epoch_line(reader: BatchReader, spans: Sequence[MixtureSpan], color: int, key: str) -> Line:
    points = [
        point
        for span in spans
        for part in span.parts
        if part.key == key
        for point in zip(_places(reader, span), part.epochs, strict=True)
    ]
    return _line(key, color, points)


def _places(reader: BatchReader, span: MixtureSpan) -> tuple[float, float]:
    """The ends of a stretch as steps that were done, with the part of a step that is shared."""
    return _place(reader, span.first), _place(reader, span.end)


def _place(reader: BatchReader, sample: int) -> float:
    history = reader.history
    if sample == 0:
        return 0.0
    done = history.steps_before(sample) - 1  # whole steps before the one with the last sample
    return done + (sample - history.first_sample(done)) / history.batch_size(done)


def _line(name: str, color: int, points: Sequence[tuple[float, float]]) -> Line:
    x, y = (np.array(values, dtype=np.float64) for values in zip(*points, strict=True))
    return Line(name, x, y, color)
