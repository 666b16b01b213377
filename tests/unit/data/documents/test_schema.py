"""The schema of a document: what is read from one line, and what is said of each fault."""

import base64
from pathlib import Path

import pytest

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.records import parse_line
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import DataError

PATH = Path("folder/data.jsonl")


def parse(line: str):
    return parse_line(line.encode(), PATH, 3)


def test_content_keeps_its_order_and_resolves_paths():
    document = parse(
        '{"id": "a", "source": "s", "label": 7, "content": [{"type": "text", "text": "x"},'
        ' {"type": "image", "image": "sub/i.png"}, {"type": "text", "text": "y"}]}'
    )
    assert document.content == (TextPart("x"), ImagePart("folder/sub/i.png"), TextPart("y"))
    assert (document.id, document.corpus_name, document.where) == ("a", "s", "folder/data.jsonl:3")
    assert document.roles is None


def test_text_lines_get_an_id_and_a_source():
    document = parse('{"text": "hello", "id": null}')
    assert document.content == (TextPart("hello"),)
    assert (document.id, document.corpus_name) == ("data.jsonl:3", "data")


def test_chat_keeps_a_role_for_each_part():
    document = parse(
        '{"messages": [{"role": "user", "content": [{"type": "image", "image": "i.png"},'
        ' {"type": "text", "text": "what?"}]}, {"role": "assistant", "content": "seven"}]}'
    )
    assert document.content == (
        ImagePart("folder/i.png"),
        TextPart("what?"),
        TextPart("seven"),
    )
    assert document.roles == ("user", "user", "assistant")


def test_data_uri_becomes_bytes():
    uri = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    document = parse(f'{{"content": [{{"type": "image", "image": "{uri}"}}]}}')
    assert document.content == (ImagePart(b"\x89PNG"),)


def test_byte_order_mark_is_ignored_on_the_first_line():
    assert parse_line(b'\xef\xbb\xbf{"text": "x"}', PATH, 1).content == (TextPart("x"),)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": "half', "the line is not valid JSON (Unterminated string"),
        ("[1]", "the line must be a JSON object, not list"),
        ('{"txt": "x"}', "has none of the keys content, text, messages and prompt (it has txt)"),
        ('{"text": "x", "content": []}', "has the keys content and text at once"),
        ('{"text": 3}', "text must be a string, not int"),
        ('{"content": []}', "content must be a list with at least one part"),
        ('{"content": ["x"]}', "content[0] must be an object with a type"),
        ('{"content": [{"type": "audio"}]}', "content[0] has the unknown type 'audio'"),
        ('{"content": [{"type": "text"}]}', "content[0] has no string under the key 'text'"),
        ('{"messages": []}', "messages must be a list with at least one message"),
        (
            '{"messages": [{"content": "x"}]}',
            "messages[0] must be an object with a role and content",
        ),
        ("[" * 100_000, "the line is not valid JSON (maximum recursion depth"),
    ],
)
def test_broken_line_names_file_and_line_and_fault(line, what):
    with pytest.raises(DataError) as caught:
        parse(line)
    assert caught.value.where == "folder/data.jsonl:3"
    assert caught.value.what.startswith(what)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_a_broken_line():
    with pytest.raises(
        DataError, match=r"data.jsonl:3: the line is not valid JSON .*can't decode byte 0xff"
    ):
        parse_line(b'{"text": "\xff"}', PATH, 3)
