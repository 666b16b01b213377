"""One way to write a file and one way to read it, used by every verb.

    write_text(Path("report.html"), page)
    with replace_file(Path("image.safetensors")) as file: ...
    config = read_json_object(folder / "config.json", CheckpointError)

A written file is complete or absent: it grows under a temporary name that nobody can foresee, is
flushed to the disk and then renamed. A failure of the disk is one error that names the file, and it
leaves nothing half-written. What a kill leaves, the next write of the same file removes. Temporary
names, locks and partial folders are opened without following links, because in a folder that others
can write a link could lead anywhere.

A read is bounded by a limit in bytes, and only regular files are opened: a FIFO would block
forever, and a device has no end.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from megatron_chameleon.errors import REMEDIES, ChameleonError, DataError
from megatron_chameleon.json_text import parse_json

SMALL_FILE_BYTES = 64 << 20
"""Limit of the small files: configs, indices, states, sidecars. The largest one of a real run is
the index of a 34B export, about 0.1 MB."""

_READ_BYTES = 1 << 16
_MOST_LOOKED_AT = 1000
"""Entries of a folder among which each write looks for what killed writers have left."""


def cannot_write(
    path: str | Path, error: OSError, kind: type[ChameleonError] = DataError
) -> ChameleonError:
    """The error to raise for an ``OSError`` while a file was written: one line that names it."""
    reason = error.strerror or str(error) or type(error).__name__
    remedy = REMEDIES.get(error.errno or 0, "Check the file system, or choose another folder")
    return kind(str(path), f"cannot be written ({reason})", remedy)


def why_no_folder(path: Path) -> str:
    """What to say of a path that should be a folder and is none."""
    return "is a file, not a folder" if os.path.lexists(path) else "no such folder"


def cannot_read(
    path: str | Path, error: OSError, kind: type[ChameleonError] = DataError
) -> ChameleonError:
    """The error to raise for an ``OSError`` while a file was read: one line that names it."""
    if isinstance(error, FileNotFoundError):
        return kind(str(path), "no such file", "Check the path")
    reason = error.strerror or str(error) or type(error).__name__
    return kind(str(path), f"cannot be read ({reason})", "Check its permissions and the disk")


@contextmanager
def writing(path: str | Path, kind: type[ChameleonError] = DataError) -> Iterator[None]:
    """Turn every ``OSError`` of the block into ``cannot_write(path, ...)``.

    Raises:
        ChameleonError: Of the given kind.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, kind) from error


def make_folder(path: str | Path, kind: type[ChameleonError] = DataError) -> Path:
    """Create a folder if it is missing, and check that a file can be written there.

    Call this before the work starts, not after hours of it.

    Raises:
        ChameleonError: Of the given kind: it cannot be created or not written.
    """
    folder = Path(path)
    with writing(folder, kind), _made(folder):
        try_to_write(folder)
    return folder


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Create a folder if it is missing; what was created is removed if the block fails."""
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise


def try_to_write(folder: Path) -> None:
    """Write a little into a folder, and leave nothing there.

    Raises:
        OSError: It cannot be written, or its disk is full.
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(bytes(4096))  # an empty file fits on a full disk


@contextmanager
def replace_file(
    path: str | Path, kind: type[ChameleonError] = DataError, private: bool = False
) -> Iterator[IO[bytes]]:
    """Write a file completely or not at all.

    The file appears under its name when the block ends without an exception; otherwise what had
    that name before is still there. Missing folders are created. A device or a FIFO, such as
    ``/dev/stdout``, is written directly.

    Args:
        path: The file.
        kind: The class of the error.
        private: Whether only the owner may read it (mode 0600), for files that may hold secrets.

    Raises:
        ChameleonError: Of the given kind, if the file system refuses it.
    """
    path = Path(path)
    with writing(path, kind):
        if is_special(path):
            with path.open("wb") as stream:
                yield stream
            return
        with _made(path.parent):
            file, partial = _create(path, private)
            try:
                with file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                    partial.replace(path)  # while the lock is held
            finally:
                with suppress(OSError):
                    partial.unlink()


