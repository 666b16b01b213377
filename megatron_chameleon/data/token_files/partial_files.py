"""The files of an unfinished token file, which grow in the folder PREFIX.partial.

Only one process at a time may write there, which a lock ensures. When the files are opened, each is
cut back to the size that the saved state names: what a killed process wrote after its last save is
lost.
"""

import errno
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from megatron_chameleon.data.token_files.format import file_of, partial_folder_of
from megatron_chameleon.errors import DataError
from megatron_chameleon.files import open_lock, own_folder, try_lock

STATE_FILE = "state.json"
"""How far the work is; ``writer_state.py`` reads it."""
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
            DataError: The folder cannot be made, is not ours, or is locked by another process.
            OSError: The file system has no locks.
        """
        own_folder(self.folder)
        self._lock = open_lock(self.folder / "lock")
        if not try_lock(self._lock):
            what = "another process is writing this token file"
            raise DataError(str(self.prefix), what, "Wait for it, or choose another --output")

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
            DataError: A file is shorter than its saved size, or is not a regular file.
            OSError: A file cannot be opened, for example because it is a link.
        """
        for suffix, size in sizes.items():
            path = self.path(suffix)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o666)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                os.close(descriptor)
                raise DataError(str(path), "is not a regular file", "Start again with --restart")
            file = os.fdopen(descriptor, "r+b", buffering=_BUFFER_BYTES)
            self._files[suffix] = file
            if status.st_size < size:
                what = f"{status.st_size} bytes, but state.json names {size}"
                raise DataError(str(path), what, "Start again with --restart")
            os.ftruncate(file.fileno(), size)
            file.seek(size)

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

    def remove_if_empty(self) -> None:
        """Remove the folder if this process holds it and no work in it has been saved."""
        if self._lock is not None and not (self.folder / STATE_FILE).exists():
            self.remove()

    def move_into_place(self, suffix: str) -> None:
        """Replace the finished file by the new one, unless an earlier process has already done
        so."""
        final = file_of(self.prefix, suffix)
        if self.path(suffix).exists() or not final.exists():
            self.path(suffix).replace(final)
