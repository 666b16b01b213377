"""Reads image files of this machine that lie below given folders, whatever their names say.

A file is first opened with ``O_PATH``, which follows links but has no effect on what it finds: no
FIFO blocks and no device starts. What was found is judged by its kind and by the real path that the
kernel gives for it. Only then is that very file opened for reading, so nobody can exchange it
between the check and the reading.
"""

import errno
import functools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_chameleon.errors import DataError
from megatron_chameleon.images.image_error import ImageError, missing, refused, too_large
from megatron_chameleon.images.options import ImageOptions

_MISSING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ),
    *(errno.EACCES, errno.EPERM),
)
"""Errors that a document can cause by the name that it gives."""
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_NOT_ON_DISK = ("/proc", "/sys")
"""Their files are regular, but they show processes and devices."""


def read_named(path: str, options: ImageOptions) -> bytes:
    """Read an image that the user named, wherever it lies.

    Raises:
        ImageError: There is no such file, or it is not a regular one or too large.
        DataError: The disk fails.
    """
    with open_checked(path, None, path) as descriptor:
        return read_all(descriptor, path, options)


def check_named(path: str) -> None:
    """Check that an image that the user named can be opened.

    Raises:
        ImageError: There is no such file, or it is not a regular one.
        DataError: The disk fails.
    """
    with open_checked(path, None, path):
        pass


@contextmanager
def open_checked(path: str, places: Sequence[str] | None, name: str) -> Iterator[int]:
    """A descriptor of a regular file below one of the places, open for reading.

    Args:
        path: The file; links are followed.
        places: Folders; None allows all.
        name: What errors call the file.

    Raises:
        ImageError: It does not exist, lies elsewhere, or is not a regular file.
        DataError: The disk fails.
    """
    if places is not None and not any(_below(_absolute(path), place) for place in _all(places)):
        raise _outside(name, _absolute(path))
    with _closed(_os_open(path, os.O_PATH, name)) as found:
        _judge(found, places, name)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        with _closed(_os_open(f"/proc/self/fd/{found}", flags, name)) as descriptor:
            yield descriptor


def read_all(descriptor: int, name: str, options: ImageOptions) -> bytes:
    """The bytes of an open file.

    Raises:
        ImageError: It has more than the limit.
        DataError: The disk fails.
    """
    size = os.fstat(descriptor).st_size
    limit = options.max_bytes
    data = b""
    if size <= limit:
        try:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                # a file may grow, and read(limit) would allocate the limit
                data = file.read(size) + file.read(min(1 << 20, limit + 1 - size))
        except OSError as error:
            raise disk_fault(name, error) from error
    if max(size, len(data)) > limit:
        raise above_limit(name, max(size, len(data)), options)
    return data


def above_limit(name: str, size: int, options: ImageOptions) -> ImageError:
    """The error for a file with more bytes than allowed."""
    what = f"{size / (1 << 20):.1f} MiB, the limit is {options.max_mib}"
    return too_large(name, what, "Make it smaller, or raise --max-image-mib")


def disk_fault(name: str, error: OSError) -> DataError:
    """The error for a disk that fails; it ends the job, or one document after another would go."""
    what = f"cannot read the image ({error.strerror or type(error).__name__})"
    return DataError(name, what, "Check the file system")


def _judge(descriptor: int, places: Sequence[str] | None, name: str) -> None:
    """Refuse what is not a regular file below one of the places."""
    mode = os.fstat(descriptor).st_mode
    real = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    if places is not None:
        if not any(_below(real, _real(place)) for place in places):
            raise _outside(name, real)
        if any(_below(real, place) for place in _NOT_ON_DISK):
            raise refused(name, "the image is not a file on a disk", "Replace or remove it")
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "not a regular file")
        raise refused(name, f"the image is {kind}", "Name a regular file")


def _os_open(path: str, flags: int, name: str) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except ValueError as error:  # a null byte or a lone surrogate
        raise missing(name, "no file can have this name") from error
    except OSError as error:
        if error.errno not in _MISSING:
            raise disk_fault(name, error) from error
        raise _not_found(name, error) from error


def _not_found(name: str, error: OSError) -> ImageError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return missing(name, "the image may not be read", "Check its permissions")
    if error.errno == errno.ELOOP:
        return missing(name, "the image is a link that leads in a circle")
    if "\\" in name:
        return missing(name, "no such image file", "Write / between folders, not \\")
    if error.errno == errno.ENAMETOOLONG:
        return missing(name, "no such image file (the name is too long)")
    return missing(name)


def _outside(name: str, target: str) -> ImageError:
    what = "the image lies outside the folder of its documents"
    if target != name:
        what += f", at {target[:200]}"
    remedy = f"If you trust the documents, add --image-root {Path(target).parent}"
    if any(_below(target, place) for place in _NOT_ON_DISK):
        remedy = "Replace or remove it"
    return refused(name, what, remedy)


@contextmanager
def _closed(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _all(places: Sequence[str]) -> Iterator[str]:
    for place in places:
        yield _absolute(place)
        yield _real(place)


def _absolute(path: str) -> str:
    # Path.absolute keeps `..`, and abspath keeps the two slashes of `//etc`
    return "/" + os.path.abspath(path).lstrip("/")  # noqa: PTH100


def _real(place: str) -> str:
    # the current folder belongs to the key, since it may change
    return _real_of(os.path.join(os.getcwd(), place))  # noqa: PTH109, PTH118


@functools.lru_cache(maxsize=4096)
def _real_of(path: str) -> str:
    return os.path.realpath(path)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
