"""A file of a run folder that grows by whole records and is read again by the next start."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import DataError, TrainingError
from megatron_chameleon.files import open_to_append, open_to_read, writing

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_RECORD = 64 << 20


class GrowingFile:
    """Appends records. What ``append`` wrote is there even if the process is killed.

    Args:
        path: It is created if it does not exist; a link is refused.
        private: Whether only the owner may read it.

    Raises:
        TrainingError: The file system refuses it.
    """

    def __init__(self, path: Path, private: bool = False) -> None:
        self._path = path
        self._file = open_to_append(path, TrainingError, private)
        if private:
            with writing(path, TrainingError):
                os.fchmod(self._file.fileno(), 0o600)  # an older version made it for everybody

    def append(self, record: bytes) -> None:
        """Write a record, or, if the disk does not take it, nothing of it.

        Raises:
            TrainingError: The file system refuses it.
        """
        descriptor = self._file.fileno()
        with writing(self._path, TrainingError):
            size = os.fstat(descriptor).st_size
            try:
                rest = memoryview(record)
                while rest:  # the last bytes of a disk make a short write
                    rest = rest[os.write(descriptor, rest) :]
            except OSError:
                os.ftruncate(descriptor, size)
                raise

    def flush_to_disk(self) -> None:
        """Make sure that all records survive a crash of the machine.

        Raises:
            TrainingError: The disk refuses it.
        """
        with writing(self._path, TrainingError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_json_lines(
    path: Path, keys: Sequence[str] = ("step",)
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Read a file of JSON lines about steps; nothing if there is no file.

    The last line may be cut off or undecodable, because a process died while it wrote. Empty lines
    and a byte order mark, as an editor leaves them, are passed over.

    Args:
        path: Such as ``metrics.jsonl``.
        keys: What each object must have; ``step`` is a whole number.

    Yields:
        The object, and its line without the end.

    Raises:
        DataError: The file cannot be read, or a line before the last is broken.
    """
    if not path.exists():
        return
    with open_to_read(path, DataError) as file:
        problem: DataError | None = None
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(_BYTE_ORDER_MARK).strip() if number == 1 else line.strip()
            if not text:
                continue
            if problem is not None:
                raise problem  # it was not the last line
            record = _read_line(text, keys)
            if record is None:
                what = f"the line is not a JSON object with {' and '.join(keys)}"
                problem = DataError(f"{path}:{number}", what, "Fix or remove that line")
                continue
            yield record, text


def cut_broken_end(path: Path) -> None:
    """Remove a last line that a crash cut off, so that the next record gets a line of its own.

    Raises:
        TrainingError: The file system refuses it.
    """
    if not path.is_file():
        return
    with writing(path, TrainingError), path.open("r+b") as file:
        begin, end = max(0, file.seek(0, os.SEEK_END) - _LONGEST_RECORD), file.tell()
        file.seek(begin)
        last = file.read().rpartition(b"\n")[2]
        if last and _read_line(last, ()) is None:
            file.truncate(end - len(last))
        elif last:
            file.write(b"\n")


def _read_line(text: bytes, keys: Sequence[str]) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_known = isinstance(record, dict) and all(key in record for key in keys)
    if not is_known or ("step" in keys and (type(record["step"]) is not int or record["step"] < 0)):
        return None
    return record
