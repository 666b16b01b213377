"""How answers are written: texts in a line of JSON, images in PNG files beside it."""

from typing import TYPE_CHECKING

from megatron_chameleon.images.png import png_bytes

if TYPE_CHECKING:
    from megatron_chameleon.inference.answers.answer import Answer


def image_name(number: int, index: int) -> str:
    """The name of the file for part ``index`` of answer ``number``, both counted from 0."""
    return f"{number:04d}-{index}.png"


def parts_and_images(
    number: int, answer: "Answer"
) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """An answer as the ``content`` of a document, and the files of its images.

    Args:
        number: Of the answer among those of one folder, counted from 0.
        answer: The answer.

    Returns:
        The parts in order, and the bytes of each PNG by the name that its part states.
    """
    parts: list[dict[str, str]] = []
    images: dict[str, bytes] = {}
    for index, part in enumerate(answer.content):
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        name = image_name(number, index)
        images[name] = png_bytes(part)
        parts.append({"type": "image", "image": name})
    return parts, images
