"""Runs tasks one after the other and writes what they found.

OUTPUT/answers.jsonl    every answer of the model, as it comes: a killed evaluation goes on from it
OUTPUT/samples.jsonl    every item: prompt, answer, reference, scores
OUTPUT/results.json     every figure, with its error, the settings, and the paper's beside it
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_chameleon import __version__
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.evaluation.asking.answer_cache import AnswerCache, model_fingerprint
from megatron_chameleon.evaluation.asking.asker import Asker
from megatron_chameleon.evaluation.tasks import cider, harness, item_files, items
from megatron_chameleon.evaluation.tasks.catalogue import TASKS, TaskInfo, find_task
from megatron_chameleon.evaluation.tasks.results import TaskResult
from megatron_chameleon.tokenizer.common.files import write_text

if TYPE_CHECKING:
    from megatron_chameleon.inference.session import Session

FORMAT = "megatron_chameleon.results/1"
RESULTS_FILE = "results.json"
SAMPLES_FILE = "samples.jsonl"
PACKAGES = ("torch", "transformers", "lm-eval", "pycocoevalcap")

TaskRunner = Callable[[Asker], TaskResult]


def load_tasks(
    names: Sequence[str],
    data: Path | None,
    limit: int | None = None,
    seed: int = 1,
    batch_size: int = 32,
) -> dict[str, TaskRunner]:
    """Find the tasks and read their items, before a model is opened.

    Args:
        names: Of the catalogue, or paths of YAML files.
        data: Folder of local data.
        limit: Items of a task; None takes all.
        seed: Of everything that is drawn.
        batch_size: Prompts that are answered together.

    Returns:
        What runs each task, by its name.

    Raises:
        ConfigError: A task is unknown or named twice, or a package is missing.
        DataError: Data are missing or broken.
    """
    runs: dict[str, TaskRunner] = {}
    options = {"limit": limit, "seed": seed, "batch_size": batch_size}
    for name in names:
        info = find_task(name)
        if info is None and not name.endswith((".yaml", ".yml")):
            known = ", ".join(task.name for task in TASKS)
            raise ConfigError("--tasks", f"no task {name!r}", f"Use {known}, or a FILE.yaml")
        if info is None:
            task = item_files.read_task_file(Path(name), data)
            run = _items_runner(task, options)
            name = task.name
        elif info.kind == "harness":
            harness.check_harness(name)
            harness.check_data(info, data)
            run = _harness_runner(info, data, options)
        else:
            run = _items_runner(_read(info, data), options)
        if name in runs:
            raise ConfigError("--tasks", f"{name} stands twice", "Name each task once")
        runs[name] = run
    return runs


def _read(info: TaskInfo, data: Path | None) -> items.ItemTask:
    if data is None:
        raise ConfigError(info.name, "its images are on no hub", "Give their folder with --data")
    if info.kind == "caption":
        cider.check_cider(info.name)
        return item_files.read_captions(info, data / info.data)
    return item_files.read_vqa(info, data / info.data)


def _items_runner(task: items.ItemTask, options: dict[str, Any]) -> TaskRunner:
    if task.metric == "CIDEr":
        cider.check_cider(task.name)
    return lambda asker: items.evaluate_items(asker, task, **options)


def _harness_runner(info: TaskInfo, data: Path | None, options: dict[str, Any]) -> TaskRunner:
    return lambda asker: harness.evaluate_harness_task(asker, info, data, **options)


def run_tasks(
    session: "Session",
    checkpoint: str,
    runs: dict[str, TaskRunner],
    output: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run tasks and write ``results.json`` and ``samples.jsonl``, anew after each.

    Args:
        session: The model.
        checkpoint: Its path, for the results.
        runs: What ``load_tasks`` returns.
        output: The folder; answers that it has are not asked again.
        progress: Gets a line after each batch.

    Returns:
        The content of ``results.json``.

    Raises:
        DataError: The folder is another model's, or in use, or an item cannot be asked.
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
    with AnswerCache(output, model) as answers:
        if len(answers):
            progress(f"{len(answers)} answers are there already: {answers.path}")
        for name, run in runs.items():
            report = partial(_report, progress, name)
            result = run(Asker(session, answers, report))
            results["tasks"][name] = result.summary()
            lines += [
                json.dumps({"task": name, **asdict(scored_item)}, ensure_ascii=False)
                for scored_item in result.scored_items
            ]
            write_text(output / SAMPLES_FILE, "".join(line + "\n" for line in lines))
            write_text(
                output / RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False) + "\n"
            )
    return results


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
