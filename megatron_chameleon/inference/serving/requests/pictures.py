"""Images of requests: data URLs, and by permission addresses of the web."""

import base64
import re
from dataclasses import dataclass

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.inference.serving.requests.limits import MIB, Limits
from megatron_chameleon.inference.serving.requests.refusal import Refusal, bad
from megatron_chameleon.wording import shown

_DATA_URL = re.compile(r"data:([^,;]{0,100})((?:;[^,;]{0,100}){0,8}),", re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,30}):", re.IGNORECASE)
_MIMES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif")
_MAGIC = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
)
_ESCAPES = (("%2B", "+"), ("%2b", "+"), ("%2F", "/"), ("%2f", "/"), ("%3D", "="), ("%3d", "="))
"""Of the letters of base64 in a URL. Undoing all escapes of a long text would take gigabytes."""
_FORMATS = "PNG, JPEG, WebP or GIF"
_REMEDY = f"Send {_FORMATS} as data:image/png;base64,..."


@dataclass(frozen=True)
class Picture:
    """An image of a request before it is decoded."""

    where: str
    """The field that has it."""
    data: bytes | None
    """The file; None if it is still to be fetched."""
    address: str = ""
    """Of the web."""

    def part(self, limits: Limits) -> ImagePart:
        """The image as a part of a document."""
        assert self.data is not None
        mib = -(-limits.image_bytes // MIB)
        return ImagePart(self.data, ImageOptions(max_pixels=limits.image_pixels, max_mib=mib))


def read_picture(url: str, where: str, limits: Limits, remote: bool) -> Picture:
    """Look at an image's URL without opening anything.

    Args:
        url: As the request has it.
        where: The field.
        limits: Of the server.
        remote: Whether images may be fetched from the web.

    Raises:
        Refusal: It is none that the server opens, or its data is broken or too large.
    """
    url = url.strip()
    if url[:5].lower() == "data:":
        return Picture(where, _data_of(url, where, limits))
    if _WEB.match(url):
        if not remote:
            what = "this server does not fetch images from the web"
            raise bad(where, what, f"{_REMEDY}, or start it with --allow-remote-images")
        return Picture(where, None, url)
    scheme = _SCHEME.match(url)
    what = f"{shown(url[:60])} is not a data: URL"
    if scheme:
        what = f"addresses with {scheme[1].lower()}: are not opened"
    raise bad(where, what, _REMEDY)


def check_file(data: bytes, where: str, limits: Limits) -> bytes:
    """Check the size and the kind of an image file; returns it.

    Raises:
        Refusal: It is empty, too large or no picture of a kind that is read.
    """
    if not data:
        raise bad(where, "the image has 0 bytes", _REMEDY)
    if len(data) > limits.image_bytes:
        raise too_large(where, f"{len(data):,}", limits)
    if not any(magic.match(data) for magic, _ in _MAGIC):
        start = data[:400].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        is_svg = start.startswith((b"<svg", b"<?xml", b"<!doctype svg"))
        what = "SVG is not read" if is_svg else f"the {len(data):,} bytes are not {_FORMATS}"
        raise bad(where, what, _REMEDY)
    return data


def too_large(where: str, size: str, limits: Limits) -> Refusal:
    """The refusal of a file with too many bytes."""
    limit = limits.image_bytes
    what = f"the image has {size} bytes, and the limit is {limit:,} ({limit // MIB:,} MiB)"
    remedy = "Make it smaller, or start the server with a larger --max-image-mib"
    return bad(where, what, remedy, "image_too_large")


def _data_of(url: str, where: str, limits: Limits) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        raise bad(where, "the data: URL has no comma behind its type", _REMEDY)
    mime, parameters = head[1].strip().lower(), head[2].lower().split(";")
    if mime not in _MIMES:
        kind = "the type of the data: URL is missing" if not mime else f"{shown(mime)} is not read"
        raise bad(where, kind, _REMEDY)
    if "base64" not in [parameter.strip() for parameter in parameters]:
        raise bad(where, "the data: URL is not in base64", _REMEDY)
    text = url[head.end() :]
    if len(text) > 2 * limits.image_bytes:  # before it is decoded; escapes make it longer
        raise too_large(where, f"more than {limits.image_bytes:,}", limits)
    try:
        for escape, letter in _ESCAPES:
            text = text.replace(escape, letter)
        encoded = text.encode("ascii")
        encoded = encoded.translate(None, b" \t\r\n").rstrip(b"=")  # as browsers read it
        data = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except ValueError as error:  # UnicodeEncodeError and binascii.Error too
        what = f"the base64 text of {len(text):,} characters is broken"
        raise bad(where, what, _REMEDY) from error
    return check_file(data, where, limits)
