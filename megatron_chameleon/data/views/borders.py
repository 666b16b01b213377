"""How full the steps of a run are where blocks, phases and stages end, and how large its gradients.

A fault of the packing shows there first: a step that holds few tokens has a gradient of its own.

Try: ``chameleon data audit RUN --borders``
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.mixture.mixture import Mixture, Phase
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.wording import counted

NEIGHBOURS = 8
"""Steps before and after a step with which it is compared."""
MOST_BLOCK_ENDS = 500
"""Block ends that are looked at; in a longer run they are spread evenly."""
MOST_SAMPLES = 200_000
"""All steps of a run of so many samples are measured, otherwise those at the borders."""


@dataclass(frozen=True)
class Border:
    """A step in which a block, a phase or a stage ends."""

    step: int
    """Counted from 1."""
    sample: int
    """The first sample behind the border, or behind the first of them."""
    what: str
    """What ends or begins there, for people."""


@dataclass
class Borders:
    """The borders of a run and what was measured there."""

    borders: list[Border] = field(default_factory=list)
    block_ends: int = 0
    """All block ends of the run."""
    listed_block_ends: int = 0
    """Those that are among ``borders``."""
    unknown: list[tuple[int, int, str]] = field(default_factory=list)
    """Samples whose data cannot be opened any more: the first, the one after the last, and why."""
    padding: dict[int, float] = field(default_factory=dict)
    """Share of padding by step: all steps, or those at the borders and beside them."""


def find_borders(reader: BatchReader) -> Borders:
    """Find the borders of a run, and measure the padding of its steps.

    Args:
        reader: Of the run.
    """
    found = Borders()
    history = reader.history
    samples = reader.samples
    at: dict[int, list[str]] = {}
    block_ends: list[int] = []
    ends = [entry.first_sample for entry in history.entries[1:]] + [samples]
    for entry, end in zip(history.entries, ends, strict=True):
        end = min(end, samples)
        if entry.first_sample >= end:
            continue
        if entry.first_sample:
            at.setdefault(entry.first_sample, []).append("another mixture begins")
        try:
            mixture = reader.mixture(entry.first_sample)
        except ConfigError as error:  # the run has used it before, and needs its files no more
            found.unknown.append((entry.first_sample, end, f"not known ({error.what})"))
            continue
        for sample, what in _phase_ends(mixture, end):
            at.setdefault(sample, []).append(what)
        for phase in mixture.phases_to_end(end):
            stop = end if phase.end_sample is None else min(end, phase.end_sample)
            found.block_ends += (stop - phase.first_sample) // phase.sequences
            block_ends += _some_block_ends(phase, stop)
    every = max(1, math.ceil(len(block_ends) / MOST_BLOCK_ENDS))
    listed = block_ends[::every]
    found.listed_block_ends = len(listed)
    for sample in listed:
        at.setdefault(sample, []).append("a block ends")
    at.setdefault(samples, []).append("the run ends")
    found.borders = list(_by_step(reader, at))
    found.padding = _measure(reader, found, samples)
    return found


def _some_block_ends(phase: Phase, stop: int) -> list[int]:
    """The samples behind the whole blocks of a phase, at most a few times MOST_BLOCK_ENDS."""
    blocks = (stop - phase.first_sample) // phase.sequences
    every = max(1, blocks // MOST_BLOCK_ENDS)
    return [phase.first_sample + n * phase.sequences for n in range(every, blocks + 1, every)]


def _phase_ends(mixture: Mixture, end: int) -> Iterator[tuple[int, str]]:
    """The samples before ``end`` behind which a stage begins or a source is missing."""
    phases = mixture.phases_to_end(end)
    for phase, following in itertools.pairwise(phases):
        if following.stage != phase.stage:
            yield following.first_sample, f"stage {following.stage} begins"
        elif gone := [key for key in phase.rates if key not in following.rates]:
            yield following.first_sample, f"{', '.join(gone)} is exhausted"


def _by_step(reader: BatchReader, at: Mapping[int, list[str]]) -> Iterator[Border]:
    steps: dict[int, list[int]] = {}
    for sample in sorted(at):
        steps.setdefault(reader.history.steps_before(sample), []).append(sample)
    for step, samples in steps.items():
        whats = [what for sample in samples for what in at[sample]]
        blocks = whats.count("a block ends")
        texts = list(dict.fromkeys(what for what in whats if what != "a block ends"))
        if blocks:
            texts.append("a block ends" if blocks == 1 else f"{blocks} blocks end")
        yield Border(step, samples[0], "; ".join(texts))


def _measure(reader: BatchReader, found: Borders, samples: int) -> dict[int, float]:
    """The share of padding of all steps, or of those at the borders of a long run."""
    history, steps = reader.history, reader.config.training.steps
    chosen = set(range(1, steps + 1))
    if samples > MOST_SAMPLES:
        chosen = {step for border in found.borders for step in (border.step, *around(border.step))}
    shares = {}
    for step in sorted(step for step in chosen if 1 <= step <= steps):
        first, size = history.first_sample(step - 1), history.batch_size(step - 1)
        if not any(first < end and begin < first + size for begin, end, _ in found.unknown):
            tokens = sum(
                int(reader.packed(sample).parts.tokens.sum())
                for sample in range(first, first + size)
            )
            shares[step] = 1 - tokens / (size * history.seq_length)
    return shares


def around(step: int) -> list[int]:
    """The neighbours of a step; at the ends of a run some of them do not exist."""
    return [n for n in range(step - NEIGHBOURS, step + NEIGHBOURS + 1) if n != step]


def format_borders(found: Borders, steps: int, grad_norms: Mapping[int, float]) -> str:
    """Format the borders for people, one step a line.

    Args:
        found: The borders.
        steps: Of the run.
        grad_norms: Of the steps for which it is known, by step.
    """
    lines = [
        f"{counted(steps, 'step')} with {counted(found.block_ends, 'end')} of packing blocks; each "
        f"step is compared with the {NEIGHBOURS} before and the {NEIGHBOURS} behind it",
        *(f"samples {first:,} to {end - 1:,}: {why}" for first, end, why in found.unknown),
        "",
        f"{'':>9}{'padding':^34}{'gradient norm':^28}",
        f"{'step':>9}{'step':>8}{'next':>8}{'median':>9}{'highest':>9}"
        f"{'step':>10}{'median':>10}{'ratio':>8}  border",
    ]
    ratios = {}
    for border in found.borders:
        step = border.step
        padding = [found.padding.get(n) for n in (step, step + 1)]
        beside = [found.padding[n] for n in around(step) if n in found.padding]
        norms = [grad_norms[n] for n in around(step) if n in grad_norms]
        norm, median = grad_norms.get(step), float(np.median(norms)) if norms else None
        ratio = norm / median if norm is not None and median else None
        if ratio is not None:
            ratios[step] = ratio
        lines.append(
            f"{step:>9,}{_percent(padding[0]):>8}{_percent(padding[1]):>8}"
            f"{_percent(float(np.median(beside)) if beside else None):>9}"
            f"{_percent(max(beside, default=None)):>9}"
            f"{_number(norm):>10}{_number(median):>10}{_number(ratio, 2):>8}  "
            f"sample {border.sample:,}: {border.what}"
        )
    return "\n".join([*lines, "", *_summary(found, steps, ratios)])


def _summary(found: Borders, steps: int, ratios: Mapping[int, float]) -> list[str]:
    lines = []
    if found.padding:
        of = "all steps" if len(found.padding) == steps else f"{len(found.padding):,} steps"
        worst = max(found.padding, key=lambda step: found.padding[step])
        mean, most = sum(found.padding.values()) / len(found.padding), found.padding[worst]
        lines.append(
            f"padding of {of}: {_percent(mean)} on average, at most {_percent(most)} "
            f"(step {worst:,})"
        )
    if ratios:
        worst = max(ratios, key=lambda step: ratios[step])
        lines.append(
            f"gradient norm at the borders: at most {ratios[worst]:.2f} of the median beside it "
            f"(step {worst:,})"
        )
    if found.listed_block_ends < found.block_ends:
        lines.append(
            f"{found.listed_block_ends:,} of the {found.block_ends:,} ends of blocks are listed"
        )
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
