"""A prompt never holds the answer, in whatever form the answer stands beside it."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_chameleon.data.documents.parse import read_prompts
from megatron_chameleon.data.documents.records import Origin, document_of, prompt_of, question_of
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import DataError

HERE = Origin("d.jsonl", 1)
TEXT = {"type": "text", "text": "Which?"}
ASKED = {"role": "user", "content": "Which?"}
TOLD = {"role": "assistant", "content": "zero"}


@pytest.mark.parametrize(
    ("record", "references"),
    [
        ({"prompt": "Which?", "answer": "zero"}, ("zero",)),
        ({"prompt": "Which?", "answer": ["zero", "0"]}, ("zero", "0")),
        ({"prompt": "Which?", "answer": 0}, ("0",)),
        ({"prompt": "Which?", "answer": [{"type": "text", "text": "zero"}]}, ("zero",)),
        (
            {
                "prompt": "Which?",
                "answer": [{"type": "image", "image": "a"}, {**TEXT, "text": "z"}],
            },
            ("z",),
        ),
        ({"prompt": "Which?", "answers": [{"answer": "zero"}, {"answer": "0"}]}, ("zero", "0")),
        ({"question": "Which?", "answers": {"text": ["zero"], "start": [3]}}, ("zero",)),
        ({"instruction": "Which?", "output": "zero"}, ("zero",)),
        ({"prompt": "Which?", "completion": "zero", "answer": "nought"}, ("nought",)),
        ({"messages": [ASKED, TOLD]}, ("zero",)),
        ({"messages": [ASKED, TOLD], "answer": "nought"}, ("nought",)),
        ({"messages": [ASKED], "answers": ["zero"]}, ("zero",)),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Which?"},
                    {"from": "gpt", "value": "zero"},
                ]
            },
            ("zero",),
        ),
        ({"content": [TEXT], "answer": "zero"}, ("zero",)),
        ({"content": [TEXT, {**TEXT, "text": "zero"}]}, ("zero",)),
        ({"text": "Which?", "answer": "zero", "choices": ["zero", "one"]}, ("zero",)),
    ],
)
def test_the_prompt_ends_with_the_question(
    record: dict[str, Any], references: tuple[str, ...]
) -> None:
    question = question_of(record, HERE)
    assert question.references == references
    assert question.prompt.content == (TextPart("Which?"),)
    assert question.prompt.roles in (None, ("user",))


def test_earlier_turns_stay_and_only_the_last_answer_goes() -> None:
    record = {"messages": [ASKED, TOLD, {**ASKED, "content": "And this?"}, TOLD]}
    prompt = prompt_of(record, HERE)
    assert [p.text for p in prompt.content] == ["Which?", "zero", "And this?"]
    assert len(document_of(record, HERE).content) == 4, "training reads all of it"


def test_places_of_pictures_are_shared_with_the_answer() -> None:
    record = {"prompt": "<image>x", "answer": "y<image>", "images": ["a", "b"]}
    assert [type(part).__name__ for part in prompt_of(record, HERE).content] == [
        "ImagePart",
        "TextPart",
    ]


def test_prompts_of_a_file(tmp_path: Path) -> None:
    lines = [{"prompt": "Which?", "answer": ["a", "b"]}, {"messages": [ASKED, TOLD]}, {"text": "x"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = read_prompts([tmp_path / "d.jsonl"])
    assert [[p.text for p in d.content] for d in prompts] == [["Which?"], ["Which?"], ["x"]]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (
            {"content": [TEXT, {**TEXT, "text": " zero\n"}], "answer": "zero"},
            "its last text is the answer itself ('zero')",
        ),
        ({"messages": [ASKED]}, "has neither `answers` nor a last text that is the answer"),
        ({"messages": [{"role": "system", "content": "x"}]}, "has no message of the user at its"),
        ({"text": "x", "answers": []}, "`answers` must be a list of texts"),
        ({"text": "x", "answer": [None]}, "`answer` must be a list of texts"),
        ({"text": "x", "answer": {"value": "y"}}, "`answer` must be a list of texts"),
    ],
)
def test_questions_without_an_answer_are_refused(record: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=r"^d\.jsonl:1: ") as caught:
        question_of(record, HERE)
    assert caught.value.what.startswith(what)
