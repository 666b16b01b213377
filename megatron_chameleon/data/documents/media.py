"""Recognizes pictures, sound and video in values of any kind.

A file of documents may have any key. A key that nobody reads must not hold a picture, because its
text alone would then be trained as if there were none.
"""

import base64
import binascii
import re
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


IMAGE_SUFFIXES = _names(
    "jpg jpeg jpe jfif png apng webp gif bmp tif tiff ppm pgm pbm pnm avif heic heif jp2 j2k jxl"
    " ico tga dds psd svg exr hdr"
)
AUDIO_SUFFIXES = _names("wav mp3 flac ogg oga opus m4a aac wma aiff")
VIDEO_SUFFIXES = _names("mp4 webm mkv avi mov m4v mpg mpeg wmv flv ogv")

IMAGE, AUDIO, VIDEO = "image", "audio", "video"

LONGEST_PATH = 4096
MOST_WORDS = 8
"""A text of more words that ends with .png is prose about a file, not the name of one."""
DEEPEST = 16

_SUFFIXES = {
    **dict.fromkeys(IMAGE_SUFFIXES, IMAGE),
    **dict.fromkeys(AUDIO_SUFFIXES, AUDIO),
    **dict.fromkeys(VIDEO_SUFFIXES, VIDEO),
}
_DATA_URI = re.compile(r"data:(image|audio|video)/", re.IGNORECASE)
_MAGIC = (
    (b"\xff\xd8\xff", IMAGE),
    (b"\x89PNG\r\n", IMAGE),
    (b"GIF87a", IMAGE),
    (b"GIF89a", IMAGE),
    (b"II*\0", IMAGE),
    (b"MM\0*", IMAGE),
    (b"\xff\x0a", IMAGE),
    (b"\0\0\0\x0cJXL ", IMAGE),
    (b"\0\0\0\x0cjP  ", IMAGE),
    (b"8BPS", IMAGE),
    (b"DDS ", IMAGE),
    (b"ID3", AUDIO),
    (b"fLaC", AUDIO),
    (b"OggS", AUDIO),
    (b"\x1aE\xdf\xa3", VIDEO),
)
_RIFF = {b"WEBP": IMAGE, b"WAVE": AUDIO, b"AVI ": VIDEO}
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_BASE64_OF_IMAGE = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD[dl]h|UklGR)[A-Za-z0-9+/=\s]*\Z")
_BEGINNINGS = frozenset(("data", "/9j/", "ivbo", "r0lg", "uklg"))
"""What a data: URI or the base64 text of an image begins with."""
_NUMBERS = frozenset((int, float, bool, type(None)))
_LEAST_BASE64 = 48
"""Fewer letters are a word or a path such as /9j/a.png, not an image file."""


def medium_of(value: Any, depth: int = 0, links: bool = True) -> str:
    """What a value holds: ``image``, ``audio``, ``video``, or nothing of the three (empty).

    A path with such a suffix, a data: URI, a file's bytes or its base64 text count, and so do
    objects and lists that hold one of them at any depth down to ``DEEPEST``.

    Args:
        value: Any value of JSON or Arrow.
        depth: How deep inside of another value it lies.
        links: Whether links to the web count.
    """
    if isinstance(value, str):
        return "" if not links and is_link(value) else _of_text(value)
    if isinstance(value, bytes):
        return medium_of_bytes(value)
    if isinstance(value, dict) and depth < DEEPEST:
        if value.keys() >= {"array", "sampling_rate"} or (
            value.get("bytes") and value.get("sampling_rate")
        ):
            return AUDIO
        if value.get("bytes") and value.keys() <= {"bytes", "path"}:  # Image of HF datasets
            return medium_of(value["bytes"]) or medium_of(value.get("path")) or IMAGE
        inner = value.values()
        return next((m for v in inner if (m := medium_of(v, depth + 1, links))), "")
    if isinstance(value, list | tuple) and depth < DEEPEST:
        if _NUMBERS.issuperset(map(type, value)):  # an embedding, in a fraction of the time
            return ""
        return next((m for v in value if (m := medium_of(v, depth + 1, links))), "")
    return ""


def medium_of_bytes(data: bytes) -> str:
    """The medium of a file by its first bytes; empty if they are those of no known kind."""
    head = data[:16]
    for magic, medium in _MAGIC:
        if head.startswith(magic):
            return medium
    if head.startswith(b"RIFF"):
        return _RIFF.get(head[8:12], "")
    if head[4:8] == b"ftyp":
        return IMAGE if head[8:12] in _IMAGE_BRANDS else VIDEO
    if head.startswith(b"BM") and len(data) >= 26:
        return IMAGE if int.from_bytes(data[2:6], "little") == len(data) else ""
    return IMAGE if re.match(rb"P[1-6]\s+(?:#|\d)", head) else ""


def medium_of_suffix(name: str) -> str:
    """The medium that a file's name promises; empty if its suffix is of no known kind."""
    stem, dot, suffix = name.rpartition(".")
    return _SUFFIXES.get(suffix.lower(), "") if dot and stem and stem[-1] not in "/\\" else ""


def is_link(value: Any) -> bool:
    """Whether a value is a link to the web, or holds nothing but such links."""
    if isinstance(value, dict):
        return is_link([v for v in value.values() if isinstance(v, str)])
    if isinstance(value, list | tuple):
        return bool(value) and all(is_link(v) for v in value)
    return isinstance(value, str) and value[:8].lower().startswith(("http://", "https://"))


def image_of_base64(text: str) -> bytes | None:
    """The bytes of an image file written as base64 without a data: prefix; None if it is not."""
    if len(text) < _LEAST_BASE64 or not _BASE64_OF_IMAGE.match(text):
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        return None


def is_encoded(text: str) -> bool:
    """Whether a text is nothing but the data: URI or base64 text of an image, sound or video."""
    if text[:4].lower() not in _BEGINNINGS:
        return False
    return bool(_DATA_URI.match(text)) or image_of_base64(text) is not None


def _of_text(text: str) -> str:
    if "." not in text and text[:4].lower() not in _BEGINNINGS:
        return ""
    if match := _DATA_URI.match(text):
        return match[1].lower()
    if len(text) > LONGEST_PATH or "\n" in text.strip():
        return IMAGE if _BASE64_OF_IMAGE.match(text) and len(text) >= _LEAST_BASE64 else ""
    name = text.strip()
    if "://" in name:
        name = re.split(r"[?#]", name, maxsplit=1)[0]
        if name.count("/") < 3:  # http://example.jpg names a host
            return ""
    if found := medium_of_suffix(name):
        return found if name.count(" ") < MOST_WORDS else ""
    return IMAGE if len(text) >= _LEAST_BASE64 and _BASE64_OF_IMAGE.match(text) else ""
