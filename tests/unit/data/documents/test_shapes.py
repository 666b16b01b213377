"""The forms that published data sets have, and those that are refused by name."""

import json
from typing import Any

import pytest

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.records import LONGEST_NAME, parse_line, record_name
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.errors import DataError


def parse(record: dict[str, Any]) -> Document:
    return parse_line(json.dumps(record).encode(), "d.jsonl", 1)


def turns(document: Document) -> list[tuple[str, Any]]:
    assert document.roles is not None
    parts = [p.text if isinstance(p, TextPart) else ImagePart for p in document.content]
    return list(zip((role[0] for role in document.roles), parts, strict=True))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {
                "image": "0.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhich?"},
                    {"from": "gpt", "value": "Zero."},
                ],
            },
            [("u", ImagePart), ("u", "\nWhich?"), ("a", "Zero.")],
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "S"},
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "0.png", "detail": "low"}},
                            {"type": "input_text", "text": "Which?"},
                        ],
                    },
                    {"role": "assistant", "content": "Zero.", "tool_calls": []},
                ]
            },
            [("s", "S"), ("s", "\n\n"), ("u", ImagePart), ("u", "Which?"), ("a", "Zero.")],
        ),
        (
            {"instruction": "Name it.", "input": "3", "output": "three", "history": [["a", "b"]]},
            [("u", "a"), ("a", "b"), ("u", "Name it.\n\n3"), ("a", "three")],
        ),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, [("u", "Hi"), ("a", "Ho")]),
        (
            {"instruction": "Who?", "context": "Ann.", "response": "Ann"},
            [("u", "Who?\n\nAnn."), ("a", "Ann")],
        ),
        (
            {"images": [{"path": "a"}], "texts": [{"user": "x", "assistant": "y"}]},
            [("u", ImagePart), ("u", "x"), ("a", "y")],
        ),
        ({"question": "1 + 1?", "answer": 2}, [("u", "1 + 1?"), ("a", "2")]),
        (
            {
                "prompt": [{"role": "user", "content": "x"}],
                "completion": [{"role": "assistant", "content": "y"}],
            },
            [("u", "x"), ("a", "y")],
        ),
    ],
)
def test_conversations_in_other_spellings(
    record: dict[str, Any], expected: list[tuple[str, Any]]
) -> None:
    document = parse(record)
    assert turns(document) == expected and document.unused_keys == ()


def test_interleaved_lists_in_lines() -> None:
    document = parse({"images": [None, "0.png"], "texts": ["x", None]})
    assert document.content == (TextPart("x"), ImagePart("0.png"))


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"chosen": "a", "image": "x.png"}, "has a chosen answer, but no rejected one"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0] is from the role 'tool', and calls of tools are not read",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
            "messages[0] has tool_calls, and calls of tools are not read",
        ),
        ({"text": "x", "conversations": []}, "has the keys text and conversations at once"),
        ({"instruction": "x", "history": ["a"]}, "history must be a list of pairs"),
        ({"target": "x", "\x1b[31m" + "k" * 99: 1}, "has none of the keys content, text, messages"),
    ],
)
def test_what_is_no_document_is_refused_by_its_name(record: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(record)
    assert caught.value.what.startswith(what)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1.0, "1.0"),
        (True, "True"),
        (7, "7"),
        (None, "default"),
        ("", "default"),
        (["x"], '["x"]'),
        ({"b": 1, "a": "ü"}, '{"a": "ü", "b": 1}'),
        (float("nan"), "NaN"),
    ],
)
def test_names_of_any_type_become_strings(value: Any, name: str) -> None:
    assert record_name(value, "default") == name


def test_long_names_are_cut_and_stay_apart() -> None:
    names = {record_name("x" * 10**6 + end, "") for end in "ab"}
    assert len(names) == 2 and all(len(name) <= LONGEST_NAME for name in names)


def test_a_byte_order_mark_in_a_text_is_not_read() -> None:
    assert parse({"text": "\ufeffx"}).content == (TextPart("x"),)
    assert turns(parse({"prompt": "\ufeffx", "answer": "\ufeffy"})) == [("u", "x"), ("a", "y")]
