import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from megatron_chameleon.data.tokenizer_corpus.images import find_images
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.tokenizer.image.config import load_image_config
from megatron_chameleon.tokenizer.image.faces import detectors
from megatron_chameleon.tokenizer.image.faces.detectors import boxes_of, load_detector
from megatron_chameleon.tokenizer.image.faces.weights import (
    FACES_FILE,
    emphasise,
    find_faces,
    log_faces,
)
from megatron_chameleon.tokenizer.image.training.processes import Processes
from megatron_chameleon.tokenizer.image.training.train import _with_faces, train_image_tokenizer

looked_at: list[tuple[int, ...]] = []


def find_red(pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """A detector for tests: red pictures show a face."""
    looked_at.append(pixels.shape)
    return [(0, 0, 1, 1)] if pixels[..., 0].mean() > 200 else []


def fails(pixels: np.ndarray) -> None:
    raise RuntimeError("no model\nand more")


FIND_RED = f"{__name__}:find_red"


@dataclass
class Picture:
    where: str
    color: str
    weight: float = 1.0
    size: tuple[int, int] = (8, 8)

    def open(self) -> Image.Image:
        if self.color == "broken":
            raise OSError("cut off")
        if self.color == "disk":
            raise DataError(self.where, "the disk fails", "Mend it")
        return Image.new("RGB", self.size, self.color)


def test_the_packaged_detector_finds_a_face_where_there_is_one() -> None:
    detect = load_detector("skimage")
    astronaut = Image.fromarray(skimage.data.astronaut())
    astronaut.thumbnail((384, 384))
    boxes = boxes_of(detect(np.asarray(astronaut)), "skimage")
    # her face is around (168, 88) of 384 pixels
    assert any(x < 168 < x + w and y < 88 < y + h for x, y, w, h in boxes)
    for name in ("coffee", "gravel"):
        image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        image.thumbnail((256, 256))
        assert boxes_of(detect(np.asarray(image)), "skimage") == []
    assert boxes_of(detect(np.zeros((8, 400, 3), dtype=np.uint8)), "skimage") == []


def test_faces_are_drawn_more_often_and_looked_for_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [
        Picture("a.png", "red"),
        Picture("b.png", "blue", weight=3),
        Picture("c.png", "red", weight=3, size=(4000, 10)),
        Picture("d.png", "broken"),
    ]
    looked_at.clear()
    with caplog.at_level(logging.INFO):
        faces = find_faces(pictures, FIND_RED, tmp_path / "partial")
        log_faces(pictures, faces, 2.0)
    assert [p.weight for p in emphasise(pictures, faces, 2.0)] == [2, 3, 6, 1]
    assert len(looked_at) == 3 and max(looked_at) <= (384, 384, 3)
    assert "looking for faces in 4 pictures" in caplog.text
    assert "faces: 2 of 4 pictures show a face, and are sampled 2 times as often" in caplog.text
    # a kill has cut a line, and somebody has written into the file
    path = tmp_path / "partial" / FACES_FILE
    with path.open("a") as file:
        file.write('[]\nnull\n{"image": "a.png"}\n{"image": "e.png", "fac')
    pictures.append(Picture("e.png", "red"))
    assert find_faces(pictures, FIND_RED, tmp_path / "partial") == {**faces, "e.png": 1}
    assert find_faces(pictures, FIND_RED, tmp_path / "partial") == {**faces, "e.png": 1}
    assert len(looked_at) == 4


def test_another_detector_looks_again(tmp_path: Path) -> None:
    pictures = [Picture("a.png", "red")]
    assert find_faces(pictures, FIND_RED, tmp_path) == {"a.png": 1}
    with pytest.raises(ConfigError, match=r"fails for a\.png \(RuntimeError: no model\)\. Repair"):
        find_faces(pictures, f"{__name__}:fails", tmp_path)


def test_a_disk_that_fails_is_no_picture_without_a_face(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the disk fails"):
        find_faces([Picture("a.png", "disk")], FIND_RED, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opencv", "there is no detector opencv. Use skimage or MODULE:FUNCTION"),
        ("no_such_module:find", r"cannot be imported \(No module named 'no_such_module'\). Check"),
        (f"{__name__}:missing", "cannot be imported .module .* has no attribute 'missing'"),
        (f"{__name__}:FIND_RED", "is not a function. Name a function"),
        (":", "there is no detector :. Use"),
    ],
)
def test_a_detector_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_detector(name)


def test_a_package_can_offer_a_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("red", FIND_RED, detectors.GROUP)
    monkeypatch.setattr(detectors, "entry_points", lambda group: [point])
    assert load_detector("red") is find_red


@pytest.mark.parametrize("found", ["face", [1, 2], [[1, 2, 3]], [[1, 2, 3, float("nan")]], 7])
def test_what_is_no_list_of_boxes_is_refused(found: object) -> None:
    with pytest.raises(ConfigError, match=r"not boxes\. It must return a list of"):
        boxes_of(found, "mine:find")


@pytest.mark.parametrize("found", [None, [], (), np.zeros((0, 4)), np.empty(0)])
def test_no_face_has_many_forms(found: object) -> None:
    assert boxes_of(found, "mine:find") == []


def test_a_training_draws_faces_more_often(tmp_path: Path) -> None:
    for index, color in enumerate(("red", "blue", "red")):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{index}.png")
    words = ["model.resolution=8", "model.ch_mult=[1,1]", "model.codebook_size=4"]
    words += ["training.steps=2", "training.batch_size=2", "training.faces=2"]
    config = load_image_config("digits", [*words, f"training.face_detector={FIND_RED}"])
    images = find_images([tmp_path])
    looked_at.clear()
    train_image_tokenizer(images, config, tmp_path / "out", report=lambda line: None)
    assert len(looked_at) == 3
    details = json.loads((tmp_path / "out" / "image.json").read_text())
    assert details["training"]["faces"] == 2.0
    assert not (tmp_path / "out" / "image.partial").exists()


def test_the_first_process_of_several_says_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[dict[str, int]] = []

    def on_first(self: Processes, action: Callable[[], dict[str, int]]) -> dict[str, int]:
        if self.is_first:
            sent.append(action())
        return sent[0]

    monkeypatch.setattr(Processes, "on_first", on_first)
    config = load_image_config("digits", [f"training.face_detector={FIND_RED}", "training.faces=3"])
    pictures = [Picture("a.png", "red"), Picture("b.png", "blue")]
    with caplog.at_level(logging.INFO):
        for rank in (0, 1):
            found = _with_faces(pictures, config, tmp_path, False, Processes(rank, 2))
            assert [picture.weight for picture in found] == [3, 1]
    assert caplog.text.count("faces: 1 of 2 pictures show a face") == 1
