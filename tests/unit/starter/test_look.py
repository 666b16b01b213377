"""Looking at files of all kinds: counts, estimates, what is left out, and how much is read."""

import csv
import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from megatron_chameleon.errors import DataError
from megatron_chameleon.starter.choose import TINY, holdout, text_vocabulary
from megatron_chameleon.starter.looking import look as looking
from megatron_chameleon.starter.looking.look import Looked, Looking, look, shorten
from megatron_chameleon.starter.odd import oddities


def save(path: Path, number: int, size: tuple[int, int] = (10, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number * 7 % 256, number * 13 % 256, number)).save(path)
    return path


def looked(*paths: Path) -> Looked:
    return look([str(path) for path in paths], Looking())


def odd(found: Looked) -> str:
    return "\n".join(oddities(found, 500, 16))


def test_pictures_with_names(tmp_path: Path) -> None:
    for n in range(12):
        save(tmp_path / f"in/{'cats' if n % 2 else 'dogs'}/{n}.png", n)
    (source,) = looked(tmp_path / "in").sources
    assert (source.name, source.documents, source.pictures) == ("pictures", 12, 12)
    assert {entry.caption for entry in source.tally.seen} == {"cats", "dogs"}
    assert source.is_complete


def test_every_kind_of_file_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    chat = {
        "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    }
    (folder / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 30)
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for n in range(5):
            image = io.BytesIO()
            Image.new("RGB", (9, 9), (n, n, n)).save(image, "PNG")
            for name, data in ((f"{n}.png", image.getvalue()), (f"{n}.txt", b"a thing")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    with (folder / "captions.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for n in range(4):
            save(folder / f"pictures/{n}.png", n)
            writer.writerow([f"pictures/{n}.png", f"picture {n}"])
    save(folder / "loose/red cat.png", 99)
    (folder / "notes.txt").write_text("a note")
    (folder / "rubbish.json").write_text('{"a": 1}')
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    (folder / "program.exe").write_bytes(b"MZ")
    found = looked(folder)
    documents = {source.name: source.documents for source in found.sources}
    assert documents == {"in": 39, "pictures": 1, "texts": 1}
    text = odd(found)
    assert "rubbish.json: no document in it" in text
    assert "1 file of kinds that are not read" in text
    assert "1 corrupt image" in text
    assert "from which documents take theirs" not in text  # each is named
    for n in range(4, 7):
        save(folder / f"pictures/{n}.png", n)
    assert "7 pictures in folders from which documents take theirs" in odd(looked(folder))


def test_a_sparse_file_of_100_gb_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "MOST_BYTES", 12 << 20)
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "hello there"}\n' * 1000)
        file.truncate(100 << 30)
    started = time.process_time()
    found = look([str(path)], Looking(seconds=2.0))
    assert time.process_time() - started < 10
    (source,) = found.sources
    assert not source.is_complete and source.documents > 1000
    assert source.looked_bytes <= 12 << 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is an empty folder"),
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_bytes(b"\0" * 99), "none of its 1 files can be trained on"),
        (lambda path: os.mkfifo(path), "none of its 1 files can be trained on"),
    ],
)
def test_nothing_to_train_on(make, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "in")
    with pytest.raises(DataError, match=message):
        looked(tmp_path / "in")


def test_what_is_odd_about_pictures(tmp_path: Path) -> None:
    for n in range(6):
        save(tmp_path / f"in/cat/{n}.png", n)
    save(tmp_path / "in/cat/copy.png", 0)
    save(tmp_path / "in/cat/9.png", 9, size=(4, 90))
    text = odd(looked(tmp_path / "in"))
    assert "1 document has the picture or text of another" in text
    assert "all 8 captions are the same: 'cat'" in text or "captions are the same" in text
    assert "1 picture is over 3 times as long as wide" in text
    assert "very few" in text


def test_pictures_without_any_text(tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / f"in/IMG_{n:04}.png", n)
    found = looked(tmp_path / "in")
    assert "the pictures have no text" in odd(found)
    vocabulary = text_vocabulary(found, TINY, 64)
    assert not vocabulary.is_filled and 328 < vocabulary.size < 400


def test_a_held_out_document_is_certain_however_few_there_are(tmp_path: Path) -> None:
    for n in range(2, 12):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{n}.txt").write_text(f"text number {n}")
        held = holdout(looked(tmp_path / "in").sources)
        if n == 2:
            assert held.share is None  # a single document is trained
        else:
            assert held.documents == 1 and held.sources == ["texts"]


def test_many_files_become_a_glob(tmp_path: Path) -> None:
    names = [str(tmp_path / f"[a] {n}.jsonl") for n in range(9)]
    for name in names:
        Path(name).touch()
    (pattern,) = shorten(names)
    assert pattern.endswith("/*.jsonl")
    (tmp_path / "other.jsonl").touch()
    assert shorten(names) == names


def test_a_source_is_never_held_out_as_a_whole(tmp_path: Path) -> None:
    for n in range(8):
        (tmp_path / f"{n}").mkdir()
        (tmp_path / f"{n}/in.jsonl").write_text(json.dumps({"text": f"text {n}"}) + "\n")
    sources = looked(*(tmp_path / f"{n}/in.jsonl" for n in range(8))).sources
    held = holdout(sources)
    assert held.share is None  # each source is one document
    two = "".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(20))
    (tmp_path / "7/in.jsonl").write_text(two)
    held = holdout(looked(*(tmp_path / f"{n}/in.jsonl" for n in range(8))).sources)
    assert held.share is not None and len(held.sources) == 1
    assert not set(held.undivided) & set(held.sources)
