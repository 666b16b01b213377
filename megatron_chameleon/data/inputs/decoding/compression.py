"""Decompresses gzip and zstd as a stream, and gives all that a damaged file still has.

Zeros after the end of the compressed data are padding, as tapes and some writers leave it. Anything
else there is reported after the content, because it may be a damaged part of it.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from megatron_chameleon.data.inputs.decoding.broken_file import BrokenFile

READ_BYTES = 1 << 16
"""Compressed files are read, and their content is given, in steps of at most this size."""

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP = zlib.MAX_WBITS | 16
_NO_FRAME = "Unknown frame descriptor"
"""What zstd says where a frame should begin and something else does."""


def decompressed(file: IO[bytes], compression: str) -> Iterator[bytes]:
    """The content of a compressed file, in pieces of at most ``READ_BYTES``.

    Args:
        file: The file, at its beginning.
        compression: gzip or zstd.

    Raises:
        BrokenFile: After everything that could be decompressed, if the file breaks off or is
            damaged.
        OSError: If the disk or network fails.
    """
    return _gunzip(file) if compression == "gzip" else _unzstd(file)


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    """The content of all members, up to the byte at which one is damaged."""
    data = file.read(READ_BYTES)
    if data and not _GZIP_MAGIC.startswith(data[:2]):
        raise BrokenFile("the file is not gzip", "Let its name end as its kind does")
    while data:
        member = zlib.decompressobj(_GZIP)
        while not member.eof:
            if not data:
                raise BrokenFile("unexpected end of the compressed data")
            before = member.copy()
            try:
                content = member.decompress(data, READ_BYTES)
            except zlib.error as error:
                yield _before_fault(before, data)
                raise BrokenFile(str(error)) from error
            if content:
                yield content
            data = member.unconsumed_tail or (b"" if member.eof else file.read(READ_BYTES))
        data = _after_padding(file, member.unused_data)
        if data and not data.startswith(_GZIP_MAGIC):
            raise BrokenFile("what follows the compressed data is not gzip")


def _before_fault(member: Any, data: bytes) -> bytes:
    """What the next call would give if it did not fail; it is found by bisection.

    Less room for the output stops just before a broken symbol. Less input stops before a checksum
    that does not agree, which zlib reads as soon as it has the last symbol.
    """
    by_output = _longest(READ_BYTES, lambda size: member.copy().decompress(data, size))
    by_input = _longest(len(data), lambda size: member.copy().decompress(data[:size], READ_BYTES))
    return max(by_output, by_input, key=len)


def _longest(limit: int, decompress: Callable[[int], bytes]) -> bytes:
    """The result for the largest size below the limit that does not fail."""
    found, low, high = b"", 0, limit
    while high - low > 1:
        size = (low + high) // 2
        try:
            found, low = decompress(size), size
        except zlib.error:
            high = size
    return found


def _after_padding(file: IO[bytes], data: bytes) -> bytes:
    """What follows any number of zeros; two bytes of it or more, unless the file ends."""
    data = data.lstrip(b"\0")
    while len(data) < 2 and (more := file.read(READ_BYTES)):
        data = (data + more).lstrip(b"\0")
    return data


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    """The content of all frames.

    A read that fails loses what it had decompressed before the fault. So the file is then
    decompressed again up to the last piece, and that piece byte by byte.
    """
    given = 0
    source = _ZstdSource(file)
    try:
        for content in _zstd_pieces(source, READ_BYTES):
            yield content
            given += len(content)
        return
    except BrokenFile as error:
        broken = error
    is_padded = _NO_FRAME in str(broken) and source.only_zeros_follow()
    yield from _zstd_rest(file, given)
    if not is_padded:
        raise broken


def _zstd_rest(file: IO[bytes], given: int) -> Iterator[bytes]:
    """What can be decompressed after the first ``given`` bytes, which were whole pieces."""
    file.seek(0)
    with _zstd_stream(_ZstdSource(file)) as stream:
        for _ in range(given // READ_BYTES):
            stream.read(READ_BYTES)
        rest = bytearray()
        try:
            while byte := stream.read(1):
                rest += byte
        except _decoder_errors() as error:
            _raise_if_disk(error)
    if rest:
        yield bytes(rest)


def _zstd_pieces(source: "_ZstdSource", size: int) -> Iterator[bytes]:
    try:
        with _zstd_stream(source) as stream:
            while content := stream.read(size):
                yield content
    except _decoder_errors() as error:
        _raise_if_disk(error)
        raise BrokenFile(" ".join(str(error).split())) from error


def _zstd_stream(source: "_ZstdSource") -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(source, mode="r"), "zstd")


def _decoder_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (pyarrow.ArrowException, OSError, EOFError)


def _raise_if_disk(error: Exception) -> None:
    """Arrow's own errors are of the same type as the disk's, but have no number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


class _ZstdSource:
    """Gives Arrow a file to read; Arrow closes this, not the file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._last = b""
        self.closed = False

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._last = data or self._last
        return data

    def close(self) -> None:
        self.closed = True

    def only_zeros_follow(self) -> bool:
        """Whether what was read last ends with zeros, and nothing else follows."""
        if not self._last.endswith(b"\0"):
            return False
        while data := self._file.read(READ_BYTES):
            if data.strip(b"\0"):
                return False
        return True
