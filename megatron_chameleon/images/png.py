"""Images as PNG files in memory, and files in ``data:`` URLs."""

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def png_bytes(image: "Image.Image") -> bytes:
    """The bytes of a PNG file with an image."""
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    """A file inside a ``data:`` URL.

    Args:
        data: Its bytes.
        kind: Its media type.
    """
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
