"""Save the images of answers, each under a name that no file has."""

import itertools
import os
from pathlib import Path

from PIL import Image

from megatron_chameleon.files import make_folder, write_bytes, writing
from megatron_chameleon.images.png import png_bytes


def save_image(folder: Path, image: Image.Image) -> Path:
    """Write FOLDER/0001.png, or the next number that is free, also of other processes.

    Raises:
        DataError: It cannot be written.
    """
    make_folder(folder)
    with writing(folder):
        path = _claimed(folder)
    try:
        write_bytes(path, png_bytes(image))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _claimed(folder: Path) -> Path:
    """An empty file with the lowest free number above all others."""
    numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()]
    for number in itertools.count(max(numbers, default=0) + 1):
        path = folder / f"{number:04d}.png"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return path
    raise AssertionError