def write_together(contents: Mapping[Path, bytes], kind: type[ChameleonError] = DataError) -> None:
    """Write files that belong together: all of them or none.

    Args:
        contents: What to write. The first file says that the set is whole: it is removed before
            the others are replaced, and appears last.
        kind: The class of the error.

    Raises:
        ChameleonError: Of the given kind, if the file system refuses one; the old files remain.
    """
    marker, *others = contents
    partials: dict[Path, Path] = {}
    with ExitStack() as stack:
        stack.callback(_remove, partials.values())
        with writing(marker, kind):
            stack.enter_context(_made(marker.parent))
        for path, content in contents.items():
            with writing(path, kind):
                path.parent.mkdir(parents=True, exist_ok=True)
                file, partials[path] = _create(path)
                stack.callback(_close, file)  # and so unlock, after the last is in place
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        with writing(marker, kind):
            marker.unlink(missing_ok=True)
        for path in (*others, marker):
            with writing(path, kind):
                partials[path].replace(path)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # a full disk was an error before, at the write
        file.close()


def write_bytes(
    path: str | Path,
    content: bytes,
    kind: type[ChameleonError] = DataError,
    private: bool = False,
) -> None:
    """Write a file completely or not at all; see ``replace_file``."""
    with replace_file(path, kind, private) as file:
        file.write(content)


def write_text(
    path: str | Path, content: str, kind: type[ChameleonError] = DataError, private: bool = False
) -> None:
    """Like ``write_bytes``, for text, which is written as UTF-8."""
    write_bytes(path, content.encode("utf-8", "surrogatepass"), kind, private)


def open_to_append(
    path: str | Path, kind: type[ChameleonError] = DataError, private: bool = False
) -> IO[bytes]:
    """Open a growing file, unbuffered, so that each ``write`` reaches it or raises ``OSError``.

    The caller wraps its writes in ``writing(path)``.

    Raises:
        ChameleonError: Of the given kind: it is a link, not a regular file, or not writable.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with writing(path, kind):
        descriptor = os.open(path, flags, 0o600 if private else 0o666)
        _check_regular(descriptor)
        return os.fdopen(descriptor, "ab", buffering=0)


def open_lock(path: str | Path, kind: type[ChameleonError] = DataError) -> int:
    """Open a lock file without following a link; the caller locks and closes it.

    Returns:
        A file descriptor.

    Raises:
        ChameleonError: Of the given kind: it is a link, not a regular file, or not writable.
    """
    with writing(path, kind):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        _check_regular(descriptor)
        return descriptor


def own_folder(
    path: str | Path,
    kind: type[ChameleonError] = DataError,
    elsewhere: str = "give another --output",
) -> Path:
    """Create or reuse a folder with a foreseeable name, such as ``PREFIX.partial``.

    Args:
        path: Of the folder.
        kind: Of the error.
        elsewhere: How the user has it put in another place.

    Raises:
        ChameleonError: Of the given kind: the name is a link or a file, belongs to someone else, or
            cannot be created. Nothing behind it is touched.
    """
    folder = Path(path)
    with writing(folder, kind):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()
        found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "is a link" if stat.S_ISLNK(found.st_mode) else "is not a folder"
        remedy = f"Remove it if you do not need it, or {elsewhere}"
        raise kind(str(folder), f"{what}, and the program puts its own files there", remedy)
    if found.st_uid != os.geteuid():
        what = f"belongs to user {found.st_uid}, and the program puts its own files there"
        remedy = f"Ask its owner to remove it, or {elsewhere}"
        raise kind(str(folder), what, remedy)
    return folder


def empty_folder(folder: Path) -> bool:
    """Remove all in a folder, not following links; returns whether there was anything."""
    entries = list(folder.iterdir())
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return bool(entries)


def open_to_read(path: str | Path, kind: type[ChameleonError] = DataError) -> IO[bytes]:
    """Open a regular file; never blocks, as a FIFO without a writer would.

    Raises:
        ChameleonError: Of the given kind: there is no such file, it is not a regular file, or it
            cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_regular(descriptor)
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        raise cannot_read(path, error, kind) from error
    except ValueError as error:  # a null byte in the name
        raise kind(repr(str(path))[:99], "no such file", "Check the path") from error
    return os.fdopen(descriptor, "rb")


