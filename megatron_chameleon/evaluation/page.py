"""The page of ``chameleon evaluate``: figures beside the paper's, and examples right and wrong.

Its size is bounded: a few examples of each task, long texts cut, pictures made small.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.evaluation.human.statistics import wilson_interval
from megatron_chameleon.evaluation.tasks.catalogue import SIZES, find_task
from megatron_chameleon.evaluation.tasks.results import ScoredItem, TaskResult
from megatron_chameleon.images.thumbnails import thumbnail_of_file
from megatron_chameleon.pages.elements import (
    Cell,
    escape,
    folded,
    heading,
    how,
    image,
    preformatted,
    sample,
    samples,
    table,
)
from megatron_chameleon.pages.page import Origin, cut, page
from megatron_chameleon.wording import at_even_distances

MOST_EXAMPLES = 6
"""Of each task, right ones and wrong ones."""
MOST_PICTURES = 2
"""Of a prompt, from its end: the question's own stand behind those of its examples."""
SIDE = 160
_LONGEST_PROMPT = 800
_LONGEST_ANSWER = 400
_Z = 1.959964
"""Of a 95% interval."""


def evaluation_page(
    results: Mapping[str, Any],
    intervals: Mapping[str, tuple[float, float]],
    sections: Sequence[str],
    origin: Origin,
) -> str:
    """The whole page.

    Args:
        results: The content of ``results.json``.
        intervals: From ``interval``, by the name of the task.
        sections: From ``task_section``, one for each task.
        origin: Which command writes it, and when.
    """
    checkpoint = str(results["checkpoint"])
    rows = [_row(name, result, intervals[name]) for name, result in results["tasks"].items()]
    heads: tuple[str | Cell, ...] = (
        *("task", "metric", Cell("value", "n"), Cell("95% interval", "n"), Cell("items", "n")),
        *(Cell("shots", "n"), *(Cell(f"paper {size}", "n") for size in SIZES), Cell("", "long")),
    )
    about = {key: value for key, value in results.items() if key != "tasks"}
    body = [
        heading("Figures"),
        how(
            "The interval is the sampling error alone: another choice of as many items would give",
            "a figure within it in 95 of 100 cases. The paper's figures (arXiv 2405.09818, tables",
            "6 and 7) are of its own models, on all items of a task.",
        ),
        table(heads, rows, "figures beside the paper's"),
        *sections,
        heading("How it was measured"),
        folded("Checkpoint and versions", preformatted(json.dumps(about, indent=2))),
    ]
    name = checkpoint if results["step"] is None else f"{checkpoint}, step {results['step']:,}"
    return page(
        f"Evaluation of {Path(checkpoint).name or checkpoint}", body, replace(origin, name=name)
    )


def _row(name: str, result: Mapping[str, Any], interval: tuple[float, float]) -> tuple[object, ...]:
    paper = (f"{result['paper'][size]:.1f}" if size in result["paper"] else "–" for size in SIZES)
    info = find_task(name)
    low, high = interval
    return (
        *(name, result["metric"], f"{result['value']:.1f}", f"{low:.1f} – {high:.1f}"),
        *(f"{result['items']:,}", result["shots"], *paper, info.note if info else ""),
    )


def interval(result: TaskResult) -> tuple[float, float]:
    """A 95% interval of the task's figure from its items, on the scale of the figure.

    Wilson's where each item is right or wrong, which is honest for few items and for all right;
    else the normal one around the mean.
    """
    figure = result.figures()[result.metric]
    value, error, count = figure["value"], figure["standard_error"], int(figure["items"])
    scores = [item.scores[result.metric] for item in result.scored_items]
    if set(scores) <= {0.0, 1.0} and result.scale == 100:
        low, high = wilson_interval(int(sum(scores)), count)
        return 100 * low, 100 * high
    return value - _Z * error, value + _Z * error


