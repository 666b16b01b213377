"""Reads the files that evaluations take: JSON, JSON Lines, parquet, CSV and YAML, into objects."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_chameleon.errors import DataError, first_line


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file, by its suffix: ``.jsonl``, ``.json`` (a list), ``.csv``, ``.parquet``.

    Raises:
        DataError: It cannot be read, has no records, or one of them is no object.
    """
    path = Path(path)
    try:
        records = _READERS.get(path.suffix.lower(), _json_lines)(path)
    except OSError as error:
        what = f"cannot be read ({error.strerror or first_line(error)})"
        raise DataError(str(path), what, "Give a file that exists") from error
    except UnicodeDecodeError as error:
        raise DataError(str(path), "is no text in UTF-8", "Save it as UTF-8") from error
    if not records:
        raise DataError(str(path), "has no records", "Give a file with at least one")
    return records


def read_json(path: str | Path) -> Any:
    """A JSON or YAML file.

    Raises:
        DataError: It cannot be read, or it is broken.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        return yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        what = f"cannot be read ({error.strerror or first_line(error)})"
        raise DataError(str(path), what, "Give a file that exists") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
        raise DataError(str(path), f"is no {kind} ({first_line(error)})", "Mend it") from error


def require_keys(record: dict[str, Any], keys: Sequence[str], where: str) -> None:
    """Refuse a record that lacks keys.

    Raises:
        DataError: It names them, and those that are there.
    """
    if missing := [key for key in keys if record.get(key) is None]:
        what = (
            f"lacks {', '.join(missing)} (it has {', '.join(map(str, record))[:200] or 'nothing'})"
        )
        raise DataError(where, what, f"Write {', '.join(keys)} into each record")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                what = f"not a line of JSON ({first_line(error)})"
                raise DataError(f"{path}:{number}", what, "Mend or remove the line") from error
            records.append(_object(record, f"{path}:{number}"))
    return records


def _json_list(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list):
        what = f"holds a {type(content).__name__}, not a list of objects"
        raise DataError(str(path), what, "Write a list, or JSON Lines (.jsonl)")
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
        what = f"is no parquet file ({first_line(error)})"
        raise DataError(str(path), what, "Give a whole file") from error
    return rows


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(where, f"a {type(record).__name__}, not an object", "Write JSON objects")
    return record


_READERS = {".json": _json_list, ".csv": _csv, ".parquet": _parquet}
