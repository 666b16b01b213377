"""Reads the items of image-to-text tasks and of the user's own tasks.

DIR/coco/dataset_coco.json                         Karpathy's splits
DIR/coco/val2014/COCO_val2014_000000391895.jpg     and the images, as the JSON names them
DIR/vqav2/*val2014_questions.json, *val2014_annotations.json, and the same for train2014
DIR/vqav2/{train,val}2014/COCO_val2014_000000262148.jpg
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_chameleon.data.documents.image_part import image_part
from megatron_chameleon.data.documents.records import parse_line
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.evaluation.asking.record_files import read_json, read_records, require_keys
from megatron_chameleon.evaluation.tasks.catalogue import TaskInfo
from megatron_chameleon.evaluation.tasks.items import (
    CHOICE_METRICS,
    METRICS,
    Item,
    ItemTask,
    check_image,
)

CAPTION_TOKENS = 30
"""The paper's limit (section 5.2)."""
VQA_TOKENS = 10
FILE_KEYS = (
    *("name", "data", "metric", "shots", "examples", "prompt", "max_tokens", "stop"),
    *("separator", "paper"),
)


def read_captions(info: TaskInfo, folder: Path) -> ItemTask:
    """Read the test split of Karpathy's JSON. Examples come from its training split.

    Raises:
        DataError: A file or image is missing, or the JSON is not one of Karpathy's.
    """
    file = _only(folder, "dataset_*.json")
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(str(file), "has no list `images`", "Pass one of Karpathy's split files")
    splits: dict[str, list[Item]] = {"test": [], "train": []}
    for index, record in enumerate(content["images"]):
        where = f"{file}: image {index}"
        require_keys(record, ("filename", "split", "sentences"), where)
        split = "train" if record["split"] == "restval" else record["split"]
        if split not in splits:
            continue
        path = folder / record.get("filepath", "") / record["filename"]
        captions = tuple(str(sentence["raw"]).strip() for sentence in record["sentences"])
        if not captions:
            raise DataError(where, "has no sentences", "Remove the image from the file")
        image = (check_image(path, where) if split == "test" else image_part(str(path), "", where),)
        splits[split].append(Item(record["filename"], image, captions))
    if not splits["test"]:
        raise DataError(str(file), "has no images of the split `test`", "Pass the complete file")
    return ItemTask(
        *(info.name, info.metric, splits["test"], info.shots, splits["train"]),
        max_tokens=CAPTION_TOKENS,
        paper=info.paper,
    )


def read_vqa(info: TaskInfo, folder: Path) -> ItemTask:
    """Read VQAv2's validation questions. Examples come from its training questions.

    The annotations of the test splits are not public.

    Raises:
        DataError: A file or image is missing or broken.
    """
    items = _vqa_items(folder, "val2014")
    examples = _vqa_items(folder, "train2014") if info.shots else []
    return ItemTask(
        *(info.name, info.metric, items, info.shots, examples),
        max_tokens=VQA_TOKENS,
        prefix=" ",
        paper=info.paper,
    )


def _vqa_items(folder: Path, split: str) -> list[Item]:
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
        answers[record["question_id"]] = tuple(str(a["answer"]) for a in record["answers"])
    items = []
    for index, record in enumerate(lists["questions"]):
        where = f"{files['questions']}: question {index}"
        require_keys(record, ("question_id", "image_id", "question"), where)
        if not answers.get(record["question_id"]):
            what = f"question {record['question_id']} has no answers in {files['annotations'].name}"
            raise DataError(where, what, "Pass the two files of the same split")
        name = f"COCO_{split}_{int(record['image_id']):012d}.jpg"
        image = image_part(str(folder / split / name), "", where)
        if split == "val2014":
            image = check_image(folder / split / name, where)
        said = answers[record["question_id"]]
        most = max(said, key=said.count)
        references = tuple(sorted(said, key=lambda answer: answer != most))
        text = TextPart(f"Question: {record['question']} Short answer:")
        items.append(Item(str(record["question_id"]), (image, text), references))
    return items


def read_task_file(path: Path, data: Path | None) -> ItemTask:
    """Read one of the user's own tasks.

    Args:
        path: The YAML file of the task.
        data: The folder of its files; None means the folder of the YAML file.

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
    metric = str(spec.get("metric", "exact_match"))
    if metric not in METRICS:
        raise ConfigError(
            str(path), f"unknown metric {metric!r}", f"Use one of: {', '.join(METRICS)}"
        )
    for key, least in (("shots", 0), ("max_tokens", 1)):
        if key in spec and (not isinstance(spec[key], int) or spec[key] < least):
            raise ConfigError(
                str(path), f"{key} is {spec[key]!r}", f"Use a whole number from {least} on"
            )
    folder = data or path.parent
    prompt = str(spec.get("prompt", ""))
    if "data" not in spec:
        raise ConfigError(
            str(path), "lacks the key `data`", "Set it to the name of the file of items"
        )
    items = _own_items(folder / str(spec["data"]), metric, prompt)
    shots = int(spec.get("shots", 0))
    examples: Sequence[Item] = items
    if "examples" in spec:
        examples = _own_items(folder / str(spec["examples"]), metric, prompt)
    return ItemTask(
        *(str(spec.get("name", path.stem)), metric, items, shots, examples),
        max_tokens=int(spec.get("max_tokens", CAPTION_TOKENS)),
        stop=str(spec.get("stop", "\n")),
        separator=str(spec.get("separator", "\n")),
        prefix=" " if prompt and not prompt[-1].isspace() else "",
        paper={str(size): float(value) for size, value in dict(spec.get("paper") or {}).items()},
    )


def _own_items(file: Path, metric: str, prompt: str) -> list[Item]:
    """The items of a file of documents.

    The key ``answers`` or the document's last text holds the answer; the key ``choices`` holds the
    candidates.
    """
    items = []
    for number, record in enumerate(read_records(file), start=1):
        document = parse_line(orjson.dumps(record), file, number)
        parts = list(document.content)
        references = _references(record, document.where)
        if not references:
            last = parts.pop() if parts else None
            if not isinstance(last, TextPart) or not last.text.strip():
                what = "has neither `answers` nor a last text that is the answer"
                raise DataError(document.where, what, "Add `answers`, a list of texts")
            references = (last.text,)
        if prompt:
            parts.append(TextPart(prompt))
        choices = tuple(map(str, record.get("choices") or ()))
        if metric in CHOICE_METRICS and not set(references) <= set(choices):
            what = f"{references[0]!r} is not among its {len(choices)} `choices`"
            raise DataError(document.where, what, "List all candidates, including the answer")
        items.append(Item(document.id, tuple(parts), references, choices))
    _check_ids(items, file)
    return items


def _references(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    answers = record.get("answers", record.get("answer"))
    if answers is None:
        return ()
    if isinstance(answers, str):
        return (answers,)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise DataError(where, "`answers` must be a list of texts", "Write at least one text")
    return tuple(answers)


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
