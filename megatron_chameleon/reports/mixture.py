"""The data sources of a run: their planned shares, and what the run has read of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chameleon.config.load import load_recorded_config
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.pages.elements import Cell, how, table
from megatron_chameleon.reports.formats import NONE, amount
from megatron_chameleon.runs.records import CONFIG_FILE
from megatron_chameleon.runs.run import RunRecord

_MOST_SOURCES = 500


@dataclass(frozen=True)
class PlannedSource:
    """A source as the config names it."""

    name: str
    """By which the mixture knows it: its name, or its prefix."""
    prefix: str
    stage: int
    """At which it joins."""
    shares: tuple[float | None, float | None]
    """Of the tokens of stage 1 and of stage 2; None where it has no part."""


def planned_sources(values: Mapping[str, Any]) -> list[PlannedSource]:
    """The sources of a config, with their shares of each stage.

    Args:
        values: ``section.key`` and value, such as ``data.stage1[0].prefix``.
    """
    first, second = (_read_sources(values, stage) for stage in (1, 2))
    if not _are_of_tokens(values, [weight for *_, weight in first]):
        return [
            PlannedSource(n, p, s, (None, None))
            for s in (1, 2)
            for n, p, _ in (first, second)[s - 1]
        ]
    share = values.get("data.stage2_share")
    own = float(share) if isinstance(share, int | float) and 0 <= share <= 1 else 0.5
    totals = [sum(weight for _, _, weight in found) for found in (first, second)]
    found = []
    for name, prefix, weight in first:
        part = weight / totals[0] if totals[0] else 0.0
        later = part * (1 - own) if second else None
        found.append(PlannedSource(name, prefix, 1, (part, later)))
    for name, prefix, weight in second:
        part = own * weight / totals[1] if totals[1] else 0.0
        found.append(PlannedSource(name, prefix, 2, (None, part)))
    return found


def _are_of_tokens(values: Mapping[str, Any], weights: Sequence[float]) -> bool:
    """Whether the weights are shares of tokens, so that they can be compared with what is seen."""
    if values.get("data.weights_by", "tokens") != "tokens":
        return False
    return values.get("training.epochs") is None or any(weight != 1 for weight in weights)


def _read_sources(values: Mapping[str, Any], stage: int) -> list[tuple[str, str, float]]:
    found = []
    for number in range(_MOST_SOURCES):
        place = f"data.stage{stage}[{number}]"
        prefix, name = values.get(f"{place}.prefix"), values.get(f"{place}.name")
        if prefix is None and name is None:
            break
        weight = values.get(f"{place}.weight", 1.0)
        is_number = isinstance(weight, int | float) and 0 < weight < 1e16
        found.append((str(name or prefix), str(prefix or ""), float(weight) if is_number else 1.0))
    return found


def mixture_section(run: RunRecord) -> str:
    """The table of the sources."""
    sources = planned_sources(run.config.values)
    if not sources:
        return how("The config names no data sources.")
    seen, missing = _seen(run, sources)
    total = sum(tokens for tokens, _ in seen.values())
    rows = []
    for source in sources:
        tokens, epochs = seen.get(source.name, (None, None))
        share = None if tokens is None else tokens / total if total else 0.0
        rows.append(
            (
                Cell(source.name, "long"),
                *(_percent(part) for part in source.shares),
                _percent(share),
                amount(tokens),
                NONE if epochs is None else f"{epochs:,.2f}",
            )
        )
    heads = [Cell("source"), *(Cell(text, "n") for text in _HEADS)]
    note = (
        "Shares are shares of the tokens without padding. What was seen is counted up to the last "
        "step; within a packing block it is in proportion."
    )
    return table(heads, rows) + how(missing or note)


_HEADS = ("planned, stage 1", "planned, stage 2", "seen", "tokens seen", "times read")


def _percent(share: float | None) -> Cell:
    if share is None:
        return Cell(NONE, "n")
    bar = f'<span class="share" style="width:{100 * min(share, 1):.1f}%"></span>'
    return Cell("", "n", f"{100 * share:.2f}%{bar}")


def _seen(
    run: RunRecord, sources: list[PlannedSource]
) -> tuple[dict[str, tuple[float, float]], str]:
    """Tokens and epochs of each source up to the last step; or why they are not known."""
    if not len(run.metrics):
        return {}, "The run has read nothing yet."
    gone = [s.prefix for s in sources if not Path(f"{s.prefix}.idx").is_file()]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        return {}, (
            f"What was seen is not shown: there is no token file {gone[0]}{more} here. The paths "
            "are those of the config; run the command in the folder in which the run was trained."
        )
    try:
        return _count(run), ""
    except ChameleonError as error:
        return {}, f"What was seen is not shown: {error.lines()[0]}"


def _count(run: RunRecord) -> dict[str, tuple[float, float]]:
    from megatron_chameleon.data.views.source_shares import open_recorded, tokens_seen

    config = load_recorded_config(run.path / CONFIG_FILE)
    whole = [checkpoint for checkpoint in run.checkpoints if checkpoint.is_whole]
    state = whole[-1].state() if whole else {}
    return tokens_seen(open_recorded(config, state), run.metrics.last_step)
