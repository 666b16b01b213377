"""Names of the files of a tokenizer folder that name their format, and how those are read."""

from pathlib import Path
from typing import Any

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import read_json

IMAGE_CONFIG_FILE = "image.json"
IMAGE_WEIGHTS_FILE = "image.safetensors"
IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
"""Where an exported Hugging Face folder has the image tokenizer's files."""


def tokenizer_file(folder: str | Path, name: str) -> Path:
    """Where a file of a tokenizer is: in its folder, or in an exported one's ``image_tokenizer/``.

    Args:
        folder: A tokenizer folder, or a Hugging Face folder that ``chameleon convert`` wrote.
        name: The file's name.
    """
    path = Path(folder) / name
    exported = Path(folder) / IMAGE_TOKENIZER_FOLDER / name
    is_image = name in (IMAGE_CONFIG_FILE, IMAGE_WEIGHTS_FILE)
    return exported if is_image and not path.exists() and exported.exists() else path


def read_checked_json(
    path: Path, expected_format: str | tuple[str, ...], made_by: str
) -> dict[str, Any]:
    """Read a file with a JSON object that names its format.

    Args:
        path: The file.
        expected_format: The value that its key ``format`` must have, or several of them.
        made_by: The command that writes it, for the remedy.

    Raises:
        DataError: If the file is missing, is not a JSON object or names another format.
    """
    remedy = f"Make it with `{made_by}`"
    try:
        content = read_json(path)
    except DataError as error:
        raise DataError(error.where, error.what, remedy) from error
    found = content.get("format") if isinstance(content, dict) else None
    formats = (expected_format,) if isinstance(expected_format, str) else expected_format
    if found not in formats:
        shown = f"{found!r}"[:99]
        expected = " or ".join(repr(name) for name in formats)
        raise DataError(str(path), f"`format` is {shown}, not {expected}", remedy)
    return content
