"""Runs tasks one after the other and writes their results.

OUTPUT/answers.jsonl    every answer of the model, as it arrives: a killed evaluation is resumed
OUTPUT/samples.jsonl    every item: prompt, answer, reference, scores
OUTPUT/results.json     every figure with its error and settings, beside the paper's figure
OUTPUT/results.html     the same as a page, with examples right and wrong
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_chameleon import __version__
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.evaluation.asking.answer_cache import AnswerCache, model_fingerprint
from megatron_chameleon.evaluation.asking.asker import Asker
from megatron_chameleon.evaluation.page import evaluation_page, interval, task_section
from megatron_chameleon.evaluation.tasks import cider, harness, item_files, items
from megatron_chameleon.evaluation.tasks.catalogue import TASKS, TaskInfo, find_task
from megatron_chameleon.evaluation.tasks.results import TaskResult
from megatron_chameleon.files import write_together
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.pages.page import Origin
from megatron_chameleon.wording import counted

if TYPE_CHECKING:
    from megatron_chameleon.inference.session import Session

FORMAT = "megatron_chameleon.results/1"
RESULTS_FILE = "results.json"
SAMPLES_FILE = "samples.jsonl"
PAGE_FILE = "results.html"
PACKAGES = ("torch", "transformers", "lm-eval", "pycocoevalcap")

TaskRunner = Callable[[Asker], TaskResult]


def load_tasks(
    names: Sequence[str],
    data: Path | None,
    limit: int | None = None,
    seed: int = 1,
    batch_size: int = 32,
    images: ImageOptions | None = None,
) -> dict[str, TaskRunner]:
    """Find the tasks and read their items, before a model is loaded.

    Args:
        names: Tasks of the catalogue, or paths of YAML files.
        data: The folder of local data.
        limit: Ask only so many items of each task; None asks all.
        seed: Seed of everything that is drawn.
        batch_size: Prompts that are answered together.
        images: Where images may lie, and how they are read.

    Returns:
        The function that runs each task, by the task's name.

    Raises:
        ConfigError: A task is unknown or named twice, or a package is missing.
        DataError: Data are missing or broken.
    """
    runners: dict[str, TaskRunner] = {}
    options = {"limit": limit, "seed": seed, "batch_size": batch_size}
    for given in names:
        name, runner = _load_task(given, data, options, images or ImageOptions())
        if name in runners:
            raise ConfigError("--tasks", f"{name} occurs twice", "Name each task once")
        runners[name] = runner
    return runners


def _load_task(
    name: str, data: Path | None, options: dict[str, Any], images: ImageOptions
) -> tuple[str, TaskRunner]:
    """The task's own name, and the function that runs it."""
    info = find_task(name)
    if info is not None and info.kind == "harness":
        harness.check_harness(name)
        harness.check_data(info, data)
        return name, _harness_runner(info, data, options)
    if info is not None:
        return name, _items_runner(_read_items(info, data, images), options)
    if name.endswith((".yaml", ".yml")):
        task = item_files.read_task_file(Path(name), data, images)
        return task.name, _items_runner(task, options)
    known = ", ".join(task.name for task in TASKS)
    raise ConfigError("--tasks", f"there is no task {name!r}", f"Use {known}, or a FILE.yaml")


def _read_items(info: TaskInfo, data: Path | None, images: ImageOptions) -> items.ItemTask:
    if data is None:
        what = "the hub does not have the images of this task"
        raise ConfigError(info.name, what, "Pass their folder with --data")
    if info.kind == "caption":
        cider.check_cider(info.name)
        return item_files.read_captions(info, data / info.data, images)
    return item_files.read_vqa(info, data / info.data, images)


def _items_runner(task: items.ItemTask, options: dict[str, Any]) -> TaskRunner:
    if task.metric == "CIDEr":
        cider.check_cider(task.name)
    return lambda asker: items.evaluate_items(asker, task, **options)


def _harness_runner(info: TaskInfo, data: Path | None, options: dict[str, Any]) -> TaskRunner:
    return lambda asker: harness.evaluate_harness_task(asker, info, data, **options)


def run_tasks(
    session: "Session",
    checkpoint: str,
    runners: dict[str, TaskRunner],
    output: Path,
    progress: Callable[[str], None] = lambda line: None,
    *,
    origin: Origin,
) -> dict[str, Any]:
    """Run tasks; after each task, write results, samples and their page again.

    Args:
        session: The model.
        checkpoint: The model's path, which the results repeat.
        runners: What ``load_tasks`` returns.
        output: The folder to write to. Answers that are already there are not asked again.
        progress: Called with a line of text after each batch.
        origin: Which command writes the page, and when.

    Returns:
        The content of ``results.json``.

    Raises:
        DataError: The folder belongs to another model or is in use, or an item cannot be asked.
    """
    model = model_fingerprint(session)
    results: dict[str, Any] = {
        "format": FORMAT,
        "checkpoint": str(checkpoint),
        "step": session.step,
        "model_fingerprint": model,
        "tokenizer_fingerprint": session.tokenizer.fingerprint,
        "device": str(session.device),
        "dtype": str(session.model.dtype).removeprefix("torch."),
        "versions": _versions(),
        "tasks": {},
    }
    lines: list[str] = []
    sections: list[str] = []
    intervals: dict[str, tuple[float, float]] = {}
    with AnswerCache(output, model) as answers:
        if len(answers):
            progress(f"found {counted(len(answers), 'answer')} of an earlier run: {answers.path}")
        for name, run_task in runners.items():
            report = partial(_report, progress, name)
            report(f"asking {checkpoint}")
            result = run_task(Asker(session, answers, report))
            results["tasks"][name] = result.summary()
            sections.append(task_section(result))
            intervals[name] = interval(result)
            lines += [
                json.dumps({"task": name, **asdict(scored_item)}, ensure_ascii=False)
                for scored_item in result.scored_items
            ]
            _write(output, results, lines, evaluation_page(results, intervals, sections, origin))
    return results


def _write(output: Path, results: Mapping[str, Any], lines: Sequence[str], page: str) -> None:
    """Write the results, the samples and the page: all or none."""
    contents = {
        RESULTS_FILE: json.dumps(results, indent=2, ensure_ascii=False) + "\n",
        SAMPLES_FILE: "".join(line + "\n" for line in lines),
        PAGE_FILE: page,
    }
    write_together(
        {output / name: text.encode("utf-8", "surrogatepass") for name, text in contents.items()}
    )


def _report(progress: Callable[[str], None], name: str, line: str) -> None:
    progress(f"{name}: {line}")


def _versions() -> dict[str, str]:
    versions = {"megatron_chameleon": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
