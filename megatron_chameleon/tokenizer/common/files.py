"""Reads and writes the small files of a tokenizer folder; a half-written file is never met."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import ConfigError, DataError

IMAGE_CONFIG_FILE = "image.json"
IMAGE_WEIGHTS_FILE = "image.safetensors"


def make_folder(path: str | Path) -> Path:
    """The folder, made where it is missing: before the work starts, not after hours of it.

    Raises:
        ConfigError: If it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {path}", f"cannot be made ({error.strerror})", "Give another folder"
        ) from None
    return folder


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a name beside it first, then put in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """As ``write_bytes``, for UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


def read_json(path: Path, expected_format: str, made_by: str) -> dict[str, Any]:
    """Read a JSON object that names its format.

    Args:
        path: The file.
        expected_format: What its ``format`` must say.
        made_by: The command that writes it, for the remedy.

    Raises:
        DataError: If the file is missing, is no JSON object or names another format.
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
        raise DataError(str(path), f"is no JSON ({problem})", remedy) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != expected_format:
        raise DataError(str(path), f"`format` is {found!r}, not {expected_format!r}", remedy)
    return content
