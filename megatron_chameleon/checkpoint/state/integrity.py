"""Checksums of a checkpoint's files, which show whether the disk returns what was written.

Each checkpoint of a run and each converted folder has a ``SHA256SUMS``, in the format of
``sha256sum``:

    cd runs/NAME/checkpoints/step_00001000 && sha256sum --check --quiet SHA256SUMS
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath

from megatron_chameleon.announce import announced
from megatron_chameleon.checkpoint.state.folders import STATE_FILE, load_state
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import read_text
from megatron_chameleon.wording import counted

SUMS_FILE = "SHA256SUMS"
SMALL_FILES = ("config.yaml", STATE_FILE)
"""The files that say what is in a checkpoint."""
READER_THREADS = 4
"""Threads that read the files of a folder; reading releases Python's lock."""


def sha256(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write ``SHA256SUMS`` for all files in a folder and its subfolders.

    Args:
        folder: A checkpoint.
        digests: Checksums that are already known, by path within the folder. These files need not
            exist yet; all other files are read.
    """
    files = (path for path in folder.rglob("*") if path.is_file())
    names = sorted({path.relative_to(folder).as_posix() for path in files} | set(digests))
    with ThreadPoolExecutor(READER_THREADS) as pool:
        found = pool.map(lambda name: digests.get(name) or sha256(folder / name), names)
        lines = [f"{digest}  {name}\n" for digest, name in zip(found, names, strict=True)]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def check_files(folder: Path) -> int | None:
    """Compare a folder's files with the checksums in its ``SHA256SUMS``.

    Args:
        folder: A checkpoint of any format.

    Returns:
        The number of files; None if the folder has no ``SHA256SUMS``.

    Raises:
        CheckpointError: A file, or ``SHA256SUMS`` itself, is damaged or missing.
    """
    remedy = (
        f"Copy the folder again from the original. If it was changed on purpose, remove {SUMS_FILE}"
    )
    try:
        sums = _read_sums(folder)
    except (OSError, ValueError) as error:
        where = str(folder / SUMS_FILE)
        raise CheckpointError(where, f"cannot be read ({error})", remedy) from error
    if sums is None:
        return None
    with _announced_reading(folder, list(sums)), ThreadPoolExecutor(READER_THREADS) as pool:
        found = pool.map(lambda name: _find_damage_of_file(folder / name, sums[name]), sums)
        damages = [damage for damage in found if damage]
    if damages:
        first = damages[0].removeprefix(f"{folder}/")
        what = f"{len(damages)} of {len(sums)} files are damaged, the first: {first}"
        raise CheckpointError(str(folder), what, remedy)
    return len(sums)


def find_damage(checkpoint: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Check this rank's share of a checkpoint's files.

    A checkpoint without checksums, as earlier versions wrote it, counts as sound if it is whole.

    Args:
        checkpoint: A folder ``step_...``.
        rank: This process's rank.
        world_size: The number of processes that share the files.

    Returns:
        The first damaged file of this rank's share and what is wrong with it; None if all are
        sound.
    """
    return _find_damage(checkpoint, None, rank, world_size)


def find_damage_of_small_files(checkpoint: Path) -> str | None:
    """Check only the files that say what is in the checkpoint; otherwise as ``find_damage``."""
    return _find_damage(checkpoint, SMALL_FILES, 0, 1)


def _find_damage(
    checkpoint: Path, only: tuple[str, ...] | None, rank: int, world_size: int
) -> str | None:
    state = checkpoint / STATE_FILE
    if not state.is_file():
        return f"{state} is missing"
    try:
        sums = _read_sums(checkpoint)
    except (OSError, ValueError) as error:
        return f"{checkpoint / SUMS_FILE} cannot be read ({error})"
    if sums is None:
        return _find_damage_without_sums(checkpoint)
    if missing := [name for name in SMALL_FILES if name not in sums]:
        return f"{checkpoint / SUMS_FILE} cannot be read (it has no line for {missing[0]})"
    names = [name for name in sums if only is None or name in only][rank::world_size]
    with _announced_reading(checkpoint, names):
        damages = (_find_damage_of_file(checkpoint / name, sums[name]) for name in names)
        return next(filter(None, damages), None)


def _announced_reading(folder: Path, names: Sequence[str]) -> AbstractContextManager[None]:
    sizes = ((folder / name).stat().st_size for name in names if (folder / name).is_file())
    total = sum(sizes) / 2**30
    return announced(f"checking {counted(len(names), 'file')} of {folder}, {total:.1f} GiB")


def _find_damage_without_sums(checkpoint: Path) -> str | None:
    try:
        state = load_state(checkpoint)
    except CheckpointError as error:
        return f"{error.where}: {error.what}"
    if state.get("has_checksums"):
        return f"{checkpoint / SUMS_FILE} is missing"
    return None


def _find_damage_of_file(file: Path, digest: str) -> str | None:
    if not file.is_file():
        return f"{file} is missing"
    try:
        found = sha256(file)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    return None if found == digest else f"{file} is not what was written (its SHA-256 differs)"


def _read_sums(folder: Path) -> dict[str, str] | None:
    """The checksums by path within the folder; None if there is no ``SHA256SUMS``."""
    file = folder / SUMS_FILE
    if not file.exists():
        return None
    sums = {}
    try:
        text = read_text(file, CheckpointError)  # never waits, as for a pipe
    except CheckpointError as error:
        raise ValueError(error.what) from error
    for number, line in enumerate(text.splitlines(), start=1):
        digest, separator, name = line.partition("  ")
        path = PurePosixPath(name)
        is_outside = path.is_absolute() or ".." in path.parts
        if not separator or len(digest) != 64 or not name or is_outside:
            raise ValueError(f"line {number} is not a checksum of a file in this folder")
        sums[name] = digest
    return sums
