"""Reads the items of image-to-text tasks and of the user's own tasks.

DIR/coco/dataset_coco.json                         Karpathy's splits
DIR/coco/val2014/COCO_val2014_000000391895.jpg     and the images, as the JSON names them
DIR/vqav2/*val2014_questions.json, *val2014_annotations.json, and the same for train2014
DIR/vqav2/{train,val}2014/COCO_val2014_000000262148.jpg
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chameleon.data.documents.image_part import image_part
from megatron_chameleon.data.documents.records import Origin, Question, question_of
from megatron_chameleon.data.documents.schema import USER, TextPart
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.evaluation.asking.record_files import (
    read_json,
    read_records,
    require_keys,
    well_formed,
)
from megatron_chameleon.evaluation.tasks.catalogue import TaskInfo
from megatron_chameleon.evaluation.tasks.items import (
    CHOICE_METRICS,
    METRICS,
    Item,
    ItemTask,
    check_image,
    check_references,
)
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.references import ImageFolder

CAPTION_TOKENS = 30
"""The paper's limit (section 5.2)."""
VQA_TOKENS = 10
MOST_TOKENS = 1 << 20
"""Limit of `max_tokens` and `shots`, far above any model's context."""
FILE_KEYS = (
    *("name", "data", "metric", "shots", "examples", "prompt", "max_tokens", "stop"),
    *("separator", "chat", "paper"),
)


def read_captions(info: TaskInfo, folder: Path, images: ImageOptions | None = None) -> ItemTask:
    """Read the test split of Karpathy's JSON. Examples come from its training split.

    Args:
        info: The task.
        folder: Has the JSON, and the images below it.
        images: Where else images may lie, and how they are read.

    Raises:
        DataError: A file or image is missing, or the JSON is not one of Karpathy's.
    """
    file = _only(folder, "dataset_*.json")
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(str(file), "has no list `images`", "Pass one of Karpathy's split files")
    below = ImageFolder(str(folder), images or ImageOptions())
    splits: dict[str, list[Item]] = {"test": [], "train": []}
    for index, record in enumerate(content["images"]):
        where = f"{file}: image {index}"
        require_keys(record, ("filename", "split", "sentences"), where)
        split = "train" if record["split"] == "restval" else str(record["split"])
        if split not in splits:
            continue
        path = Path(str(record.get("filepath", "")), str(record["filename"]))
        with well_formed(where):
            captions = tuple(str(sentence["raw"]).strip() for sentence in record["sentences"])
        if not captions:
            raise DataError(where, "has no sentences", "Remove the image from the file")
        image = image_part(str(path), below)
        if split == "test":
            check_image(image, where)
        splits[split].append(Item(str(record["filename"]), (image,), captions))
    if not splits["test"]:
        raise DataError(str(file), "has no images of the split `test`", "Pass the complete file")
    return ItemTask(
        *(info.name, info.metric, splits["test"], info.shots, splits["train"]),
        max_tokens=CAPTION_TOKENS,
        paper=info.paper,
    )


def read_vqa(info: TaskInfo, folder: Path, images: ImageOptions | None = None) -> ItemTask:
    """Read VQAv2's validation questions. Examples come from its training questions.

    The annotations of the test splits are not public.

    Args:
        info: The task.
        folder: Has the JSON files, and the images below it.
        images: Where else images may lie, and how they are read.

    Raises:
        DataError: A file or image is missing or broken.
    """
    below = ImageFolder(str(folder), images or ImageOptions())
    items = _vqa_items(below, "val2014")
    examples = _vqa_items(below, "train2014") if info.shots else []
    return ItemTask(
        *(info.name, info.metric, items, info.shots, examples),
        max_tokens=VQA_TOKENS,
        prefix=" ",
        paper=info.paper,
    )


def _vqa_items(images: ImageFolder, split: str) -> list[Item]:
    folder = Path(images.path)
    files = {kind: _only(folder, f"*{split}_{kind}.json") for kind in ("questions", "annotations")}
    lists: dict[str, list[dict[str, Any]]] = {}
    for kind, file in files.items():
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get(kind), list):
            raise DataError(str(file), f"has no list `{kind}`", "Pass VQAv2's own file")
        lists[kind] = content[kind]
    answers = {}
    for index, record in enumerate(lists["annotations"]):
        require_keys(
            record, ("question_id", "answers"), f"{files['annotations']}: annotation {index}"
        )
        with well_formed(f"{files['annotations']}: annotation {index}"):
            said = tuple(str(a["answer"]) for a in record["answers"])
        answers[str(record["question_id"])] = said
    items = []
    for index, record in enumerate(lists["questions"]):
        where = f"{files['questions']}: question {index}"
        require_keys(record, ("question_id", "image_id", "question"), where)
        if not answers.get(str(record["question_id"])):
            what = f"question {record['question_id']} has no answers in {files['annotations'].name}"
            raise DataError(where, what, "Pass the two files of the same split")
        with well_formed(where):
            name = f"COCO_{split}_{int(record['image_id']):012d}.jpg"
        image = image_part(f"{split}/{name}", images)
        if split == "val2014":
            check_image(image, where)
        said = answers[str(record["question_id"])]
        most = max(said, key=said.count)
        references = tuple(sorted(said, key=lambda answer: answer != most))
        text = TextPart(f"Question: {record['question']} Short answer:")
        items.append(Item(str(record["question_id"]), (image, text), references))
    return items