def read_bytes(
    path: str | Path, kind: type[ChameleonError] = DataError, limit: int = SMALL_FILE_BYTES
) -> bytes:
    """Read a whole file.

    Raises:
        ChameleonError: Of the given kind: see ``open_to_read``; or it has more bytes.
    """
    with open_to_read(path, kind) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            content = b""
            if size <= limit:
                content = file.read(size)  # read(limit) would allocate the limit
                while len(content) <= limit and (more := file.read(_READ_BYTES)):
                    content += more
        except OSError as error:
            raise cannot_read(path, error, kind) from error
    if size > limit or len(content) > limit:
        what = (
            f"has {max(size, len(content))} bytes, more than the {limit} that such a file may have"
        )
        raise kind(str(path), what, "Check that it is the right file")
    return content


def read_text(
    path: str | Path, kind: type[ChameleonError] = DataError, limit: int = SMALL_FILE_BYTES
) -> str:
    """Read a whole UTF-8 file.

    Raises:
        ChameleonError: Of the given kind: see ``read_bytes``; or it is not UTF-8.
    """
    try:
        return read_bytes(path, kind, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start})"
        raise kind(str(path), what, "Write the file again, as UTF-8") from error


def read_json(
    path: str | Path, kind: type[ChameleonError] = DataError, limit: int = SMALL_FILE_BYTES
) -> Any:
    """Read a JSON file.

    Raises:
        ChameleonError: Of the given kind: see ``read_text``; or it is not JSON, or nested too
            deep.
    """
    return parse_json(read_text(path, kind, limit), str(path), kind)


def read_json_object(
    path: str | Path, kind: type[ChameleonError] = DataError, limit: int = SMALL_FILE_BYTES
) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ChameleonError: Of the given kind: see ``read_json``; or the value is not an object.
    """
    value = read_json(path, kind, limit)
    if not isinstance(value, dict):
        what = f"must hold a JSON object, not {_json_type(value)}"
        raise kind(str(path), what, "Restore the file, or write it again")
    return value


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process; False if another process holds it.

    Raises:
        OSError: The file system does not support locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _create(path: Path, private: bool = False) -> tuple[IO[bytes], Path]:
    """Open a new file beside one that it will replace; it is locked as long as it is open.

    What killed writers of the same file have left is removed: nobody holds the locks any more.

    Raises:
        IsADirectoryError: The path is a folder, which cannot be replaced by a file.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    start = f".{path.name[:100]}."
    _remove_abandoned(path.parent, start)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        partial = path.with_name(f"{start}{secrets.token_hex(8)}.partial")
        file = os.fdopen(os.open(partial, flags, 0o600 if private else 0o666), "wb")
        is_ours = True
        with suppress(OSError):  # without locks in the file system, nobody removes it either
            is_ours = try_lock(file.fileno())
        if is_ours and os.path.lexists(partial):
            return file, partial
        file.close()  # another writer took it for abandoned before it was locked


def _remove_abandoned(folder: Path, start: str) -> None:
    abandoned = re.compile(re.escape(start) + r"[0-9a-f]{16}\.partial")
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in islice(entries, _MOST_LOOKED_AT):
            if abandoned.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError), os.fdopen(os.open(entry.path, flags), "rb") as file:
                    if try_lock(file.fileno()):
                        Path(entry.path).unlink()


def is_special(path: Path) -> bool:
    """Whether it is a device, FIFO or socket, also behind a link, as ``/dev/stdout`` is."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if path.is_symlink() and str(path.readlink()).startswith("/proc/self/fd"):
        return True
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _check_regular(descriptor: int) -> None:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file")


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
