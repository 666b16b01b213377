"""Reads and writes the small files of a tokenizer folder; a file is never left half-written."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import ConfigError, DataError

IMAGE_CONFIG_FILE = "image.json"
IMAGE_WEIGHTS_FILE = "image.safetensors"


def make_folder(path: str | Path) -> Path:
    """Create a folder if it is missing. Call this before the work starts, not after hours of it.

    Raises:
        ConfigError: If it cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {path}", f"cannot be created ({error.strerror})", "Use another folder"
        ) from None
    return folder


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file completely or not at all: under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Like ``write_bytes``, for text, which is written as UTF-8."""
    write_bytes(path, content.encode("utf-8"))


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(str(path), "no such file", remedy) from None
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", remedy) from None
    except ValueError as error:
        problem = str(error).splitlines()[0]
        raise DataError(str(path), f"is not valid JSON ({problem})", remedy) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != expected_format:
        raise DataError(str(path), f"`format` is {found!r}, not {expected_format!r}", remedy)
    return content
