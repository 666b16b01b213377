"""Checksums of a checkpoint's files: what the disk gives back is what was written.

``SHA256SUMS`` lies in each checkpoint of a run and is of the form that ``sha256sum`` has:

    cd runs/NAME/checkpoints/step_00001000 && sha256sum --check --quiet SHA256SUMS
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from megatron_chameleon.checkpoint.folders import STATE_FILE, load_state
from megatron_chameleon.errors import CheckpointError

SUMS_FILE = "SHA256SUMS"
SMALL_FILES = ("config.yaml", STATE_FILE)
"""Those that say what lies in a checkpoint."""


def sha256(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write ``SHA256SUMS`` of all files that lie in a folder.

    Args:
        folder: A checkpoint but for its ``state.json``.
        digests: What is known already, by file name; the other files are read.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()} | set(digests)
    lines = [f"{digests.get(name) or sha256(folder / name)}  {name}\n" for name in sorted(names)]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def find_damage(checkpoint: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, which each of several ranks reads a share of.

    A checkpoint without checksums, as conversions and earlier versions write it, counts as sound
    if it is whole.

    Args:
        checkpoint: A folder ``step_...``.
        rank: Of this process.
        world_size: Over how many processes the files are divided.

    Returns:
        The first damaged file of this rank's share and what is wrong with it; None: nothing.
    """
    return _find(checkpoint, None, rank, world_size)


def find_damage_of_small_files(checkpoint: Path) -> str | None:
    """As ``find_damage``, of those files alone that say what lies in the checkpoint."""
    return _find(checkpoint, SMALL_FILES, 0, 1)


def _find(checkpoint: Path, only: tuple[str, ...] | None, rank: int, world_size: int) -> str | None:
    state = checkpoint / STATE_FILE
    if not state.is_file():
        return f"{state} is missing"
    try:
        sums = _read_sums(checkpoint)
    except (OSError, ValueError) as error:
        return f"{checkpoint / SUMS_FILE} cannot be read ({error})"
    if sums is None:
        return _find_unreadable_state(checkpoint)
    names = [name for name in sums if only is None or name in only]
    for name in names[rank::world_size]:
        damage = _find_in_file(checkpoint / name, sums[name])
        if damage:
            return damage
    return None


def _find_unreadable_state(checkpoint: Path) -> str | None:
    try:
        state = load_state(checkpoint)
    except CheckpointError as error:
        return f"{error.where}: {error.what}"
    if state.get("has_checksums"):
        return f"{checkpoint / SUMS_FILE} is missing"
    return None


def _find_in_file(file: Path, digest: str) -> str | None:
    if not file.is_file():
        return f"{file} is missing"
    try:
        found = sha256(file)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    return None if found == digest else f"{file} is not what was written (its SHA-256 differs)"


def _read_sums(checkpoint: Path) -> dict[str, str] | None:
    """Digest by file name; None where there is no such file."""
    file = checkpoint / SUMS_FILE
    if not file.exists():
        return None
    sums = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or not name or "/" in name:
            raise ValueError(f"line {number} is no checksum")
        sums[name] = digest
    missing = [name for name in SMALL_FILES if name not in sums]
    if missing:
        raise ValueError(f"it has no line for {missing[0]}")
    return sums
