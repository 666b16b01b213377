"""Images to train on: files, folders, and those of documents as ``preprocess`` reads them."""

import base64
import errno
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.tokenizer_corpus import images
from megatron_chameleon.data.tokenizer_corpus.documents import DroppedDocuments
from megatron_chameleon.data.tokenizer_corpus.images import ImageEntry, find_images
from megatron_chameleon.errors import DataError

Noise = Callable[..., Image.Image]


def write_lines(path: Path, *documents: object) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


@pytest.fixture
def noise() -> Noise:
    """Makes a picture of noise."""

    def make(seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def name_of(entry: ImageEntry) -> str:
    assert isinstance(entry.part, ImagePart) and isinstance(entry.part.image, str)
    return entry.part.image


def test_images_come_from_files_folders_and_documents(tmp_path: Path, noise: Noise) -> None:
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deeper/c.webp", "notes.txt"):
        (folder / name).write_bytes(b"")
    data = "data:image/png;base64," + base64.b64encode(png(noise())).decode()
    documents = write_lines(
        folder / "documents.jsonl",
        {"weight": 2, "content": [{"type": "image", "image": "b.png"}]},
        {"content": [{"type": "text", "text": "x"}, {"type": "image", "image": data}]},
        {"text": "no image"},
    )
    entries = find_images([folder / "b.png", folder, documents])
    names = ("b.png", "a.JPG", "b.png", "deeper/c.webp", "b.png")
    assert [name_of(entry) for entry in entries[:5]] == [str(folder / name) for name in names]
    assert [entry.weight for entry in entries] == [1, 1, 1, 1, 2, 1]
    assert entries[4].where == f"{documents}:1: b.png"
    assert entries[5].open().tobytes() == noise().tobytes()


def test_images_come_from_tars_parquet_arrays_and_globs(tmp_path: Path, noise: Noise) -> None:
    pictures = [noise(seed) for seed in range(5)]
    pictures[0].save(tmp_path / "0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("k.png", png(pictures[1])), ("k.txt", b"caption")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    column = pyarrow.array([{"bytes": png(pictures[2]), "path": "x.png"}])
    table = pyarrow.table({"image": column, "caption": ["c"], "weight": [3]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text(json.dumps([{"text": "zero", "image": "0.png", "weight": 0}]))
    pictures[4].save(tmp_path / "last.png")
    words = [tmp_path / name for name in ("a.tar", "b.parquet", "c.json", "last*.png")]
    entries = find_images(words)
    opened = [entry.open().convert("RGB").tobytes() for entry in entries]
    assert opened == [pictures[number].tobytes() for number in (1, 2, 0, 4)]
    assert [entry.weight for entry in entries] == [1, 3, 0, 1]
    assert entries[0].where == f"{tmp_path}/a.tar:k: image 1"


def test_bytes_that_are_not_base64_are_an_unreadable_image(tmp_path: Path) -> None:
    document = {"content": [{"type": "image", "image": "data:image/png;base64,@@"}]}
    (entry,) = find_images([write_lines(tmp_path / "a.jsonl", document)])
    with pytest.raises(
        DataError, match=r"base64,@@\.\.\.: the base64 text of a data: URI cannot be decoded"
    ):
        entry.open()


@pytest.mark.parametrize("weight", [-1, "2", True, None, 1e400])
def test_a_document_whose_weight_is_no_number_is_dropped(tmp_path: Path, weight: object) -> None:
    good = {"content": [{"type": "image", "image": "b.png"}]}
    dropped = DroppedDocuments()
    path = write_lines(tmp_path / "a.jsonl", good, {"weight": weight, **good}, good)
    assert len(find_images([path], dropped=dropped)) == 2
    assert dropped.reasons == {"broken document": 1}
    assert dropped.first.startswith(f"{path}:2: ")


def test_no_image_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image found"):
        find_images([tmp_path])
    with pytest.raises(DataError, match=r"none.png: no such file"):
        find_images([tmp_path / "none.png"])
    document = {"weight": 0, "content": [{"type": "image", "image": "b.png"}]}
    with pytest.raises(DataError, match=r"the weights of all 1 image are 0"):
        find_images([write_lines(tmp_path / "a.jsonl", document)])
    with pytest.raises(DataError, match=r"no image found, 1 document dropped \(1 broken d"):
        find_images([write_lines(tmp_path / "a.jsonl", {"content": 3})])


def test_a_temporary_folder_without_room_is_named(
    tmp_path: Path, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png(noise())).decode()
    path = write_lines(tmp_path / "a.jsonl", {"content": [{"type": "image", "image": uri}]})

    class Full:
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(DataError, match=r"of TMPDIR\): cannot be written \(No space left"):
        find_images([path])
