"""Names of the files of a tokenizer folder that name their format, and how those are read."""

from pathlib import Path
from typing import Any

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import read_json

IMAGE_CONFIG_FILE = "image.json"
IMAGE_WEIGHTS_FILE = "image.safetensors"


def read_checked_json(path: Path, expected_format: str, made_by: str) -> dict[str, Any]:
    """Read a file with a JSON object that names its format.

    Args:
        path: The file.
        expected_format: The value that its key ``format`` must have.
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
    if found != expected_format:
        shown = f"{found!r}"[:99]
        raise DataError(str(path), f"`format` is {shown}, not {expected_format!r}", remedy)
    return content
