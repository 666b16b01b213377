"""Pictures beside a text: read at their places, or the document is dropped; never passed over."""

import base64
import json
import tracemalloc
from typing import Any

import pytest

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.media import medium_of
from megatron_chameleon.data.documents.records import Origin, document_of, parse_line
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.errors import DataError

PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
BASE64 = base64.b64encode(PNG).decode()


def parse(record: dict[str, Any]) -> Document:
    return parse_line(json.dumps(record).encode(), "f/d.jsonl", 1)


def shown(document: Document) -> list[Any]:
    """Texts, and the images as paths below the folder or bytes in brackets."""
    return [
        part.text
        if isinstance(part, TextPart)
        else [part.image.removeprefix("f/") if isinstance(part.image, str) else part.image]
        for part in document.content
    ]


def ask(text: Any, **more: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "Zero."}
    return {"messages": [{"role": "user", "content": text}, answer], **more}


@pytest.mark.parametrize(
    ("record", "content"),
    [
        ({"text": "A zero.", "image": "0.png"}, [["0.png"], "A zero."]),
        ({"text": "A <image> zero.", "image": "0.png"}, ["A ", ["0.png"], " zero."]),
        ({"text": "a<image>b<image>", "images": ["0", "1"]}, ["a", ["0"], "b", ["1"]]),
        ({"text": "x", "images": [{"bytes": None, "path": "0"}]}, [["0"], "x"]),
        ({"text": "x", "Image": {"url": "0.png"}}, [["0.png"], "x"]),
        ({"text": "x", "img": BASE64}, [[PNG], "x"]),
        ({"text": "x", "picture": f"data:image/png;base64,{BASE64}"}, [[PNG], "x"]),
        ({"text": "x", "image_2": "b", "image_1": "a"}, [["a"], ["b"], "x"]),
        ({"text": "<image 2>x<image 1>", "images": ["a", "b"]}, [["b"], "x", ["a"]]),
        ({"text": "<|image_1|>\nx", "images": ["a"]}, [["a"], "\nx"]),
        ({"text": "x<IMAGE>", "image": "a"}, ["x", ["a"]]),
        ({"text": "", "image": "a"}, [["a"]]),
        ({"file_name": "a.png", "text": "x"}, [["a.png"], "x"]),
        ({"image_path": "a.png", "url": "https://x.org/a.png", "text": "x"}, [["a.png"], "x"]),
        ({"caption": "x", "image": "a"}, [["a"], "x"]),
        ({"content": [{"type": "text", "text": "x"}], "image": "a"}, [["a"], "x"]),
        (
            {"content": [{"type": "text", "text": "x"}, {"type": "image"}], "image": "a"},
            ["x", ["a"]],
        ),
        (ask("<image>Which?", images=["a"]), [["a"], "Which?", "Zero."]),
        (ask("Which?", image="a"), [["a"], "Which?", "Zero."]),
        (
            ask([{"type": "image"}, {"type": "text", "text": "x"}], images=["a"]),
            [["a"], "x", "Zero."],
        ),
        (
            {"system": "S", **ask("Which?", image="a")},
            ["S", "\n\n", ["a"], "Which?", "Zero."],
        ),
        (
            {"messages": [{"role": "user", "content": "x", "images": ["a"]}]},
            [["a"], "x"],
        ),
        ({"prompt": "<image>x", "answer": "y", "image": "a"}, [["a"], "x", "y"]),
        ({"text": "x", "image": None, "images": [], "photo": ""}, ["x"]),
        ({"text": "an <image> tag of SVG"}, ["an <image> tag of SVG"]),
        ({"text": "<image></image> of XML"}, ["<image></image> of XML"]),
        ({"content": [{"type": "text", "text": "<image> is a mark"}]}, ["<image> is a mark"]),
    ],
)
def test_pictures_are_read_at_their_places(record: dict[str, Any], content: list[Any]) -> None:
    document = parse(record)
    assert shown(document) == content
    assert document.roles is None or len(document.roles) == len(content)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (
            {"text": "a<image>b<image>", "image": "a"},
            "has 2 places for pictures (<image>) and 1 pi",
        ),
        (
            {"text": "a<image>", "images": ["a", "b"]},
            "has 1 place for pictures (<image>) and 2 pic",
        ),
        ({"text": "<image>\nA zero."}, "has 1 place for pictures (<image>) and 0 pictures"),
        (ask("Is <image> a digit?"), "has 1 place for pictures (<image>) and 0 pictures"),
        (ask([{"type": "image"}, {"type": "text", "text": "x"}]), "has 1 place for pictures"),
        ({"text": "<image 3>x<image 1>", "images": ["a", "b"]}, "numbers its 2 pictures in a way"),
        ({"text": "<image>a.png</image>", "images": ["a"]}, "has a picture's name between <image>"),
        ({"text": "x", "mask": "m.png", "image": "a"}, "the key mask holds a picture, and no pic"),
        ({"text": "x", "meta": {"views": [{"file": "m.JPG"}]}}, "the key meta holds a picture"),
        ({"text": "x", "thumb": BASE64}, "the key thumb holds a picture"),
        ({"text": "x", "thumb": "data:image/png;base64,xx"}, "the key thumb holds a picture"),
        ({"text": "x", "image": 7}, "the key image must hold a picture, not a number"),
        (
            {"text": "x", "image": {"id": 7}},
            "the key image must hold a picture, not an object with",
        ),
        ({"text": "x", "image": [[0, 255]]}, "the key image must hold a picture, not a number"),
        ({"text": "x", "image": "a", "images": ["b"]}, "has pictures in the keys image and images"),
        ({"text": "x", "image_path": "a.png", "file": "b.png"}, "names different pictures in the"),
        ({"text": "x", "video": "clip"}, "the key video holds a video, which is not read"),
        ({"text": "x", "audio": {"array": [0.1], "sampling_rate": 8}}, "the key audio holds sound"),
        ({"text": "x", "recording": "a.wav"}, "the key recording holds sound"),
        ({"text": "x", "path": "a.mp4"}, "the key path holds a video"),
        ({"caption": "x"}, "has a caption, but no picture"),
        ({"text": BASE64}, "has the letters of an encoded picture where a text is expected"),
        (ask(f"data:image/png;base64,{BASE64}"), "has the letters of an encoded picture"),
        (
            {"content": [{"type": "text", "text": "x", "image": "a.png"}]},
            "a part has a picture in the key image",
        ),
        (
            {"content": [{"type": "image", "image": "a"}], "image": "b"},
            "has 1 picture in its text and 1 picture beside it without a place",
        ),
    ],
)
def test_pictures_that_cannot_be_placed_drop_the_document(
    record: dict[str, Any], what: str
) -> None:
    with pytest.raises(DataError) as caught:
        parse(record)
    assert caught.value.what.startswith(what)
    assert "\n" not in str(caught.value)


