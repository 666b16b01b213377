"""The page of ``--html``: how much each filter drops, and examples of what is dropped and kept."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_chameleon.data.filter.judge import Verdict
from megatron_chameleon.data.filter.measures.measure import Unreadable
from megatron_chameleon.data.filter.write import Sample
from megatron_chameleon.pages.elements import (
    Cell,
    bar,
    cards,
    escape,
    heading,
    how,
    image,
    sample,
    samples,
    table,
)
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.terminal import escape_line
from megatron_chameleon.wording import counted

MOST_SAMPLES = 12
"""Documents of each filter, and of those that are kept."""


def filter_page(
    result: Mapping[str, Any],
    verdict: Verdict,
    shown: Sequence[tuple[int, Sample]],
    unreadable: Mapping[str, Sequence[Unreadable]],
    inputs: Sequence[str],
    origin: Origin,
) -> str:
    """The whole page.

    Args:
        result: As the file beside the output has it.
        verdict: What became of each document.
        shown: Numbers of documents and what is shown of them, in order.
        unreadable: Documents that cannot be read, by reason.
        inputs: What the command was given.
        origin: Which command writes it, and when.
    """
    kept, total = result["kept"], result["documents"]
    share = f"{100 * kept / max(total, 1):.1f}%"
    body = [
        cards([(f"{total:,}", "documents"), (f"{kept:,}", "kept"), (share, "of them kept")]),
        *_filters(result, total),
        *_unreadable(result, unreadable),
    ]
    for number, one in enumerate(verdict.filters):
        mine = [(i, s) for i, s in shown if verdict.dropped_by[i] == number]
        if mine:
            title = f"Dropped by {one.name}: {one.dropped:,}"
            figures = [_figure(one, verdict.reason(i)) for i, one in mine]
            body += _section(title, one.setting, figures, one.dropped)
    figures = [_figure(one, "") for i, one in shown if verdict.dropped_by[i] < 0]
    if figures:
        body += _section(f"Kept: {kept:,}", "", figures, kept)
    where = replace(origin, name=", ".join(inputs))
    return page("What the filters keep", body, where)


def _filters(result: Mapping[str, Any], total: int) -> list[str]:
    if not result["filters"]:
        return [how("No filter was asked for.")]
    rows = [
        (
            one["name"],
            one["seen"],
            one["dropped"],
            one["alone"],
            Cell("", "bar", bar(one["dropped"] / max(total, 1))),
            one["setting"],
        )
        for one in result["filters"]
    ]
    heads: list[str | Cell] = ["filter", *(Cell(n, "n") for n in ("sees", "drops", "alone"))]
    heads += ["dropped", Cell("setting", "long")]
    text = "Filters work in this order, and each sees what those before it have left."
    alone = '"Alone" is what a filter would drop if it were the only one.'
    formatted = [
        tuple(f"{value:,}" if isinstance(value, int) else value for value in row) for row in rows
    ]
    return [heading("Filters"), how(text, alone), table(heads, formatted, "filters")]


def _unreadable(
    result: Mapping[str, Any], examples: Mapping[str, Sequence[Unreadable]]
) -> list[str]:
    if not result["unreadable"]:
        return []
    rows = [
        (reason, f"{count:,}", escape_line(item.where), escape_line(item.detail)[:400])
        for reason, count in result["unreadable"].items()
        for item in examples.get(reason, ())[:3]
    ]
    heads: list[str | Cell] = [
        "reason",
        Cell("documents", "n"),
        Cell("for example", "long"),
        Cell("why", "long"),
    ]
    text = "They cannot be read, so `chameleon preprocess` would drop them as well."
    return [
        heading(f"Unreadable: {sum(result['unreadable'].values()):,}"),
        how(text),
        table(heads, rows, "documents that cannot be read"),
    ]


def _section(title: str, setting: str, figures: list[str], count: int) -> list[str]:
    words = (
        f"{counted(len(figures), 'example')}, at even distances." if len(figures) < count else ""
    )
    text = how(*filter(None, (f"Setting: {setting}." if setting else "", words)))
    return [heading(title), text, samples(figures, is_wide=True)]


def _figure(found: Sample, reason: str) -> str:
    pictures = "".join(image(data, "picture of the document") for data in found.thumbnails)
    row = f'<div class="row">{pictures}</div>' if pictures else ""
    more = found.images - len(found.thumbnails)
    note = f"<p>{escape(counted(more, 'more picture'))}</p>" if more > 0 else ""
    head = f"<b>{escape(escape_line(reason))}</b>" if reason else ""
    text = f"<p>{escape(escape_line(found.text))}</p>" if found.text else ""
    caption = escape_line(f"{found.id} · {found.where}")
    return sample(f"{head}{row}{note}{text}", caption)
