"""Reads the files of a tar as a stream, within limits that the tar cannot choose.

Python's tarfile reads extended headers of any size into memory, follows sizes of exabytes, and
gives up at the first damaged header. Here all sizes are bounded, and reading goes on at the next
sound header. The formats are ustar, pax, and GNU's with long names; sparse files are refused.
Blocks of zeros are passed over, so that tars may follow one another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from megatron_chameleon.data.inputs.decoding.broken_file import BrokenFile, check_signature

BLOCK = 512
_SKIP_BYTES = 1 << 20
_ZEROS = bytes(BLOCK)
_FILE_TYPES = b"0\0007S"
_WITHOUT_CONTENT = b"123456"
"""Links, devices, folders and FIFOs: their size, if they have one, is that of something else."""


class Reader(Protocol):
    """What a tar is read from."""

    def read(self, size: int, /) -> bytes:
        """The next bytes: as many as asked for, unless the file ends."""


@dataclass(frozen=True)
class Entry:
    """A regular file of a tar, or a place where the tar is damaged."""

    name: str
    size: int = 0
    """Bytes of its content and of its extended headers, as the headers say."""
    content: bytes | None = None
    """None if it is too large or cannot be used."""
    problem: str = ""
    """Why it cannot be used; if there is no name, what is damaged at this place."""


@dataclass
class _Extended:
    """What extended headers say of the file that follows them."""

    name: bytes | None = None
    size: int | None = None
    bytes: int = 0
    problem: str = ""


def read_entries(stream: Reader, limit: int) -> Iterator[Entry]:
    """The regular files in order, and the damaged places between them.

    Args:
        stream: The tar, decompressed.
        limit: Most bytes of a file and its headers; the content of a larger one is not kept.

    Raises:
        BrokenFile: The tar breaks off, or it has no sound header at all.
    """
    extended, is_lost, has_any = _Extended(), False, False
    while header := stream.read(BLOCK):
        if header == _ZEROS or (is_lost and header[257:262] != b"ustar"):
            continue
        size = _size_of(header)
        if size is None:
            if not has_any and not is_lost:
                check_signature(header)
            if len(header) < BLOCK and not is_lost:
                raise BrokenFile("unexpected end within a header")
            if has_any and not is_lost:
                yield Entry("", problem="a header is damaged")
            extended, is_lost = _Extended(), True
            continue
        is_lost, has_any = False, True
        kind = header[156]
        if kind in b"xXLKg":
            _read_extended(stream, kind, size, limit, extended)
            continue
        if kind in _FILE_TYPES:
            yield from _read_file(stream, header, size, limit, extended)
        elif kind not in _WITHOUT_CONTENT:
            _skip(stream, size)
        extended = _Extended()
    if is_lost and not has_any:
        raise BrokenFile("no header of a tar is found")


def _read_file(
    stream: Reader, header: bytes, size: int, limit: int, extended: _Extended
) -> Iterator[Entry]:
    """One regular file. One that breaks off comes with this problem, before the exception."""
    name = (_name_of(header) if extended.name is None else extended.name).decode("utf-8", "replace")
    if header[156] == ord("S"):
        extended.problem = "it is a sparse file"
        more = header[482]
        while more:  # further headers say where the data belong
            more = (stream.read(BLOCK) + _ZEROS)[504]
    size = size if extended.size is None else extended.size
    total = size + extended.bytes
    try:
        if extended.problem or total > limit:
            _skip(stream, size)
            yield Entry(name, total, None, extended.problem)
            return
        content = stream.read(size)
        if len(content) < size:
            raise BrokenFile("unexpected end within a file")
    except BrokenFile:
        yield Entry(name, total, None, "it breaks off")
        raise
    yield Entry(name, total, content)
    stream.read(-size % BLOCK)


def _skip(stream: Reader, size: int) -> None:
    """Pass over the content of an entry.

    Raises:
        BrokenFile: The tar ends within it.
    """
    left = size
    while left > 0:
        data = stream.read(min(left, _SKIP_BYTES))
        if not data:
            raise BrokenFile("unexpected end within a file")
        left -= len(data)
    stream.read(-size % BLOCK)


# Headers


def _read_extended(stream: Reader, kind: int, size: int, limit: int, extended: _Extended) -> None:
    """Read an extended header, or pass over it if it says nothing of use or is too large."""
    extended.bytes += size
    if kind in b"gK" or extended.bytes > limit:
        _skip(stream, size)
        return
    content = stream.read(size)
    if len(content) < size:
        raise BrokenFile("unexpected end within a header")
    stream.read(-size % BLOCK)
    if kind == ord("L"):
        extended.name = content.split(b"\0", 1)[0]
        return
    for key, value in _pax_records(content):
        if key == b"path":
            extended.name = value
        elif key == b"size":
            extended.size = int(value) if value.isdigit() and len(value) < 20 else None
            extended.problem = "" if extended.size is not None else "its size is no number"
        elif key.startswith(b"GNU.sparse."):
            extended.problem = "it is a sparse file"


def _pax_records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of ``LENGTH KEY=VALUE`` lines; it ends at the first that is damaged."""
    at = 0
    while at < len(content):
        space = content.find(b" ", at, at + 20)
        digits = content[at:space]
        end = at + int(digits) if space > 0 and digits.isdigit() else 0
        equals = content.find(b"=", space, min(end, space + 200))
        if equals < 0 or end > len(content):
            return
        if equals - space < 100:
            yield content[space + 1 : equals], content[equals + 1 : end - 1]
        at = end


def _name_of(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    is_posix = header[257:263] == b"ustar\0"  # GNU's headers have times at this place
    return prefix + b"/" + name if is_posix and prefix else name


def _size_of(header: bytes) -> int | None:
    """The size of the entry; None if this is not a sound header."""
    if len(header) < BLOCK:
        return None
    stated = _number(header[148:156])
    if stated is None:
        return None
    found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if stated != found:
        high = sum(byte >= 128 for byte in header) - sum(byte >= 128 for byte in header[148:156])
        if stated != found - 256 * high:  # some old programs added up signed bytes
            return None
    return _number(header[124:136])


def _number(field: bytes) -> int | None:
    """A number in octal digits, or in GNU's binary form; None if it is not valid."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if any(digit not in b"01234567" for digit in digits):
        return None
    return int(digits or b"0", 8)
