"""Reads the input files of evaluations: JSON, JSON Lines, Parquet, CSV and YAML."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_chameleon.errors import DataError, first_line


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, as dictionaries.

    The suffix tells the format: ``.json`` (a list), ``.csv`` or ``.parquet``. Any other file is
    read as JSON Lines.

    Raises:
        DataError: The file cannot be read, has no records, or a record is not an object.
    """
    path = Path(path)
    try:
        records = _READERS.get(path.suffix.lower(), _json_lines)(path)
    except OSError as error:
        what = f"cannot be read ({error.strerror or first_line(error)})"
        raise DataError(str(path), what, "Pass a file that exists and can be read") from error
    except UnicodeDecodeError as error:
        raise DataError(str(path), "is not UTF-8 text", "Save it as UTF-8") from error
    if not records:
        raise DataError(str(path), "has no records", "Pass a file with at least one record")
    return records


def read_json(path: str | Path) -> Any:
    """The content of a JSON or YAML file.

    Raises:
        DataError: The file cannot be read or is not valid.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        return yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        what = f"cannot be read ({error.strerror or first_line(error)})"
        raise DataError(str(path), what, "Pass a file that exists and can be read") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
        raise DataError(
            str(path), f"is not valid {kind} ({first_line(error)})", "Fix the file"
        ) from error


def require_keys(record: dict[str, Any], keys: Sequence[str], where: str) -> None:
    """Check that a record has the keys it needs.

    Raises:
        DataError: Keys are missing. The message names them and the keys that the record has.
    """
    if missing := [key for key in keys if record.get(key) is None]:
        what = (
            f"lacks {', '.join(missing)} (it has {', '.join(map(str, record))[:200] or 'nothing'})"
        )
        raise DataError(where, what, f"Give each record the keys {', '.join(keys)}")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                what = f"not valid JSON ({first_line(error)})"
                raise DataError(f"{path}:{number}", what, "Fix or remove the line") from error
            records.append(_object(record, f"{path}:{number}"))
    return records


def _json_list(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list):
        what = f"contains a {type(content).__name__}, not a list of objects"
        raise DataError(str(path), what, "Use a list of objects, or JSON Lines (.jsonl)")
    return [_object(record, f"{path}[{index}]") for index, record in enumerate(content)]


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        what = f"is not a valid Parquet file ({first_line(error)})"
        raise DataError(str(path), what, "Pass a complete Parquet file") from error
    return rows


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        what = f"the record is a {type(record).__name__}, not an object"
        raise DataError(where, what, "Use one JSON object per record")
    return record


_READERS = {".json": _json_list, ".csv": _csv, ".parquet": _parquet}