def test_a_link_is_read_only_if_it_is_the_only_picture() -> None:
    link = "https://example.org/pictures/a.jpg?size=2"
    assert parse({"text": "x", "image": "a.png", "url": link}).unused_keys == ("url",)
    assert parse({"text": "x", "url": "https://example.org/page"}).unused_keys == ("url",)
    nested = {"images": ["a", None], "texts": [None, "x"], "metadata": [{"src": link}, None]}
    assert parse(nested).unused_keys == ("metadata",)
    part = {"type": "image", "image": "a.png"}
    assert parse({"content": [part], "file_name": "b.png"}).unused_keys == ("file_name",)
    with pytest.raises(DataError, match="the key metadata holds a picture"):
        parse({"text": "x", "metadata": [{"src": link}]})
    with pytest.raises(DataError):
        document = parse({"text": "x", "url": link})
        next(part for part in document.content if isinstance(part, ImagePart)).open()


def test_millions_of_marks_take_no_memory() -> None:
    text = "<image>" * 10**5
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"has 100,000 places .* and 1 picture"):
            document_of({"text": text, "image": "a"}, Origin("d.jsonl", 1))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_answers_that_generate_wrote_are_documents() -> None:
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "x"}]
    document = parse({"id": "0000", "prompt": parts, "content": parts[1:], "token_ids": [5]})
    assert shown(document) == ["x"] and set(document.unused_keys) == {"prompt", "token_ids"}


def test_the_other_keys_are_named() -> None:
    document = parse(
        {"text": "x", "id": "1", "source": "s", "score": 0.5, "lang": "en", "no": None}
    )
    assert document.unused_keys == ("score", "lang")
    message = {"role": "user", "content": [{"type": "text", "text": "x", "cache": 1}], "name": "n"}
    assert parse({"messages": [message]}).unused_keys == ("content.cache", "messages.name")


@pytest.mark.parametrize(
    ("value", "medium"),
    [
        ("a b/c.PNG", "image"),
        (b"\xff\xd8\xff\xe0", "image"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image"),
        (b"\0\0\0\x20ftypavif", "image"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"P6 16 16 255 ", "image"),
        (b"Pictures are", ""),
        (b"BMW is a make of cars, and", ""),
        ({"bytes": b"?", "path": None}, "image"),
        ([[{"x": ("b.tiff",)}]], "image"),
        (".png", ""),
        ("https://a.jpg", ""),
        ("He opened the old file that they all had called picture.jpg", ""),
        ("line\nb.png", ""),
        ("/9j/a", ""),
        ({"a": 1, "b": [0.5] * 9}, ""),
        ("image/png", ""),
    ],
)
def test_what_holds_a_picture(value: Any, medium: str) -> None:
    assert medium_of(value) == medium
