"""Finds the files of documents in a folder that holds one data set.

- ``save_to_disk`` of ``datasets``: the files that ``state.json`` lists, in its order; also a
  ``DatasetDict`` of one split
- the cache of ``load_dataset``, a data set as it lies on a hub, or a folder of shards: all files
  of one kind, sorted by their paths
- an ``imagefolder``: its files ``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet``
- the output of img2dataset: its tars, or its parquet files

Where a folder does not tell what to read, such as with a split for training and one for testing,
nothing is read.
"""

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import open_to_read

_LARGEST_LIST = 64 << 20
"""Bytes of a ``state.json``."""
_PICTURES = re.compile(r".*\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif)", re.IGNORECASE)
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"
"""Of ``save_to_disk``: of several splits, and of one."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_NO_DOCUMENTS = re.compile(
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|config\.json|cache-.*\.arrow"
    r"|indices\.arrow|tmp.*|.*\.lock|.*_stats\.json|package\.json"
)
"""Files beside documents: of ``datasets`` and of img2dataset."""
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def files_of_folder(folder: str, kind_of: Callable[[str], str | None]) -> list[str]:
    """The files of documents of a folder, in order.

    Args:
        folder: A local folder.
        kind_of: The kind of a file of documents by its name; None for other files.

    Raises:
        DataError: The folder has no documents, or does not tell which of several to read.
    """
    path = Path(folder)
    if (path / SPLITS_FILE).is_file():
        splits = _read_json(path / SPLITS_FILE).get("splits")
        names = [n for n in splits if isinstance(n, str)] if isinstance(splits, list) else []
        if len(names) != 1:
            raise _several(folder, "splits", names, [str(path / name) for name in names])
        folder, path = str(path / names[0]), path / names[0]
    if is_saved(path):
        return _saved_files(path)
    found, pictures = _walk(path)
    named = [file for file in found if kind_of(file.name) is not None]
    if metadata := [file for file in named if file.name in METADATA and pictures]:
        named = metadata
    elif pictures or not named:
        raise _no_documents(folder, pictures, len(named))
    return [str(file) for file in choose_files(folder, path, named, kind_of)]


def is_saved(folder: Path) -> bool:
    """Whether a folder is what ``save_to_disk`` of ``datasets`` writes, of one or several splits.

    Other programs write a ``state.json`` too, so it counts beside a file of ``datasets`` alone.
    """
    return (folder / SPLITS_FILE).is_file() or (
        (folder / STATE_FILE).is_file()
        and ((folder / "dataset_info.json").is_file() or any(folder.glob("*.arrow")))
    )


def choose_files(
    folder: str, path: Path, named: list[Path], kind_of: Callable[[str], str | None]
) -> list[Path]:
    """Those of a folder's files that are its documents.

    Args:
        folder: As the user named it.
        path: The folder.
        named: All files in it whose names are those of documents.
        kind_of: As for ``files_of_folder``.

    Raises:
        DataError: They are of several kinds, or of several splits.
    """
    kinds = {kind_of(file.name) or "" for file in named}
    if kinds == {"tar", "parquet"}:  # img2dataset lists the samples of each tar in a parquet file
        stems = {file.with_suffix("") for file in named if file.suffix == ".tar"}
        if all(f.with_suffix("") in stems for f in named if f.suffix == ".parquet"):
            named, kinds = [file for file in named if file.suffix == ".tar"], {"tar"}
    _check_one_data_set(folder.rstrip("/"), path, named, kinds)
    return named


def _saved_files(path: Path) -> list[str]:
    """The files of ``save_to_disk``."""
    listed = _read_json(path / STATE_FILE).get("_data_files")
    names = [d.get("filename") for d in listed if isinstance(d, dict)] if listed else []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (path / name).is_file():
            what = f"lists the file {str(name)[:100]!r}, which is not in its folder"
            raise DataError(str(path / STATE_FILE), what, "Copy the folder again")
    if not names:
        raise DataError(str(path / STATE_FILE), "lists no files", "Save the data set again")
    return [str(path / str(name)) for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    with open_to_read(str(path)) as file:
        content = file.read(_LARGEST_LIST)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        what = f"is not valid JSON ({error})"
        raise DataError(str(path), what, "Save the data set again") from error
    return found if isinstance(found, dict) else {}


def _walk(path: Path) -> tuple[list[Path], int]:
    """The files of a folder that may be documents, sorted, and the number of its pictures."""
    found, pictures = [], 0
    for file in sorted(path.rglob("*")):
        below = file.relative_to(path).parts
        if any(part.startswith((".", "__MACOSX")) for part in below) or not file.is_file():
            continue
        if _PICTURES.fullmatch(file.name):
            pictures += 1
        elif not beside_documents(file.name):
            found.append(file)
    return found, pictures


def _check_one_data_set(
    folder: str, path: Path, files: Collection[Path], kinds: Collection[str]
) -> None:
    if len(kinds) > 1:
        suffixes = sorted({file.suffix for file in files})
        raise _several(folder, "kinds of file", suffixes, [f"'{folder}/**/*{s}'" for s in suffixes])
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file.relative_to(path)), []).append(file)
    if len(by_split) > 1:
        names = [name or "without a name" for name in by_split]
        examples = [f"{folder}/{files[0].relative_to(path)}" for files in by_split.values()]
        raise _several(folder, "splits", names, examples)


def beside_documents(name: str) -> bool:
    """Whether a file of this name lies beside documents and holds none."""
    return _NO_DOCUMENTS.fullmatch(name) is not None


def split_of(path: Path) -> str:
    """The split that the name of a file or of its folders says; empty if they say none."""
    for part in reversed(path.parts):
        words = re.split(r"[-_. ]", part.lower())
        if found := next((_SPLITS[word] for word in words if word in _SPLITS), ""):
            return found
    return ""


def _several(folder: str, what: str, names: list[str], examples: list[str]) -> DataError:
    listed = ", ".join(names[:8]) or "none"
    remedy = f"Pass what you want to read, such as {examples[0]}" if examples else "Save it again"
    return DataError(folder, f"is a folder of {len(names)} {what}: {listed}", remedy)


def _no_documents(folder: str, pictures: int, documents: int) -> DataError:
    if pictures and documents:
        what = f"is a folder of {pictures} pictures and {documents} files of documents"
        remedy = "Pass the files of documents, or call the one that names the pictures metadata"
        return DataError(folder, what, f"{remedy}.jsonl")
    if pictures:
        what = f"is a folder of {pictures} pictures without a text"
        remedy = 'Write a metadata.jsonl with lines {"file_name": ..., "text": ...}'
        return DataError(folder, what, remedy)
    return DataError(folder, "is a folder without files of documents", "Pass files of documents")
