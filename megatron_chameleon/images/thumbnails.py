"""Pictures made small for pages: those that fit stay as they are, larger ones become JPEG files."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.files import read_bytes
from megatron_chameleon.images.decoding import decode_image
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.pixels import PixelError, upright_rgb

if TYPE_CHECKING:
    from PIL import Image

LARGEST_FILE_BYTES = 32 << 20


def thumbnail(picture: "Image.Image", side: int) -> bytes:
    """A picture of any mode as a file of at most ``side`` pixels a side.

    Raises:
        PixelError: It has no pixels that can be shown.
    """
    from PIL import Image

    small = upright_rgb(picture)
    buffer = io.BytesIO()
    if max(small.size) <= side:
        small.save(buffer, "png", optimize=True)
    else:
        small = small.copy()  # it may be the one that was given
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        small.save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def thumbnail_of_file(path: Path, side: int) -> bytes:
    """The same of a file, which may be anything.

    Raises:
        ChameleonError: It cannot be read or decoded.
    """
    data = read_bytes(path, limit=LARGEST_FILE_BYTES)
    try:
        return thumbnail(decode_image(data, str(path), ImageOptions()), side)
    except PixelError as error:
        raise ImageError(str(path), str(error), "Replace or remove it") from error