def task_section(result: TaskResult) -> str:
    """Examples of a task: right and wrong ones, or those with the lowest and highest scores."""
    scored = [(item.scores.get(result.metric), item) for item in result.scored_items]
    known = [(score, item) for score, item in scored if score is not None]
    is_binary = {score for score, _ in known} <= {0.0, 1.0}
    if is_binary:
        groups = [
            (kind.capitalize(), kind, [item for score, item in known if score == wanted])
            for kind, wanted in (("wrong", 0.0), ("right", 1.0))
        ]
        chosen = [
            (title, kind, len(own), at_even_distances(own, MOST_EXAMPLES))
            for title, kind, own in groups
        ]
    else:
        order = [item for _, item in sorted(known, key=lambda pair: pair[0])]
        count = min(MOST_EXAMPLES, -(-len(order) // 2))
        chosen = [
            ("Lowest scores", "wrong", len(order), order[:count]),
            ("Highest scores", "right", len(order), order[max(len(order) - count, count) :][::-1]),
        ]
    parts = [heading(result.name)]
    for title, kind, total, shown in chosen:
        few = f"; {len(shown)} of them, at even distances" if len(shown) < total else ""
        parts.append(heading(f"{title}: {total:,}{few}" if is_binary else title, 3))
        figures = [sample(_example(item, result), item.id[:200], kind) for item in shown]
        parts.append(samples(figures, is_wide=True) if figures else how("None."))
    return f"<section>{''.join(parts)}</section>"


def _example(item: ScoredItem, result: TaskResult) -> str:
    texts: list[str] = []
    pictures: list[str] = []
    _collect(item.prompt, texts, pictures)
    prompt = "".join(texts).strip()
    if len(prompt) > _LONGEST_PROMPT:
        prompt = f"…{prompt[-_LONGEST_PROMPT:]}"
    shown = "".join(map(_picture, pictures[-MOST_PICTURES:]))
    row = f'<div class="row">{shown}</div>' if shown else ""
    more = len(pictures) - MOST_PICTURES
    before = f"{more} pictures of the examples before it are left out." if more > 0 else ""
    note = f'<p class="pale">{before}</p>' if before else ""
    score = item.scores[result.metric] * result.scale
    lines = (
        ("Answer", cut(_answer(item.answer), _LONGEST_ANSWER) or "(nothing)"),
        ("Reference", cut(_reference(item.reference), _LONGEST_ANSWER)),
        (result.metric, f"{score:.4g}"),
    )
    told = "".join(f"<p><strong>{escape(k)}:</strong> {escape(v)}</p>" for k, v in lines)
    return f"{note}{row}<p>{escape(prompt)}</p>{told}"


def _collect(part: Any, texts: list[str], pictures: list[str]) -> None:
    """The texts and the pictures of a prompt as ``samples.jsonl`` has it, in their order."""
    if isinstance(part, str):
        texts.append(part)
    elif isinstance(part, Mapping) and "image" in part:
        pictures.append(str(part["image"]))
        texts.append(f" [picture {len(pictures)}] ")
    elif isinstance(part, Mapping) and "role" in part:
        texts.append(f"\n{part['role']}: ")
        _collect(part.get("content"), texts, pictures)
    elif isinstance(part, list | tuple):
        for inner in part:
            _collect(inner, texts, pictures)


def _picture(name: str) -> str:
    """A picture of a prompt, of which ``samples.jsonl`` has the path, or a hash."""
    path = Path(name)
    try:
        if path.is_file():
            return image(thumbnail_of_file(path, SIDE), f"picture {path.name}"[:200])
    except (ChameleonError, OSError, ValueError):
        return '<p class="pale">(a picture that cannot be read)</p>'
    return '<p class="pale">(a picture inside the file of items)</p>'


def _answer(answer: Any) -> str:
    """A text; or candidates with their log-likelihoods, the likeliest first."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, Mapping) and all(isinstance(v, int | float) for v in answer.values()):
        ranked = sorted(answer.items(), key=lambda pair: -pair[1])
        return "; ".join(f"{choice} ({value:.2f})" for choice, value in ranked)
    return "; ".join(_flat(answer))


def _reference(reference: Any) -> str:
    return reference if isinstance(reference, str) else "; ".join(_flat(reference))


def _flat(value: Any) -> Iterator[str]:
    """The leaves of nested lists as words."""
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _flat(inner)
    else:
        yield f"{value:.4g}" if isinstance(value, float) else str(value)
