"""Reads image files through fsspec: from hosts and out of archives, where an option allows it.

A chain such as ``zip://a.png::s3://bucket/a.zip`` reads out of a file in another place. Each of its
links needs permission, and a last link that is a local file must lie below an allowed folder.
"""

import errno
import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from urllib.parse import unquote

from megatron_chameleon.errors import DataError, first_line
from megatron_chameleon.images.image_error import ImageError, missing, refused
from megatron_chameleon.images.local_files import above_limit, open_checked
from megatron_chameleon.images.options import LOCAL_PROTOCOLS, ImageOptions

_OURS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)
"""Faults of this machine, whichever host was asked."""
_OF_THE_SERVICE = (401, 407, 408, 425, 429)
"""HTTP answers below 500 that are not about the file that was asked for."""
SECONDS_PER_IMAGE = 60
_CACHES = ("blockcache", "cached", "filecache", "simplecache")
"""They know a file by its name, and an open local file has another name each time."""


def is_url(value: str) -> bool:
    return "://" in value


def file_url_path(value: str) -> str | None:
    """The path of a ``file://`` URL; None for all else, also for a file of another host."""
    protocol, _, path = value.partition("://")
    if protocol.lower() not in LOCAL_PROTOCOLS or "::" in path:
        return None
    path = path.removeprefix("localhost") if path.startswith("localhost/") else path
    return path if path.startswith("/") else None


def stays_below(relative: str) -> bool:
    """Whether a relative reference cannot leave the URL that it is appended to."""
    plain = unquote(unquote(relative))
    segments = plain.replace("\\", "/").split("/")
    return ".." not in segments and not any(mark in plain for mark in ("::", "://", "\0"))


def read_below_url(url: str, name: str, documents: str, options: ImageOptions) -> bytes:
    """Read an image below a folder or root that the user named by its URL.

    Args:
        url: The image.
        name: What errors call it.
        documents: The file or folder of documents. If it is gone too, the network has failed.
        options: The limit of bytes.

    Raises:
        ImageError: There is no such file, or it is too large.
        DataError: The network or the service fails.
    """
    try:
        return _read(url, name, options)
    except ImageError:
        raise
    except Exception as error:  # each file system raises its own
        if not _is_about_the_file(error):
            raise _network_fault(name, error) from error
        cause = error
    try:
        _check_there(documents)
    except Exception as error:
        raise _network_fault(documents, error) from error
    raise missing(name, f"no such image file ({_cause(cause)})") from cause


def read_foreign_url(value: str, places: Sequence[str], name: str, options: ImageOptions) -> bytes:
    """Read an image from a place that a document chose, if the options allow its protocols.

    Args:
        value: A URL or a chain of them.
        places: Local folders that a last link without a protocol may lie below.
        name: What errors call the image.
        options: The protocols, and the limit of bytes.

    Raises:
        ImageError: A protocol is not allowed, or the file cannot be read.
        DataError: This machine's disk fails.
    """
    with ExitStack() as stack:
        url = _allowed_chain(value, places, name, options, stack)
        try:
            return _read(url, name, options)
        except ImageError:
            raise
        except Exception as error:  # each file system raises its own
            if isinstance(error, OSError) and error.errno in _OURS:
                raise _network_fault(name, error) from error
            what = f"the image cannot be fetched ({_cause(error)})"
            raise missing(name, what, "Check the link, or remove it") from error


def _allowed_chain(
    value: str, places: Sequence[str], name: str, options: ImageOptions, stack: ExitStack
) -> str:
    """The chain with a checked last link; local files stay open until ``stack`` is closed."""
    links = [_split(link, "::" in value) for link in value.split("::")]
    *outer, (last_protocol, last_path) = links
    checked = [(_allowed(protocol, name, options), path) for protocol, path in outer]
    if outer and last_protocol in LOCAL_PROTOCOLS:
        path = last_path
        if not path.startswith("/"):
            path = f"{places[0] if places else '.'}/{path}"
        descriptor = stack.enter_context(open_checked(path, places, name))
        checked = [link for link in checked if link[0] not in _CACHES]
        checked.append(("file", f"/proc/self/fd/{descriptor}"))
    else:
        checked.append((_allowed(last_protocol, name, options), last_path))
    return "::".join(f"{protocol}://{path}" for protocol, path in checked)


def _split(link: str, is_chained: bool) -> tuple[str, str]:
    """Protocol and path of a link; as in fsspec, a single word of a chain is a protocol."""
    protocol, separator, path = link.partition("://")
    if separator:
        return protocol.lower(), path
    return (link.lower(), "") if is_chained and link.isalpha() else ("file", link)


def _allowed(protocol: str, name: str, options: ImageOptions) -> str:
    if protocol in options.protocols and protocol not in LOCAL_PROTOCOLS:
        return protocol
    what = f"the image is a link by the protocol {protocol[:40]!r}, which is not allowed"
    remedy = "Download the image first"
    if re.fullmatch(r"[a-z0-9_+.-]{1,40}", protocol):
        remedy += f", or add --image-protocols {protocol}"
    raise refused(name, what, remedy)


def _read(url: str, name: str, options: ImageOptions) -> bytes:
    import fsspec

    kwargs: dict[str, Any] = {}
    if web := {link.partition("://")[0] for link in url.split("::")} & {"http", "https"}:
        import aiohttp

        limit = {"timeout": aiohttp.ClientTimeout(total=SECONDS_PER_IMAGE)}
        kwargs = {protocol: {"client_kwargs": limit} for protocol in web}
    system, path = fsspec.core.url_to_fs(url, **kwargs)
    with system.open(path, "rb") as file:
        data: bytes = file.read(options.max_bytes + 1)
    if len(data) > options.max_bytes:
        raise above_limit(name, len(data), options)
    return data


def _check_there(url: str) -> None:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    system.info(path)


def _is_about_the_file(error: Exception) -> bool:
    """Whether a service that works may say this of a file that a document made up.

    It may break the rules of its protocol for one file. Whether it works is asked afterwards.
    """
    cause = error.__cause__
    if isinstance(cause, Exception) and type(cause).__module__.startswith("aiohttp"):
        error = cause  # fsspec says "not found" for whatever went wrong
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _OF_THE_SERVICE
    kinds = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    return isinstance(error, kinds) or not isinstance(error, OSError)


def _network_fault(where: str, error: Exception) -> DataError:
    what = f"cannot be read ({_cause(error)})"
    return DataError(where, what, "Check the network, and run the same command again")


def _cause(error: Exception) -> str:
    return first_line(error)[:200].encode("utf-8", "backslashreplace").decode()
