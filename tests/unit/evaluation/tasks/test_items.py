"""Image-to-text tasks and the user's own tasks: files, prompts, scores and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_chameleon.errors import ChameleonError, ConfigError, DataError
from megatron_chameleon.evaluation.asking.asker import Asker, prompt_as_json
from megatron_chameleon.evaluation.tasks.catalogue import TaskInfo
from megatron_chameleon.evaluation.tasks.item_files import read_captions, read_task_file, read_vqa
from megatron_chameleon.evaluation.tasks.items import (
    SCORERS,
    ItemTask,
    _with_examples,
    evaluate_items,
)
from megatron_chameleon.inference.answers.stop_strings import cut_at_stop

CAPTION = TaskInfo("coco_caption", "caption", "CIDEr", 2, {"34B": 120.2}, data="coco")
VQA = TaskInfo("vqav2", "vqa", "accuracy", 2, {"34B": 66.0}, data="vqav2")


def picture(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)
    return path


def karpathy(folder: Path) -> Path:
    images = []
    for number, split in enumerate(("test", "train", "restval", "test", "val", "train")):
        name = picture(folder / f"val2014/{number}.jpg").name
        sentences = [{"raw": f"caption {n} of {number} "} for n in range(2)]
        images.append(
            {"filepath": "val2014", "filename": name, "split": split, "sentences": sentences}
        )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return folder


def vqa_files(folder: Path) -> Path:
    for split, first in (("val2014", 1), ("train2014", 5)):
        questions, annotations = [], []
        for number in range(first, first + 3):
            picture(folder / split / f"COCO_{split}_{number:012d}.jpg")
            question = {
                "image_id": number,
                "question_id": number * 10,
                "question": f"Is it {number}?",
            }
            answers = [{"answer": "no"}] * 2 + [{"answer": "yes"}] * 8
            questions.append(question)
            annotations.append({"question_id": number * 10, "answers": answers})
        for kind, content in (("questions", questions), ("annotations", annotations)):
            name = f"v2_OpenEnded_{split}_{kind}.json"
            (folder / name).write_text(json.dumps({kind: content}))
    return folder


def say(asker: Asker, monkeypatch: pytest.MonkeyPatch, *answers: str) -> list:
    """Make the model give these answers, and return what it is asked."""
    asked: list = []

    def write(prompts: list, options: Any) -> list[str]:
        asked.extend(prompts)
        return [cut_at_stop(answer, options.stop) for answer in answers]

    monkeypatch.setattr(asker, "write", write)
    return asked


def test_captions_have_examples_before_them(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = read_captions(CAPTION, karpathy(tmp_path))
    assert [item.id for item in task.items] == ["0.jpg", "3.jpg"]
    assert {item.id for item in task.examples} == {"1.jpg", "2.jpg", "5.jpg"}
    assert task.max_tokens == 30
    asked = say(asker, monkeypatch, "caption 0 of 0\nand more", "caption 1 of 3")
    result = evaluate_items(asker, task)
    image, text, image2, _, image3 = asked[0]
    assert text.text.startswith("caption 0 of ") and text.text.endswith("\n")
    assert image3.image == str(tmp_path / "val2014/0.jpg") and image2.image != image.image
    assert [sample.answer for sample in result.scored_items] == ["caption 0 of 0", "caption 1 of 3"]
    assert result.summary()["value"] > 100
    assert result.summary()["settings"]["tokenizer"] in ("stanford", "nltk")


def test_captions_of_a_real_model(asker: Asker, tmp_path: Path) -> None:
    task = read_captions(CAPTION, karpathy(tmp_path))
    result = evaluate_items(asker, task, limit=1, batch_size=1)
    assert [sample.id for sample in result.scored_items] == ["0.jpg"]


def test_questions_are_asked_and_scored(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = read_vqa(VQA, vqa_files(tmp_path))
    asked = say(asker, monkeypatch, "Yes", " no", "maybe")
    result = evaluate_items(asker, task)
    assert [sample.scores["accuracy"] for sample in result.scored_items] == pytest.approx(
        [1, 0.6, 0]
    )
    assert asked[0][1].text.startswith("Question: Is it ")
    assert asked[0][1].text.endswith("Short answer: yes\n")
    assert asked[0][-1].text == "Question: Is it 1? Short answer:"


def own_task(folder: Path, records: list[dict[str, Any]], **spec: Any) -> Path:
    (folder / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "task.yaml").write_text(json.dumps({"data": "items.jsonl", **spec}))
    return folder / "task.yaml"


def test_a_choice_about_a_picture(asker: Asker, tmp_path: Path) -> None:
    name = picture(tmp_path / "a.png").name
    content = [{"type": "image", "image": name}]
    record = {"id": "1", "content": content, "choices": ["three", "four"], "answer": "four"}
    task = read_task_file(own_task(tmp_path, [record], metric="acc", prompt="It is"), None)
    (sample,) = evaluate_items(asker, task).scored_items
    scores = asker.score([([*task.items[0].prompt], f" {c}") for c in record["choices"]])
    assert sample.answer == dict(
        zip(record["choices"], [s.log_likelihood for s in scores], strict=True)
    )
    best = max(sample.answer, key=sample.answer.get)
    assert sample.scores["acc"] == float(best == "four")


def test_the_last_text_of_a_document_is_the_answer(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "a handwritten 3"}]
    task = read_task_file(own_task(tmp_path, [{"content": parts}], metric="first_digit"), None)
    asked = say(asker, monkeypatch, "the digit three")
    result = evaluate_items(asker, task)
    assert len(asked[0]) == 1 and result.summary()["value"] == 100


def test_a_conversation_is_asked_as_in_fine_tuning(asker: Asker, tmp_path: Path) -> None:
    name = picture(tmp_path / "a.png").name
    part = {"type": "image", "image": name}
    records: list[dict[str, Any]] = [
        {"id": "0", "prompt": [part, {"type": "text", "text": "Which digit?"}], "answer": "zero"},
        {"id": "1", "messages": [{"role": "user", "content": "Two?"}], "answers": ["2", "two"]},
    ]
    separator = {"token": asker.session.tokenizer.vocabulary.separator}
    task = read_task_file(own_task(tmp_path, records, max_tokens=2), None)
    result = evaluate_items(asker, task)
    first, second = result.scored_items
    assert first.prompt == [{"image": str(tmp_path / "a.png")}, "Which digit?"]
    assert first.reference == ["zero"] and second.reference == ["2", "two"]
    assert result.settings["asked_as_conversations"] == 2
    prompts = [_with_examples(asker, task, item, 1) for item in task.items]
    assert prompt_as_json(prompts[1].asked) == ["Two?", separator]
    with_shots = read_task_file(own_task(tmp_path, records, shots=1), None)
    shown = _with_examples(asker, with_shots, with_shots.items[1], 1)
    assert [turn["role"] for turn in shown.shown] == ["user", "assistant", "user"]
    assert "two" not in json.dumps(shown.shown) and "zero" in json.dumps(shown.shown)
    plain = read_task_file(own_task(tmp_path, records, chat=False), None)
    assert prompt_as_json(_with_examples(asker, plain, plain.items[1], 1).asked) == ["Two?"]
    texts = [{"text": "Two?", "answer": 2}]
    chat = read_task_file(own_task(tmp_path, texts, chat=True), None)
    assert prompt_as_json(_with_examples(asker, chat, chat.items[0], 1).asked)[-1] == separator


def test_shots_never_show_the_item_itself(asker: Asker, tmp_path: Path) -> None:
    records = [{"id": str(n), "text": f"q{n}", "answers": [f"a{n}"]} for n in range(3)]
    task = read_task_file(own_task(tmp_path, records, shots=2), None)
    for sample in evaluate_items(asker, task).scored_items:
        (prompt,) = sample.prompt
        assert prompt.endswith(f"q{sample.id}") and f"a{sample.id}" not in prompt
        assert prompt.count("\n") == 2


@pytest.mark.parametrize(
    ("metric", "answer", "references", "score"),
    [
        ("exact_match", "Dog.", ["dog"], 1.0),
        ("exact_match", "dogs", ["dog"], 0.0),
        ("contains", "it is a big dog", ["cat", "Dog"], 1.0),
        ("contains", "anything", [""], 0.0),
        ("words", "a red bus", ["red car", "the red big bus"], 0.5),
        ("first_digit", "none", ["a three"], 0.0),
        ("first_digit", "none", ["no number"], 0.0),
    ],
)
def test_scorers(metric: str, answer: str, references: list[str], score: float) -> None:
    assert SCORERS[metric](answer, references) == score


def read_own(folder: Path, record: dict[str, Any], **spec: Any) -> ItemTask:
    return read_task_file(own_task(folder, [record], **spec), None)


@pytest.mark.parametrize(
    ("record", "spec", "message"),
    [
        ({"text": "a", "answer": "b"}, {"metrik": "acc"}, "unknown key `metrik`"),
        ({"text": "a", "answer": "b"}, {"metric": "bleu"}, "unknown metric 'bleu'"),
        ({"text": "a", "answer": "b"}, {"shots": -1}, "shots is -1"),
        ({"text": "a", "answer": "b"}, {"metric": "acc"}, "'b' is not among its 0 `choices`"),
        ({"text": " "}, {}, "has neither `answers` nor a last text"),
        ({"text": "a", "answers": [None]}, {}, "`answers` must be a list of texts"),
        ({"answers": ["b"]}, {}, "has none of the keys content, text, messages and prompt"),
        ({"text": "a", "answer": "b"}, {"data": "gone.jsonl"}, "gone.jsonl: no such file"),
        ({"text": "a", "answer": "b"}, {"chat": "yes"}, "chat is yes. Use true or false"),
        ({"text": "a", "answer": "b"}, {"stop": ["a"]}, r"stop is \['a'\], not a text"),
        ({"text": "a", "answer": "b"}, {"shots": True}, "shots is True. Use a whole number"),
        ({"text": "a", "answer": "b"}, {"max_tokens": 10**30}, "max_tokens is 1000"),
        ({"text": "a", "answer": "b"}, {"paper": "7B"}, "paper is '7B', not figures by model"),
        ({"text": "a", "answer": " "}, {}, "items.jsonl:1: nothing is left of the answer ' ' to"),
        ({"text": "a", "answer": "b", "choices": "bc"}, {"metric": "acc"}, "`choices` must be a"),
        ({"text": "a", "answer": "b", "choices": ["b", ""]}, {"metric": "acc"}, "`choices` must"),
        ({"text": "a", "answer": 1, "choices": ["b", "c"]}, {"metric": "acc"}, "'1' is not among"),
        ({"text": "a", "answer": "b", "choices": ["b", "b"]}, {"metric": "acc"}, "lists a candid"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            {"chat": False},
            "is a conversation of several messages, and the task has `chat: false`",
        ),
    ],
)
def test_mistakes_in_own_tasks(
    tmp_path: Path, record: dict[str, Any], spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(ChameleonError, match=message):
        read_own(tmp_path, record, **spec)


def test_mistakes_in_published_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 0 files dataset_\*\.json"):
        read_captions(CAPTION, tmp_path)
    (karpathy(tmp_path) / "val2014/3.jpg").unlink()
    with pytest.raises(DataError, match=r"image 3: the image .*3\.jpg does not exist"):
        read_captions(CAPTION, tmp_path)
    entry = {"filename": "3.jpg", "split": "val", "sentences": [{}]}
    for value in (entry | {"split": "test"}, 5, entry | {"split": "test", "sentences": 5}):
        (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [value]}))
        with pytest.raises(DataError, match=r"image 0: (a value is missing or of|the record is a)"):
            read_captions(CAPTION, tmp_path)
    (tmp_path / "dataset_coco.json").write_text("[]")
    with pytest.raises(DataError, match="has no list `images`"):
        read_captions(CAPTION, tmp_path)
    (tmp_path / "dataset_coco.json").write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        read_captions(CAPTION, tmp_path)
    vqa_files(tmp_path / "vqa")
    name = "v2_OpenEnded_val2014_annotations.json"
    (tmp_path / "vqa" / name).write_text('{"annotations": []}')
    with pytest.raises(DataError, match="question 10 has no answers"):
        read_vqa(VQA, tmp_path / "vqa")


def test_too_few_examples_are_an_error(asker: Asker, tmp_path: Path) -> None:
    task = read_own(tmp_path, {"text": "a", "answer": "b"}, shots=1)
    with pytest.raises(DataError, match="there are 0 items to draw 1 examples from"):
        evaluate_items(asker, task)
    with pytest.raises(ConfigError, match="has no keys"):
        (tmp_path / "task.yaml").write_text("just text")
        read_task_file(tmp_path / "task.yaml", None)
