"""Loose pictures and texts: which are found, what their captions are, and how texts are cut."""

import json
import os
from pathlib import Path, PurePath

import pytest
from PIL import Image

from megatron_chameleon.data.documents.parse import read_documents
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.data.loose.captions import caption_of
from megatron_chameleon.data.loose.records import DOCUMENT_CHARACTERS, NONE, collect, records_of
from megatron_chameleon.data.loose.walk import LooseFile, find_loose
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.options import ImageOptions


def picture(path: Path, color: str = "red", side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), color).save(path)
    return path


@pytest.mark.parametrize(
    ("path", "caption"),
    [
        ("cats/tabby_01.png", "cats, tabby"),
        ("cats/0001.png", "cats"),
        ("images/train/red_panda-2.jpg", "red panda"),
        ("DCIM/IMG_20240102_1534.jpg", ""),
        ("DSC01234.JPG", ""),
        ("photos/3f2a9c7d1e.png", ""),
        ("aRedStar.png", "a Red Star"),
        ("zoo/it's a lion.png", "zoo, it's a lion"),
        ("猫/三毛.png", "猫, 三毛"),
        ("cats/cats.png", "cats"),
        ("WhatsApp Image 2024-01-02.jpeg", ""),
    ],
)
def test_captions_come_from_names(path: str, caption: str) -> None:
    assert caption_of(PurePath(path)) == caption


def test_files_are_sorted_by_what_they_are(tmp_path: Path) -> None:
    picture(tmp_path / "a cat.png")
    picture(tmp_path / "sub/UPPER.PNG")
    picture(tmp_path / "described.png")
    (tmp_path / "described.txt").write_text("a described picture")
    (tmp_path / "story.txt").write_text("once")
    (tmp_path / "docs.jsonl").write_text("{}\n")
    (tmp_path / "song.mp3").write_bytes(b"ID3")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "package.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe.txt")
    found = find_loose([str(tmp_path)])
    assert [p.path.name for p in found.pictures] == ["a cat.png", "described.png", "UPPER.PNG"]
    assert [p.caption and p.caption.name for p in found.pictures] == [None, "described.txt", None]
    assert [t.path.name for t in found.texts] == ["story.txt"]
    assert found.inputs == [str(tmp_path / "docs.jsonl")]
    assert found.others == {".mp3": 1, "(no regular file)": 1}


def test_pictures_of_a_metadata_file_are_not_loose(tmp_path: Path) -> None:
    picture(tmp_path / "set/0.png")
    (tmp_path / "set/metadata.csv").write_text("file_name,text\n0.png,a thing\n")
    picture(tmp_path / "own.png")
    found = find_loose([str(tmp_path)])
    assert found.inputs == [str(tmp_path / "set")]
    assert [p.path.name for p in found.pictures] == ["own.png"]


def test_files_for_testing_are_left_out(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    picture(tmp_path / "train/cat/0.png")
    picture(tmp_path / "val/cat/1.png")
    found = find_loose([str(tmp_path)])
    assert [Path(path).name for path in found.inputs] == ["train-0.jsonl"]
    assert [p.path.name for p in found.pictures] == ["0.png"]
    assert len(found.left_out) == 2


@pytest.mark.parametrize("name", ["missing", "no*thing", "null\0byte", "a" * 5000])
def test_what_is_not_there_is_one_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such|matches no|cannot be looked up"):
        find_loose([str(tmp_path / name)])


def test_collected_documents_are_read_with_their_pictures(tmp_path: Path) -> None:
    picture(tmp_path / 'in/it\'s/a "b" 1.png')
    (tmp_path / "in/long.md").write_text("\n\n".join(["word " * 200] * 20))
    (tmp_path / "in/utf16.txt").write_text("sixteen", encoding="utf-16")
    (tmp_path / "in/bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in/zero.txt").write_bytes(b"a\0b")
    found = find_loose([str(tmp_path / "in")])
    (tmp_path / "out").mkdir()
    written = collect(found, tmp_path / "out")
    assert [each.path.name for each in written] == ["pictures.jsonl", "texts.jsonl"]
    assert [Path(line.split(":")[0]).name for line in written[1].broken] == ["bad.txt", "zero.txt"]
    images = ImageOptions(tuple(found.roots))
    (document,) = read_documents([written[0].path], images=images)
    assert document.content[0].open().size == (8, 8)  # type: ignore[union-attr]
    assert document.content[1].text == "it's"  # type: ignore[union-attr]
    texts = [json.loads(line)["text"] for line in written[1].path.read_text().splitlines()]
    assert "sixteen" in texts and len(texts) == 4
    assert max(map(len, texts)) <= DOCUMENT_CHARACTERS


def test_a_picture_may_have_no_caption(tmp_path: Path) -> None:
    path = picture(tmp_path / "red cat.png")
    (record,) = records_of(LooseFile(path, Path(path.name)), NONE)
    assert [part["type"] for part in record["content"]] == ["image"]


def test_pictures_of_documents_are_not_collected_and_texts_beside_them_are(tmp_path: Path) -> None:
    picture(tmp_path / "of a table.png")
    picture(tmp_path / "sub/own.png")
    (tmp_path / "notes.txt").write_text("a note")
    found = find_loose([str(tmp_path)], claimed=[tmp_path])
    assert [p.path.name for p in found.pictures] == ["own.png"]
    assert [t.path.name for t in found.texts] == ["notes.txt"]


@pytest.mark.parametrize(
    ("beside", "is_saved"),
    [("dataset_info.json", True), ("data-00000-of-00001.arrow", True), ("notes.json", False)],
)
def test_a_state_of_another_program_makes_no_saved_data_set(
    beside: str, is_saved: bool, tmp_path: Path
) -> None:
    """Walking over folders and reading one agree on what ``save_to_disk`` has written."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    (folder / beside).write_text("{}")
    (folder / "state.json").write_text('{"step": 7}')
    found = find_loose([str(tmp_path)])
    assert (found.inputs == [str(folder)]) == is_saved
    if is_saved:
        with pytest.raises(DataError, match=r"state\.json: lists no files"):
            find_inputs([folder])
    else:
        assert str(folder / "a.jsonl") in found.inputs
