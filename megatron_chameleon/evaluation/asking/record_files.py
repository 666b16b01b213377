"""Reads the input files of evaluations: JSON, JSON Lines, Parquet, CSV and YAML."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_chameleon.errors import DataError, first_line
from megatron_chameleon.files import cannot_read, open_to_read, read_bytes

LARGEST_FILE_BYTES = 4 << 30
"""Bytes of a file that is read as a whole; the largest one, VQAv2's annotations, has 0.4 GB."""


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, as dictionaries.

    The suffix tells the format: ``.json`` (a list), ``.csv`` or ``.parquet``. Any other file is
    read as JSON Lines.

    Raises:
        DataError: The file cannot be read, has no records, or a record is not an object.
    """
    path = Path(path)
    records = _READERS.get(path.suffix.lower(), _json_lines)(path)
    if not records:
        raise DataError(str(path), "has no records", "Pass a file with at least one record")
    return records


def read_json(path: str | Path) -> Any:
    """The content of a JSON or YAML file.

    Raises:
        DataError: The file cannot be read or is not valid.
    """
    path = Path(path)
    text = _text(path)
    try:
        return yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
        raise DataError(
            str(path), f"is not valid {kind} ({first_line(error)})", "Fix the file"
        ) from error


@contextmanager
def well_formed(where: str) -> Iterator[None]:
    """Turn what Python raises at a value of another kind than expected into an error of the file.

    Raises:
        DataError: A key is missing, or a value is of another kind.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        what = f"a value is missing or of another kind than expected ({first_line(error)[:100]})"
        raise DataError(where, what, "Write the file again, as docs/evaluation.md says") from error


def require_keys(record: dict[str, Any], keys: Sequence[str], where: str) -> None:
    """Check that a record has the keys it needs.

    Raises:
        DataError: Keys are missing. The message names them and the keys that the record has.
    """
    _object(record, where)
    if missing := [key for key in keys if record.get(key) is None]:
        what = (
            f"lacks {', '.join(missing)} (it has {', '.join(map(str, record))[:200] or 'nothing'})"
        )
        raise DataError(where, what, f"Give each record the keys {', '.join(keys)}")


def _text(path: Path) -> str:
    try:
        return read_bytes(path, limit=LARGEST_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text (byte {error.start})"
        raise DataError(str(path), what, "Save it as UTF-8") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    # not splitlines(), which also splits at U+2028 and the like inside of a JSON string
    for number, line in enumerate(_text(path).split("\n"), start=1):
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
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row:
                what = f"has more than {len(reader.fieldnames or ())} fields, the number of columns"
                raise DataError(f"{path}:{reader.line_num}", what, "Put quotes around the text")
            rows.append(dict(row))
    except csv.Error as error:
        where = f"{path}:{reader.line_num}"
        raise DataError(where, f"is not valid CSV ({first_line(error)})", "Fix the line") from error
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_to_read(path) as file:
            table = pyarrow.parquet.read_table(file, pre_buffer=False)
        rows: list[dict[str, Any]] = table.to_pylist()
    except OSError as error:
        raise cannot_read(path, error) from error
    except (pyarrow.ArrowException, ValueError) as error:
        what = f"is not a valid Parquet file ({first_line(error)})"
        raise DataError(str(path), what, "Pass a complete Parquet file") from error
    return rows


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        what = f"the record is a {type(record).__name__}, not an object"
        raise DataError(where, what, "Use one JSON object per record")
    return record


_READERS = {".json": _json_list, ".csv": _csv, ".parquet": _parquet}