def read_task_file(path: Path, data: Path | None, images: ImageOptions | None = None) -> ItemTask:
    """Read one of the user's own tasks.

    Args:
        path: The YAML file of the task.
        data: The folder of its files; None means the folder of the YAML file.
        images: Where images may lie, and how they are read.

    Raises:
        ConfigError: A key is unknown, or its value cannot be used.
        DataError: A file is missing or broken.
    """
    spec = read_json(path)
    if not isinstance(spec, dict):
        raise ConfigError(str(path), "has no keys", f"Write {', '.join(FILE_KEYS)}")
    for key in spec:
        if key not in FILE_KEYS:
            raise ConfigError(
                str(path), f"unknown key `{key}`", f"Use one of: {', '.join(FILE_KEYS)}"
            )
    metric = _text(spec, "metric", "exact_match", path)
    if metric not in METRICS:
        raise ConfigError(
            str(path), f"unknown metric {metric!r}", f"Use one of: {', '.join(METRICS)}"
        )
    for key, least in (("shots", 0), ("max_tokens", 1)):
        value = spec.get(key, least)
        if type(value) is not int or not least <= value <= MOST_TOKENS:
            remedy = f"Use a whole number from {least} to {MOST_TOKENS}"
            raise ConfigError(str(path), f"{key} is {str(value)[:40]}", remedy)
    chat = spec.get("chat")
    if chat not in (None, True, False):
        raise ConfigError(
            str(path), f"chat is {str(chat)[:40]}", "Use true or false, or leave it out"
        )
    folder = data or path.parent
    prompt = _text(spec, "prompt", "", path)
    if spec.get("data") is None:
        raise ConfigError(
            str(path), "lacks the key `data`", "Set it to the name of the file of items"
        )
    options = (metric, prompt, chat, images or ImageOptions())
    items = _own_items(folder / _text(spec, "data", "", path), *options)
    shots = int(spec.get("shots", 0))
    examples: Sequence[Item] = items
    if spec.get("examples") is not None:
        examples = _own_items(folder / _text(spec, "examples", "", path), *options)
    return ItemTask(
        *(_text(spec, "name", path.stem, path), metric, items, shots, examples),
        max_tokens=int(spec.get("max_tokens", CAPTION_TOKENS)),
        stop=_text(spec, "stop", "\n", path),
        separator=_text(spec, "separator", "\n", path),
        prefix=" " if prompt and not prompt[-1].isspace() else "",
        paper=_paper(spec.get("paper"), path),
        chat=chat,
    )


def _text(spec: Mapping[str, Any], key: str, default: str, path: Path) -> str:
    """A text in a task file; null is the default."""
    value = spec.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        what = f"{key} is {str(value)[:40]}, not a text"
        raise ConfigError(str(path), what, f'Write {key}: "..."')
    return str(value)


def _paper(value: Any, path: Path) -> dict[str, float]:
    """The figures of the paper by model size."""
    try:
        return {str(size): float(figure) for size, figure in dict(value or {}).items()}
    except (TypeError, ValueError) as error:
        what = f"paper is {str(value)[:60]!r}, not figures by model size"
        raise ConfigError(str(path), what, "Write it like {7B: 66.0}") from error


def _own_items(
    file: Path, metric: str, prompt: str, chat: bool | None, images: ImageOptions
) -> list[Item]:
    """The items of a file of questions; the key ``choices`` holds the candidates."""
    items = []
    for number, record in enumerate(read_records(file), start=1):
        question = question_of(record, Origin(str(file), number, images=images))
        where, document = question.prompt.where, question.prompt
        check_references(metric, question.references, where)
        if chat is False and set(document.roles or ()) - {USER}:
            what = "is a conversation of several messages, and the task has `chat: false`"
            raise DataError(where, what, "Remove `chat: false`, or write `content`")
        parts, roles = document.content, document.roles
        if prompt:
            parts = (*parts, TextPart(prompt))
            roles = None if roles is None else (*roles, USER)
        choices = _choices(record.get("choices"), question, metric)
        items.append(Item(document.id, parts, question.references, choices, roles))
    _check_ids(items, file)
    return items


def _choices(value: Any, question: Question, metric: str) -> tuple[str, ...]:
    """The candidates of an item; the references are among them if the metric compares them."""
    where = question.prompt.where
    if value is None:
        value = []
    is_texts = isinstance(value, list) and all(isinstance(v, str | int | float) for v in value)
    choices = tuple(map(str, value)) if is_texts else ()
    if not is_texts or not all(choice.strip() for choice in choices):
        what = "`choices` must be a list of texts that are not empty"
        raise DataError(where, what, "Write all candidates as texts")
    if metric not in CHOICE_METRICS:
        return choices
    if missing := [r for r in question.references if r not in choices]:
        what = f"{missing[0]!r} is not among its {len(choices)} `choices`"
        remedy = "List all candidates, including the answer, and write the answer as its text"
        raise DataError(where, what, remedy)
    if len(set(choices)) < len(choices):
        raise DataError(where, "lists a candidate twice in `choices`", "Remove one of them")
    return choices


def _check_ids(items: Sequence[Item], file: Path) -> None:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise DataError(
                str(file), f"the id {item.id} occurs twice", "Give each item its own id"
            )
        seen.add(item.id)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        what = f"has {len(found)} files {pattern}"
        raise DataError(str(folder), what, "Put exactly one such file there (docs/evaluation.md)")
    return found[0]
