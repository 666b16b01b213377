"""The files of an unfinished token file, which grow in the folder PREFIX.partial.

Only one process at a time may write there, which a lock ensures. When the files are opened, each is
cut back to the size that the saved state names: what a killed process wrote after its last save is
lost.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from megatron_chameleon.data.token_files.format import file_of, partial_folder_of
from megatron_chameleon.errors import DataError

_BUFFER_BYTES = 1 << 20
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of ``copy_file_range`` after which ``sendfile`` may still work."""


class PartialFiles:
    """The folder PREFIX.partial, its lock and its open files.

    All methods but ``lock`` and ``open`` raise ``OSError`` when the disk does not take the data.

    Args:
        prefix: Path of the token file, without a suffix.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.folder = partial_folder_of(prefix)
        self._files: dict[str, IO[bytes]] = {}
        self._lock: int | None = None

    def path(self, suffix: str) -> Path:
        """The path of a growing file."""
        return self.folder / f"tokens{suffix}"

    def lock(self) -> None:
        """Make the folder and take its lock.

        Raises:
            DataError: Another process holds the lock.
            OSError: The folder cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = "another process is writing this token file"
            raise DataError(
                str(self.prefix), what, "Wait for it, or choose another --output"
            ) from error

    def unlock(self) -> None:
        """Release the lock, if it is held."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def open(self, sizes: Mapping[str, int]) -> None:
        """Open the files for appending, each cut back to its saved size.

        Args:
            sizes: Size in bytes by suffix.

        Raises:
            DataError: A file is shorter than its saved size.
            OSError: A file cannot be opened.
        """
        for suffix, size in sizes.items():
            path = self.path(suffix)
            path.touch()
            if path.stat().st_size < size:
                what = f"{path.stat().st_size} bytes, but state.json names {size}"
                raise DataError(str(path), what, "Start again with --restart")
            os.truncate(path, size)
            self._files[suffix] = path.open("r+b", buffering=_BUFFER_BYTES)
            self._files[suffix].seek(size)

    def file(self, suffix: str) -> IO[bytes]:
        """The open file with this suffix; it is written at its end."""
        return self._files[suffix]

    def append_from(self, suffix: str, path: Path, start: int, size: int) -> None:
        """Append a range of another file. The kernel copies it, without a detour through memory.

        Args:
            suffix: The file that grows.
            path: The file that is read.
            start: First byte of the range.
            size: Its length in bytes.
        """
        file = self._files[suffix]
        file.flush()
        with path.open("rb") as other:
            other.seek(start)
            while size:
                try:
                    copied = os.copy_file_range(other.fileno(), file.fileno(), size)
                except OSError as error:
                    if error.errno not in _CANNOT_COPY:
                        raise
                    copied = os.sendfile(file.fileno(), other.fileno(), None, size)
                if not copied:
                    raise OSError(errno.EIO, f"{path} has become shorter")
                size -= copied
        file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        for file in self._files.values():
            file.flush()
            os.fdatasync(file.fileno())

    def close(self) -> None:
        """Close the files, which writes what is still buffered."""
        for file in self._files.values():
            file.close()

    def close_anyhow(self) -> None:
        """Close the files even if the disk is full: an earlier error is the one to report."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:
                file.raw.close()  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Remove the folder with everything in it, as far as possible."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def move_into_place(self, suffix: str) -> None:
        """Replace the finished file by the new one, unless an earlier process has already done
        so."""
        final = file_of(self.prefix, suffix)
        if self.path(suffix).exists() or not final.exists():
            self.path(suffix).replace(final)
