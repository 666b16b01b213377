"""The keys and columns that tell which form a record has (``data/documents/shapes.py``)."""

import re

FIRST_FORM_KEYS = ("content", "text", "messages", "conversations")
"""A record has one of these at most."""
OTHER_FORM_KEYS = (
    *("prompt", "question", "query", "instruction"),
    *("texts", "text_list", "caption", "chosen"),
)
"""The first one decides if there is none of ``FIRST_FORM_KEYS``."""
FORM_KEYS = (*FIRST_FORM_KEYS, *OTHER_FORM_KEYS)
LINK_KEYS = ("url", "image_url", "img_url", "urls", "link")
"""A table of links to pictures, as LAION publishes it, has one of these in small or large letters.
"""
WEIGHT_KEY = "weight"
"""How often the image tokenizer's training draws the images of a document."""

PICTURE_KEY = re.compile(
    r"(?:image|img|picture|pic|photo)s?(?:_?(?P<number>\d{1,4}))?(?:_(?:bytes|base64|b64|data))?"
    r"|jpe?g|png|webp|gif|bmp|tiff?",
    re.IGNORECASE,
)
"""Keys that hold pictures, such as ``image``, ``images`` and ``image_1``."""
