"""Text benchmarks with the prompts, filters and scores of EleutherAI's lm-evaluation-harness.

The extra ``eval`` installs the harness. A task's data comes from files below ``--data``, which have
the same fields as the data set on the Hugging Face hub, or without ``--data`` from the hub itself:

    DIR/piqa/validation.jsonl       DIR/mmlu/anatomy/{dev,test}.parquet
"""

import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import ConfigError, DataError, first_line
from megatron_chameleon.evaluation.asking.asker import Asker
from megatron_chameleon.evaluation.asking.record_files import read_records
from megatron_chameleon.evaluation.tasks.catalogue import TaskInfo
from megatron_chameleon.evaluation.tasks.results import ScoredItem, TaskResult

FEWSHOT_SEED = 1234
"""The harness's own seed, so that few-shot examples are those of published results."""
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
"""How answers to a majority vote are sampled: as in the paper on Minerva (arXiv 2206.14858), since
the one on Chameleon does not say."""
_DATA_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
)
"""What the harness and its libraries raise if data are missing or have other fields."""
_NOISY = ("lm_eval", "datasets", "huggingface_hub")
SUFFIXES = (".jsonl", ".json", ".parquet")


def evaluate_harness_task(
    asker: Asker,
    info: TaskInfo,
    data: Path | None = None,
    limit: int | None = None,
    seed: int = 1,
    batch_size: int = 32,
) -> TaskResult:
    """Run one task of the harness.

    Args:
        asker: The model.
        info: A task of the kind ``harness``.
        data: The folder of local files; None reads from the hub.
        limit: Ask only so many items of each of the harness's tasks; None asks all.
        seed: Seed of sampled answers.
        batch_size: Prompts that are answered together.

    Raises:
        ConfigError: The harness is not installed.
        DataError: Data are missing or broken.
    """
    check_harness(info.name)
    from lm_eval.evaluator import evaluate

    from megatron_chameleon.evaluation.tasks.harness_model import ChameleonLM

    with _quiet():
        tasks = _load(info, data)
        for task in tasks["tasks"].values():
            task.set_config(key="num_fewshot", value=info.shots)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        results = evaluate(
            lm=ChameleonLM(asker, seed, batch_size),
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    scored_items = [
        scored_item
        for name, logged in sorted(results["samples"].items())
        for scored_item in _scored_items(name, logged)
    ]
    settings: dict[str, Any] = {"harness_tasks": sorted(results["samples"]), "limit": limit}
    if info.votes > 1:
        settings |= {"votes": info.votes, "seed": seed, **SAMPLING}
    return TaskResult(info.name, info.metric, info.shots, scored_items, info.paper, settings)


def check_harness(where: str) -> None:
    """Check that the harness is installed.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        remedy = "Install it with `pip install 'megatron-chameleon[eval]'`"
        raise ConfigError(where, "needs lm-evaluation-harness, which is not installed", remedy)


def check_data(info: TaskInfo, data: Path | None) -> None:
    """Check that the folder of a task exists, before a model is loaded.

    Raises:
        DataError: There is no such folder.
    """
    if data is not None and not (data / info.data).is_dir():
        remedy = "Put the files there (docs/evaluation.md), or omit --data to read from the hub"
        raise DataError(str(data / info.data), "no such folder", remedy)


def _load(info: TaskInfo, data: Path | None) -> dict[str, Any]:
    """The harness's task objects, with their data."""
    import lm_eval.tasks
    from jinja2 import TemplateError

    folder = Path(lm_eval.tasks.__file__).parent / info.harness_folder
    # Reading the YAML files of this folder takes a second; reading all of them takes twenty.
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    names = [name for name in manager.all_subtasks if fnmatch(name, info.harness_tasks)]
    names = [name for name in names if not name.endswith("math500")]
    specs = []
    for name in names:
        config = manager.task_index[name].cfg
        assert config is not None
        spec: dict[str, Any] = {"task": name, "num_fewshot": info.shots}
        if info.votes > 1:
            spec |= _voting(info)
        if data is not None:
            alone = len(names) == 1
            spec |= _local(data / info.data, config, info.shots, alone)
        specs.append(spec)
    try:
        return dict(manager.load([{"group": info.name, "task": specs}]))
    except DataError:
        raise
    except (*_DATA_ERRORS, TemplateError) as error:
        remedy = "Pass local files with --data, or use a machine that can reach the hub"
        if data is not None:
            remedy = "Use the fields of the data set on the hub (docs/evaluation.md)"
        what = f"its data cannot be used ({type(error).__name__}: {first_line(error)[:300]})"
        raise DataError(info.name, what, remedy) from error


def _local(folder: Path, config: Mapping[str, Any], shots: int, alone: bool) -> dict[str, Any]:
    """The settings that make a task of the harness read local files."""
    if not alone:
        folder = folder / str(config["dataset_name"])
    evaluated = config.get("test_split") or config.get("validation_split")
    splits = {"test_split": config.get("test_split"), "validation_split": None}
    if not config.get("test_split"):
        splits["validation_split"] = evaluated
    wanted = [str(evaluated)]
    own_examples = (config.get("fewshot_config") or {}).get("samples") is not None
    examples = config.get("fewshot_split") or config.get("training_split")
    splits["training_split"] = None
    if shots and not own_examples and examples:
        wanted.append(str(examples))
        splits["fewshot_split"] = examples
    else:
        splits["fewshot_split"] = None
    files = {split: find_split(folder, split) for split in wanted}

    def read(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {split: Dataset.from_list(read_records(file)) for split, file in files.items()}

    return {**splits, "custom_dataset": read, "dataset_kwargs": None}


def find_split(folder: Path, split: str) -> Path:
    """The file of a split: ``SPLIT.jsonl``, ``.json`` or ``.parquet``.

    Raises:
        DataError: There is no such file.
    """
    for suffix in SUFFIXES:
        if (file := folder / f"{split}{suffix}").is_file():
            return file
    what = f"no such file, nor one with {' or '.join(SUFFIXES[1:])}"
    raise DataError(
        str(folder / f"{split}{SUFFIXES[0]}"),
        what,
        "Put the file of the split there (docs/evaluation.md)",
    )


def _voting(info: TaskInfo) -> dict[str, Any]:
    """The settings that draw ``votes`` answers per question and score the most frequent one."""
    until = ["Q:", "\n\n"] if "gsm8k" in info.harness_tasks else ["Problem:"]
    first: dict[str, Any] = {
        "repeats": info.votes,
        "generation_kwargs": {**SAMPLING, "until": until},
    }
    if "gsm8k" in info.harness_tasks:
        pattern = {"function": "regex", "regex_pattern": r"The answer is (\-?[0-9\.\,]*[0-9]+)"}
        vote = [pattern, {"function": "majority_vote"}, {"function": "take_first"}]
        return {**first, "filter_list": [{"name": "maj", "filter": vote}]}
    all_answers = [{"function": "take_first_k", "k": info.votes}]
    return {
        **first,
        "filter_list": [{"name": "maj", "filter": all_answers}],
        "process_results": vote_on_math,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def vote_on_math(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, int]:
    """1 if the most frequent final answer, normalised by the harness, is right; else 0."""
    from lm_eval.tasks.minerva_math.utils import (
        get_unnormalized_answer,
        is_equiv,
        normalize_final_answer,
    )

    answers = [normalize_final_answer(get_unnormalized_answer(text)) for text in results[0]]
    most = Counter(answers).most_common(1)[0][0]  # in a tie, the one that was drawn first
    return {"exact_match": int(is_equiv(most, doc["answer"]))}


def _scored_items(task: str, logged: Sequence[Mapping[str, Any]]) -> Iterator[ScoredItem]:
    """One scored item per item. With several filters, figures are named ``metric,filter``."""
    items: dict[int, list[Mapping[str, Any]]] = {}
    for entry in logged:
        items.setdefault(entry["doc_id"], []).append(entry)
    for doc_id, entries in sorted(items.items()):
        scores = {
            metric if entry["filter"] == "none" else f"{metric},{entry['filter']}": float(
                entry[metric]
            )
            for entry in entries
            for metric in entry["metrics"]
            if isinstance(entry[metric], int | float)
        }
        first = entries[0]
        candidates = [list(arguments) for arguments in first["arguments"]]
        prompt = [arguments[0] for arguments in candidates]
        answer = [
            [arguments[1], response] if isinstance(arguments[1], str) else response
            for arguments, response in zip(candidates, first["resps"], strict=True)
        ]
        one = prompt[0] if len(set(prompt)) == 1 else prompt
        yield ScoredItem(f"{task}/{doc_id}", one, _plain(answer), _plain(first["target"]), scores)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and messages of the libraries."""
    import datasets
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    original: Callable[..., None] = tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
