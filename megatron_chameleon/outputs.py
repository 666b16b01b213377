"""Outputs of a command: checked before the work that makes them, kept when it is done.

    path = check_output("--html", "page.html", inputs=[prefix + ".bin"])
    save_anyhow(lambda folder: write_bytes(folder / "weights", content), Path("out"))

``files.py`` writes the files themselves.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from megatron_chameleon.errors import ChameleonError, DataError
from megatron_chameleon.files import is_special, try_to_write, writing


def check_output(
    option: str,
    path: str | Path,
    inputs: Iterable[str | Path] = (),
    kind: type[ChameleonError] = DataError,
) -> Path:
    """Check that a file can be written, before the work that makes it starts.

    Args:
        option: What an error calls it, such as ``--output``.
        path: The file. Missing folders are fine, and not made here.
        inputs: Files that the command reads; the output must be none of them.
        kind: The class of the error.

    Raises:
        ChameleonError: Of the given kind: it is an input, a folder, or cannot be written.
    """
    path = check_name(option, path, kind)
    keep_inputs(option, [path], inputs, kind)
    if not is_special(path):
        with writing(path, kind):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _try_folder(path.parent)
    return path


def check_output_folder(
    option: str, path: str | Path, kind: type[ChameleonError] = DataError
) -> Path:
    """Check that a folder can be made and written, without making it.

    Args:
        option: What an error calls it, such as ``--output``.
        path: The folder.
        kind: The class of the error.

    Raises:
        ChameleonError: Of the given kind.
    """
    path = check_name(option, path, kind)
    with writing(path, kind):
        _try_folder(path)
    return path


def _try_folder(place: Path) -> None:
    """Write a little into a folder, or into the one that it would be made in."""
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    try_to_write(place)


def check_name(option: str, path: str | Path, kind: type[ChameleonError] = DataError) -> Path:
    """Refuse names that can only be meant otherwise: an empty one, and the dash.

    Raises:
        ChameleonError: Of the given kind.
    """
    if not str(path).strip():
        raise kind(option, "the name is empty", "Give a name")
    if str(path) == "-":
        remedy = "Write /dev/stdout where a file can be printed, or ./- for that name"
        raise kind(option, "a dash is not a name here", remedy)
    return Path(path)


def keep_inputs(
    option: str,
    outputs: Iterable[str | Path],
    inputs: Iterable[str | Path],
    kind: type[ChameleonError] = DataError,
) -> None:
    """Refuse outputs that would replace an input, whatever links lead to it.

    Raises:
        ChameleonError: Of the given kind.
    """
    read: dict[tuple[int, int], str | Path] = {}
    for path in inputs:
        with suppress(OSError, ValueError):
            found = Path(path).stat()
            read[found.st_dev, found.st_ino] = path
    for path in outputs:
        with suppress(OSError, ValueError):
            found = Path(path).stat()
            if (found.st_dev, found.st_ino) in read and not stat.S_ISCHR(found.st_mode):
                what = f"would replace {path}, which the command reads"
                raise kind(f"{option} {path}", what, f"Give another {option}")


def save_anyhow(save: Callable[[Path], object], folder: Path) -> None:
    """Save the result of long work: in another folder if its own does not take it.

    Args:
        save: Writes the result into a folder.
        folder: Where it belongs.

    Raises:
        ChameleonError: It could not be saved there; the remedy names the folder that has it.
    """
    try:
        save(folder)
    except ChameleonError as error:
        place = _save_elsewhere(save)
        if place is None:
            raise
        remedy = f"The result is in {place} instead: make room, and move its files to {folder}"
        raise type(error)(error.where, error.what, remedy) from error


def _save_elsewhere(save: Callable[[Path], object]) -> Path | None:
    """The first folder for temporary or own files that takes the result; None if there is none."""
    for candidate in (tempfile.gettempdir, os.getcwd, Path.home):
        with suppress(OSError, RuntimeError, ChameleonError):
            place = Path(tempfile.mkdtemp(prefix="chameleon-result-", dir=candidate()))
            try:
                save(place)
                return place
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                raise
    return None
