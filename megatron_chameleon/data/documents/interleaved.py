"""Reads documents whose texts and pictures stand in two lists: OBELICS, MMC4, The Cauldron.

{"images": ["0.png", null], "texts": [null, "..."]}               OBELICS
{"text_list": ["...", "..."], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]}
                                                                  MMC4
"""

from collections.abc import Mapping
from typing import Any

from megatron_chameleon.data.documents.pictures import Part, read_picture
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.references import ImageFolder

PICTURES_OF_TEXT_LIST = "image_info"
_NAMES_OF_PICTURES = ("image", "image_name", "raw_url", "url")
"""Where an entry of ``image_info`` names its picture; the first one with a value counts."""


def parse_parallel(record: Mapping[str, Any], folder: ImageFolder, where: str) -> tuple[Part, ...]:
    """The parts of the lists ``images`` and ``texts``; one of the two is null at each place.

    Raises:
        DataError: The lists are not of this form.
    """
    images, texts = record.get("images") or [], record.get("texts") or []
    if not isinstance(images, list) or not isinstance(texts, list):
        what = "images and texts must be lists"
        raise DataError(
            where, what, "Write two list columns; at each place one of the two must be null"
        )
    if len(images) != len(texts) or not images:
        what = f"images has {len(images)} entries, but texts has {len(texts)}"
        raise DataError(where, what, "Write two lists of the same length, at least 1")
    pairs = enumerate(zip(images, texts, strict=True))
    return tuple(_interleaved_part(i, image, text, folder, where) for i, (image, text) in pairs)


def _interleaved_part(
    position: int, image: Any, text: Any, folder: ImageFolder, where: str
) -> Part:
    if (image is None) == (text is None):
        both = "both null" if image is None else "both set"
        what = f"images[{position}] and texts[{position}] are {both}"
        raise DataError(where, what, "Set exactly one of the two at each place")
    if text is None:
        if not isinstance(image, str | bytes | dict):
            what = f"images[{position}] must be a path or bytes, not {type(image).__name__}"
            raise DataError(where, what, "Write paths or bytes into the list")
        return read_picture(image, f"images[{position}]", folder, where)
    return _text(text, f"texts[{position}]", where)


def parse_text_list(record: Mapping[str, Any], folder: ImageFolder, where: str) -> tuple[Part, ...]:
    """The parts of an MMC4 document: each picture stands before the text that it matches.

    Pictures that match the same text keep their order in ``image_info``.

    Raises:
        DataError: The lists are not of this form, or a picture has no place.
    """
    texts = record["text_list"]
    pictures = record.get(PICTURES_OF_TEXT_LIST)
    pictures = [] if pictures is None else pictures
    if not isinstance(texts, list) or not texts or not isinstance(pictures, list):
        what = "text_list and image_info must be lists, and text_list must have an entry"
        raise DataError(where, what, "Write them as MMC4 does")
    at: list[list[Part]] = [[] for _ in texts]
    for position, info in enumerate(pictures):
        name = f"image_info[{position}]"
        fields = info if isinstance(info, dict) else {}
        index = fields.get("matched_text_index")
        is_number = isinstance(index, int) and not isinstance(index, bool)
        place = index if isinstance(index, int) and is_number else -1
        if not 0 <= place < len(texts):
            what = f"{name} has the matched_text_index {str(index)[:40]}, but text_list has "
            what += f"{len(texts)} entries, counted from 0"
            raise DataError(where, what, "Give each picture the number of its text")
        key = next((key for key in _NAMES_OF_PICTURES if fields.get(key)), None)
        if key is None:
            what = f"{name} names no picture"
            raise DataError(where, what, "Write the name of its file under the key image_name")
        at[place].append(read_picture(fields[key], f"{name}.{key}", folder, where))
    parts: list[Part] = []
    for position, text in enumerate(texts):
        parts += [*at[position], _text(text, f"text_list[{position}]", where)]
    return tuple(parts)


def _text(text: Any, name: str, where: str) -> TextPart:
    if not isinstance(text, str):
        what = f"{name} must be a string, not {type(text).__name__}"
        raise DataError(where, what, "Write strings into the list")
    return TextPart(text.removeprefix("\ufeff"))
