import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.corpus import find_images, read_texts

Noise = Callable[..., Image.Image]


def write_lines(path: Path, *documents: object) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def test_texts_come_from_lines_and_from_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first line\n\n  second ü\r\nlast", encoding="utf-8")
    documents = write_lines(
        tmp_path / "b.jsonl",
        {"text": "plain\ntext"},
        {"content": [{"type": "text", "text": "one"}, {"type": "image", "image": "x.png"}]},
        {"content": []},
    )
    documents.write_text(documents.read_text() + "\n  \n")
    texts = list(read_texts([tmp_path / "a.txt", str(documents)]))
    assert texts == ["first line", "", "  second ü", "last", "plain\ntext", "one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", r"a.csv: unknown kind of text file \(.csv\). Pass a .txt or .jsonl"),
        ("a", b"x", r"a: unknown kind of text file \(no suffix\)"),
        ("a.txt", b"fine\n\xff\n", r"a.txt:\d: not valid UTF-8 \(invalid start byte\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text":\n', r"a.jsonl:2: the line is not valid JSON \("),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: the line must be a JSON object"),
        ("a.jsonl", b'{"title": "x"}\n', r"a.jsonl:1: has neither `content` nor a string `text`"),
        ("a.jsonl", b'{"content": "x"}\n', r"a.jsonl:1: `content` must be a list of parts"),
        ("a.jsonl", b'{"content": [{"type": "text"}]}\n', r"'text' has no string under `text`"),
    ],
)
def test_a_file_that_is_not_text_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_texts([tmp_path / name]))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.txt: no such file"):
        list(read_texts([tmp_path / "none.txt"]))
    with pytest.raises(DataError, match=r"is a folder"):
        list(read_texts([tmp_path]))
    with pytest.raises(DataError, match=r"none.png: no such file"):
        find_images([tmp_path / "none.png"])


def test_images_come_from_files_folders_and_documents(tmp_path: Path, noise: Noise) -> None:
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deeper/c.webp", "notes.txt"):
        (folder / name).write_bytes(b"")
    buffer = io.BytesIO()
    noise().save(buffer, "PNG")
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    documents = write_lines(
        folder / "documents.jsonl",
        {"weight": 2, "content": [{"type": "image", "image": "b.png"}]},
        {"content": [{"type": "text", "text": "x"}, {"type": "image", "image": data}]},
        {"text": "no image"},
    )
    entries = find_images([folder / "b.png", folder, documents])
    named = [folder / name for name in ("b.png", "a.JPG", "b.png", "deeper/c.webp")]
    assert [entry.image for entry in entries[:5]] == [*named, "b.png"]
    assert entries[4].folder.path == str(folder)
    assert [entry.weight for entry in entries] == [1, 1, 1, 1, 2, 1]
    assert entries[4].where == f"{documents}:1: b.png"
    assert entries[5].open().tobytes() == noise().tobytes()


def test_bytes_that_are_not_base64_are_an_unreadable_image(tmp_path: Path) -> None:
    document = {"content": [{"type": "image", "image": "data:image/png;base64,@@"}]}
    (entry,) = find_images([write_lines(tmp_path / "a.jsonl", document)])
    with pytest.raises(DataError, match=r"a.jsonl:1: image 1: .* 0 bytes cannot be decoded"):
        entry.open()


@pytest.mark.parametrize("weight", [-1, "2", True, float("inf")])
def test_a_weight_must_be_a_number(tmp_path: Path, weight: object) -> None:
    document = {"weight": weight, "content": [{"type": "image", "image": "b.png"}]}
    with pytest.raises(DataError, match=r"a.jsonl:1: `weight` is .* Use a number of 0 or more"):
        find_images([write_lines(tmp_path / "a.jsonl", document)])


def test_no_image_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image found"):
        find_images([tmp_path])
    document = {"weight": 0, "content": [{"type": "image", "image": "b.png"}]}
    with pytest.raises(DataError, match=r"the weights of all 1 images are 0"):
        find_images([write_lines(tmp_path / "a.jsonl", document)])
