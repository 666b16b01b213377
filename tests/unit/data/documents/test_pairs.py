"""Pairs of a chosen and a rejected answer: every spelling gives the same two conversations."""

from typing import Any

import pytest

from megatron_chameleon.data.documents.conversations import turns_of
from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.records import (
    Origin,
    document_of,
    prompt_of,
    question_of,
)
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.errors import DataError

USER = {"role": "user", "content": "Hi"}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def parse(record: dict[str, Any]) -> Document:
    return document_of(record, Origin("pairs.jsonl", 1))


def told(document: Document) -> list[tuple[Any, bool, bool]]:
    """The texts and pictures of each turn, whether it begins, and whether the loss is on it."""
    return [
        (
            [p.text if isinstance(p, TextPart) else p.image for p in turn.parts],
            turn.begins,
            turn.is_answer,
        )
        for turn in turns_of(document)
    ]


TWO = [(["Hi"], True, False), (["yes"], False, True), (["Hi"], True, False), (["no"], False, True)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]},
        {"chosen": [USER, says("yes")], "rejected": [USER, says("no")]},
        {"prompt": "Hi", "chosen": [USER, says("yes")], "rejected": [USER, says("no")]},
        {"messages": [USER], "chosen": says("yes"), "rejected": says("no")},
        {"question": "Hi", "chosen": "yes", "rejected": "no", "answer": "never read"},
        {"instruction": "Hi", "input": "", "chosen": "yes", "rejected": "no"},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {"prompt": "Hi", "chosen": [{"type": "text", "text": "yes"}], "rejected": "no"},
    ],
)
def test_every_spelling_is_the_same_pair(record: dict[str, Any]) -> None:
    assert told(parse(record)) == TWO


def test_only_the_answers_that_differ_are_trained() -> None:
    begin = [USER, says("Hello."), {"role": "user", "content": "Draw a 3"}]
    drawn = {"role": "assistant", "content": [{"type": "image", "image": "good.png"}]}
    record = {"chosen": [*begin, drawn], "rejected": [*begin, says("I cannot")]}
    turns = told(parse(record))
    assert [is_answer for *_, is_answer in turns] == [False, False, False, True] * 2
    assert turns[3][0] == ["good.png"] and turns[7][0] == ["I cannot"]


def test_answers_with_the_same_beginning_differ_as_a_whole() -> None:
    pictures = [{"type": "image", "image": name} for name in ("a.png", "b.png")]
    text = {"type": "text", "text": "Here: "}
    record = {"prompt": "Hi", "chosen": [text, pictures[0]], "rejected": [text, pictures[1]]}
    assert [turn for turn in told(parse(record)) if turn[2]] == [
        (["Here: ", "a.png"], False, True),
        (["Here: ", "b.png"], False, True),
    ]


def test_a_picture_of_the_prompt_is_in_both_conversations() -> None:
    record = {"prompt": "<image>What?", "chosen": "A", "rejected": "B", "images": ["x.png"]}
    content = parse(record).content
    assert [part for part in content if isinstance(part, ImagePart)] == [ImagePart("x.png")] * 2


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"chosen": "a", "rejected": "b"}, "has chosen and rejected answers, but no prompt"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "x", "chosen": [], "rejected": "a"}, "chosen must be a text, parts or mess"),
        ({"prompt": "x", "chosen": True, "rejected": "a"}, "chosen must be a text, parts or mess"),
        (
            {"chosen": [USER, says("a")], "rejected": [{**USER, "content": "Bye"}, says("a")]},
            "chosen and rejected answer different prompts",
        ),
        ({"chosen": [USER], "rejected": [USER, says("a")]}, "chosen does not end with an answer"),
        (
            {
                "chosen": [USER, says("a"), USER, says("b")],
                "rejected": [USER, says("a"), {**USER, "content": "Bye"}, says("b")],
            },
            "chosen and rejected answer different prompts",
        ),
        (
            {"prompt": "other", "chosen": [USER, says("a")], "rejected": [USER, says("b")]},
            "the conversation in chosen does not hold the text of the prompt",
        ),
        ({"messages": "Hi", "chosen": "a", "rejected": "b"}, "messages must be a list"),
        ({"prompt": "x", "chosen": "a", "rejected": " "}, "answer[0] (assistant) is empty"),
    ],
)
def test_what_is_no_pair_is_refused(record: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(record)
    assert caught.value.what.startswith(what)


def test_a_pair_is_asked_without_its_answers() -> None:
    record = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
    origin = Origin("pairs.jsonl", 1)
    assert prompt_of(record, origin).content == (TextPart("Hi"),)
    assert question_of(record, origin).references == ("yes",)
