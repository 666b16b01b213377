"""Finds faces in the pictures of a training, once, and raises their weights."""

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_chameleon.errors import ConfigError, DataError, first_line
from megatron_chameleon.files import own_folder, writing
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.pixels import upright_rgb
from megatron_chameleon.json_text import parse_json
from megatron_chameleon.tokenizer.image.faces.detectors import KEY, boxes_of, load_detector
from megatron_chameleon.tokenizer.image.training_image import TrainingImage
from megatron_chameleon.values import printable
from megatron_chameleon.wording import counted

logger = logging.getLogger(__name__)

FACES_FILE = "faces.jsonl"
LONGEST_SIDE = 384
"""Larger pictures are made smaller before faces are looked for."""
THREADS = 4
BLOCK = 64
"""Pictures between two additions to the file."""


@dataclass(frozen=True)
class Emphasised:
    """A picture with another weight."""

    picture: TrainingImage
    weight: float

    @property
    def where(self) -> str:
        return self.picture.where

    def open(self) -> Image.Image:
        return self.picture.open()


def find_faces(pictures: Sequence[TrainingImage], detector: str, folder: Path) -> dict[str, int]:
    """Count the faces of each picture.

    Results are added to FOLDER/faces.jsonl as they come, so that a training that is continued does
    not look again. Unreadable pictures have no face; the training finds and lists them.

    Args:
        pictures: What is trained on.
        detector: Its name.
        folder: Of the unfinished training; created if it is missing.

    Returns:
        Number of faces by the name of the picture.

    Raises:
        ConfigError: The detector is missing or fails.
        DataError: The disk does not take the file, or a disk or network fails.
    """
    detect = load_detector(detector)
    path = own_folder(folder) / FACES_FILE
    known = _read(path, detector)
    by_name = {picture.where: picture for picture in pictures}
    missing = [name for name in by_name if name not in known]

    def look(name: str) -> int:
        pixels_HWC = _pixels(by_name[name])
        if pixels_HWC is None:
            return 0
        try:
            found = detect(pixels_HWC)
        except Exception as error:  # a user's function may raise anything
            what = f"{printable(detector)} fails for {name} ({type(error).__name__}: "
            what += f"{first_line(error)[:200]})"
            raise ConfigError(KEY, what, "Repair it, or name another detector") from error
        return len(boxes_of(found, detector))

    if missing:
        logger.info("looking for faces in %s with %s", counted(len(missing), "picture"), detector)
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(missing), BLOCK):
                names = missing[start : start + BLOCK]
                counts = dict(zip(names, pool.map(look, names), strict=True))
                _append(path, detector, counts)
                known |= counts
    return {name: known[name] for name in by_name}


def log_faces(pictures: Sequence[TrainingImage], faces: Mapping[str, int], factor: float) -> None:
    """Say how many pictures show a face; see ``emphasise``."""
    shown = sum(faces[picture.where] > 0 for picture in pictures)
    logger.info(
        "faces: %d of %s show a face, and are sampled %g times as often as the others",
        shown,
        counted(len(pictures), "picture"),
        factor,
    )


def emphasise(
    pictures: Sequence[TrainingImage], faces: Mapping[str, int], factor: float
) -> list[TrainingImage]:
    """Multiply the weight of each picture that shows a face.

    Args:
        pictures: What is trained on.
        faces: Number of faces by the name of the picture.
        factor: How much more often a picture with a face is drawn.
    """
    return [
        Emphasised(picture, picture.weight * factor) if faces[picture.where] else picture
        for picture in pictures
    ]


def _pixels(picture: TrainingImage) -> np.ndarray | None:
    """The pixels in which faces are looked for: RGB, uint8; None if they cannot be read."""
    try:
        with picture.open() as image:
            rgb = upright_rgb(image)
            rgb.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            return np.array(rgb)
    except DataError as error:
        if not isinstance(error, ImageError):
            raise
    except Exception:  # Pillow's decoders raise all kinds of exceptions
        pass
    return None


def _read(path: Path, detector: str) -> dict[str, int]:
    """Number of faces by the name of the picture; a line that a kill has cut is left out."""
    found: dict[str, int] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = parse_json(line, str(path))
            if values["detector"] == detector:
                found[values["image"]] = int(values["faces"])
        except (DataError, ValueError, KeyError, TypeError):
            continue
    return found


def _append(path: Path, detector: str, found: dict[str, int]) -> None:
    lines = [
        json.dumps({"image": name, "faces": count, "detector": detector})
        for name, count in found.items()
    ]
    # a line that a kill has cut off must not swallow the next one
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write("\n".join(["", *lines, ""]))
