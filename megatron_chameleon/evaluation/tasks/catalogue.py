"""The tasks that ``chameleon evaluate`` knows, with the paper's figures where there are any.

This module imports nothing heavy, so that ``--tasks list`` answers at once. Source of the figures:
arXiv 2405.09818, tables 6 and 7.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SIZES = ("7B", "34B")
"""The paper's models."""


@dataclass(frozen=True)
class TaskInfo:
    """One task."""

    name: str
    kind: str
    """``harness`` (lm-evaluation-harness), ``caption``, ``vqa`` or ``file``."""
    metric: str
    """The name of the figure that the table shows."""
    shots: int
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's figures by model size, 7B and 34B: percent, or CIDEr times 100."""
    note: str = ""
    """How the paper's figure was obtained, if not with the pretrained model alone."""
    data: str = ""
    """The task's folder below ``--data``."""
    harness_folder: str = ""
    """The folder of its YAML files, below the harness's ``tasks``."""
    harness_tasks: str = ""
    """The harness's names for it, as a glob. Several tasks give one figure over all their items."""
    votes: int = 1
    """Answers drawn per question; the most frequent one counts."""


def _harness_task(
    name: str,
    folder: str,
    tasks: str,
    metric: str,
    paper: tuple[float | None, float | None],
    **more: Any,
) -> TaskInfo:
    """A task of lm-evaluation-harness, with the paper's figures for the 7B and the 34B."""
    figures = {size: figure for size, figure in zip(SIZES, paper, strict=True) if figure}
    more = {"shots": 0, "data": name, **more}
    return TaskInfo(
        name, "harness", metric, paper=figures, harness_folder=folder, harness_tasks=tasks, **more
    )


TASKS: tuple[TaskInfo, ...] = (
    _harness_task("piqa", "piqa", "piqa", "acc_norm", (79.6, 83.3)),
    _harness_task("siqa", "siqa", "social_iqa", "acc", (57.0, 63.3)),
    _harness_task("hellaswag", "hellaswag", "hellaswag", "acc_norm", (74.2, 82.7)),
    _harness_task(
        *("hellaswag_10shot", "hellaswag", "hellaswag", "acc_norm", (75.6, 85.1)),
        shots=10,
        data="hellaswag",
    ),
    _harness_task("winogrande", "winogrande", "winogrande", "acc", (70.4, 78.5)),
    _harness_task("arc_easy", "arc", "arc_easy", "acc_norm", (76.1, 84.1)),
    _harness_task("arc_challenge", "arc", "arc_challenge", "acc_norm", (46.5, 59.7)),
    _harness_task("openbookqa", "openbookqa", "openbookqa", "acc_norm", (51.0, 54.0)),
    _harness_task("boolq", "super_glue/boolq", "boolq", "acc", (81.4, 86.0)),
    _harness_task("mmlu", "mmlu/default", "mmlu_*", "acc", (52.1, 65.8), shots=5),
    _harness_task("gsm8k", "gsm8k", "gsm8k_cot", "exact_match,strict-match", (41.6, 61.4), shots=8),
    _harness_task(
        *("gsm8k_maj8", "gsm8k", "gsm8k_cot", "exact_match,maj", (50.9, None)),
        shots=8,
        data="gsm8k",
        votes=8,
    ),
    _harness_task(
        *("gsm8k_maj32", "gsm8k", "gsm8k_cot", "exact_match,maj", (None, 77.0)),
        shots=8,
        data="gsm8k",
        votes=32,
    ),
    _harness_task("math", "minerva_math", "minerva_math_*", "exact_match", (11.5, 22.5), shots=4),
    _harness_task(
        *("math_maj4", "minerva_math", "minerva_math_*", "exact_match,maj", (12.9, 24.7)),
        shots=4,
        data="math",
        votes=4,
    ),
    TaskInfo("coco_caption", "caption", "CIDEr", 2, {"34B": 120.2}, data="coco"),
    TaskInfo(
        *("coco_caption_0shot", "caption", "CIDEr", 0, {"34B": 140.8}),
        note="fine-tuned on it; 139.1 multi-task",
        data="coco",
    ),
    TaskInfo("flickr30k_caption", "caption", "CIDEr", 2, {"34B": 74.7}, data="flickr30k"),
    TaskInfo(
        *("flickr30k_caption_0shot", "caption", "CIDEr", 0, {"34B": 82.3}),
        note="fine-tuned on it; 76.2 multi-task",
        data="flickr30k",
    ),
    TaskInfo(
        *("vqav2", "vqa", "accuracy", 2, {"34B": 66.0}),
        note="test-dev; 69.6 multi-task",
        data="vqav2",
    ),
)


def find_task(name: str) -> TaskInfo | None:
    """The task with that name, or None."""
    return next((task for task in TASKS if task.name == name), None)


def listing() -> str:
    """A table of all tasks, for ``--tasks list``."""
    lines = [f"{'task':<24} {'metric':<12} {'shots':>5} {'7B':>6} {'34B':>6}  data below --data"]
    for task in TASKS:
        seven, thirty_four = (f"{task.paper[n]:.1f}" if n in task.paper else "-" for n in SIZES)
        line = f"{task.name:<24} {task.metric:<12} {task.shots:>5} {seven:>6} {thirty_four:>6}  "
        lines.append(line + task.data + (f"  ({task.note})" * bool(task.note)))
    lines.append("FILE.yaml: a task of your own (docs/evaluation.md)")
    return "\n".join(lines)
