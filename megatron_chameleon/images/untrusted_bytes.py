"""What is looked at in the bytes of an image file before Pillow decodes it."""

import re
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)
"""A marker with a length; in the data of a scan, 0xff is followed by 0 or a restart marker."""
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Texts that say how an image is turned."""
MOST_METADATA_BYTES = 1 << 20
"""Pillow refuses images with larger compressed texts or profiles, although it needs neither."""


def scans_of_jpeg(data: bytes) -> int:
    """The number of scans of the first image in a JPEG file, 0 for other files."""
    if not data.startswith(b"\xff\xd8"):
        return 0
    scans, position = 0, 2
    while marker := _JPEG_MARKER.search(data, position):
        kind = marker[0][1]
        if kind == _END_OF_IMAGE:
            break
        scans += kind == _START_OF_SCAN
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def gray_bits_of_png(data: bytes) -> int:
    """Bits of a gray level in a PNG file; 0 for other files and colours."""
    is_gray = data.startswith(_PNG) and data[12:16] == b"IHDR" and data[25:26] == b"\0"
    return data[24] if is_gray else 0


def size_in_icon(data: bytes) -> tuple[int, int]:
    """Width and height of the largest image inside an icon or cursor; (0, 0) for other files.

    Pillow decodes the inner image to learn its size.
    """
    largest = 0, 0
    if data[:4] not in (b"\0\0\1\0", b"\0\0\2\0"):
        return largest
    for number in range(int.from_bytes(data[4:6], "little")):
        start = int.from_bytes(data[18 + 16 * number : 22 + 16 * number], "little")
        inner = data[start : start + 24]
        if inner.startswith(_PNG):
            size = int.from_bytes(inner[16:20], "big"), int.from_bytes(inner[20:24], "big")
        else:
            size = int.from_bytes(inner[4:8], "little"), int.from_bytes(inner[8:12], "little") // 2
        largest = max(largest, size, key=lambda size: size[0] * size[1])
    return largest


def without_large_chunks(data: bytes) -> bytes:
    """A PNG file without texts, which nobody reads, and without a profile that is too large."""
    if not data.startswith(_PNG):
        return data
    kept = [data[:8]]
    dropped = False
    for kind, start, stop in _chunks(data):
        if _is_dead_weight(kind, data[start + 8 : stop - 4]):
            dropped = True
        else:
            kept.append(data[start:stop])
    return b"".join(kept) if dropped else data


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of each chunk; the last one holds what is left of a broken file."""
    start = 8
    while start < len(data):
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        yield kind, start, min(stop, len(data))
        start = stop


def _is_dead_weight(kind: bytes, content: bytes) -> bool:
    if kind == b"iCCP":
        _, _, compressed = content.partition(b"\0")
        return _is_large(compressed[1:])
    if kind not in _TEXTS:
        return False
    if not content.startswith(_ORIENTATION) or len(content) > MOST_METADATA_BYTES:
        return True
    _, _, rest = content.partition(b"\0")
    if kind == b"zTXt":
        return _is_large(rest[1:])
    return kind == b"iTXt" and rest[:1] == b"\1"


def _is_large(compressed: bytes) -> bool:
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(compressed, MOST_METADATA_BYTES)
    except zlib.error:
        return False
    return bool(inflate.unconsumed_tail)
