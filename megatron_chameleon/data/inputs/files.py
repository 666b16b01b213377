"""Finds the input files and puts them in order.

An input is a local path, a folder (``folders.py``), a glob, or a URL of any file system that fsspec
knows (``s3://``, ``gs://``, ``hf://``, ...; some need a package of their own). The files of a glob
are sorted by name. The suffix says what kind of file it is: ``FILE_KINDS``.
"""

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from megatron_chameleon.data.inputs.folders import choose_files, files_of_folder
from megatron_chameleon.errors import DataError


@dataclass(frozen=True)
class FileKind:
    """A kind of file of documents; the table of docs/data.md is made from these."""

    name: str
    """As in ``InputFile.kind``."""
    suffixes: tuple[str, ...]
    document: str
    """What a document is in it, for people."""
    may_be_compressed: bool = True


FILE_KINDS = (
    FileKind("lines", ("jsonl", "ndjson"), "a line"),
    FileKind("json", ("json",), "a line, or an element of the array"),
    FileKind("table", ("csv", "tsv"), "a row; the first row names the columns"),
    FileKind("parquet", ("parquet",), "a row", may_be_compressed=False),
    FileKind(
        "arrow",
        ("arrow", "feather"),
        "a row, in Arrow's stream format (as `datasets` writes it) or file format",
        may_be_compressed=False,
    ),
    FileKind(
        "tar",
        ("tar",),
        "a WebDataset sample: its images and the caption in `.txt`, or a `.json`",
    ),
)


def kind_table() -> str:
    """The table of docs/data.md in Markdown: one row per kind of file."""
    lines = ["| suffix | a document is |", "|---|---|"]
    for kind in FILE_KINDS:
        suffixes = ", ".join(f"`.{suffix}`" for suffix in kind.suffixes)
        more = ", also with `.gz` or `.zst`" if kind.may_be_compressed else ""
        lines.append(f"| {suffixes}{more} | {kind.document} |")
    return "\n".join(lines) + "\n"


_KINDS = {suffix: kind for kind in FILE_KINDS for suffix in kind.suffixes}
COMPRESSIONS = {"gz": "gzip", "zst": "zstd", "zstd": "zstd"}
SUFFIXES = (
    ".jsonl, .json, .ndjson, .csv, .tsv or .tar (each also with .gz or .zst), .parquet or .arrow"
)


@dataclass(frozen=True)
class InputFile:
    """One file of documents."""

    path: str
    """As the user gave it, or as the glob found it."""
    kind: str
    """The name of one of ``FILE_KINDS``; a json file may be lines, too."""
    compression: str | None
    """gzip, zstd or None."""
    size_bytes: int
    """Size on disk, before decompression."""
    signature: str
    """Changes when the file changes, as far as the file system can tell: its size and time, or an
    etag."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @property
    def name(self) -> str:
        """The file's name without its folders."""
        return self.path.rsplit("/", 1)[-1]

    def open(self) -> IO[bytes]:
        """Open the file for reading its bytes, still compressed; the result is seekable.

        Raises:
            DataError: If it cannot be opened.
        """
        try:
            if not self.is_remote:
                return Path(self.path).open("rb")
            file: IO[bytes] = fsspec.open(self.path, "rb").open()
            return file
        except Exception as error:  # each file system raises its own
            raise _cannot_open(self.path, error) from error


@dataclass(frozen=True)
class InputRange:
    """The part of one input to read: the records that start in [start, stop)."""

    input: int
    """Index in the list of inputs."""
    start: int = 0
    """Bytes of the file for uncompressed lines; rows for parquet and Arrow; 0 for other kinds."""
    stop: int | None = None
    """None: up to the end."""
    size_bytes: int = 0
    """Bytes of the file on disk that belong to this part; for the progress line."""


def find_inputs(words: Sequence[str | Path]) -> list[InputFile]:
    """Find the files that paths, globs and URLs name, in order.

    Raises:
        DataError: If a file is missing or has an unknown suffix, a glob matches nothing, or a
            folder does not tell what to read.
    """
    found: list[InputFile] = []
    for word in map(str, words):
        if "://" in word:
            found += _remote(word)
        elif Path(word).is_dir():
            found += map(_local, files_of_folder(word, _kind_of_name))
        elif Path(word).exists() or not glob.has_magic(word):
            found.append(_local(word))
        else:
            found_paths = glob.glob(word, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
            paths = [path for path in sorted(found_paths) if not Path(path).is_dir()]
            if not paths:
                raise DataError(word, "matches no file", "Check the pattern")
            found += map(_local, paths)
    return found


def has_documents(path: str) -> bool:
    """Whether the suffix of a path is that of a file of documents."""
    try:
        _kind(path)
    except DataError:
        return False
    return True


def _local(path: str) -> InputFile:
    if not Path(path).is_file():
        raise DataError(path, "no such file", f"Pass a file of documents: {SUFFIXES}")
    kind, compression = _kind(path)
    status = Path(path).stat()
    return InputFile(
        path, kind, compression, status.st_size, f"{status.st_size} {status.st_mtime_ns}"
    )


def _remote(url: str) -> list[InputFile]:
    is_folder = False
    try:
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            paths = sorted(system.glob(path))
        elif system.isfile(path):
            paths = [path]
        else:
            paths = sorted(system.ls(path, detail=False)) if system.isdir(path) else []
            is_folder = bool(paths)
        details = [system.info(found) for found in paths]
    except Exception as error:  # each file system raises its own
        raise _cannot_open(url, error) from error
    details = [detail for detail in details if detail.get("type") != "directory"]
    if not details and not is_folder:
        raise DataError(url, "no such file", f"Pass a file of documents: {SUFFIXES}")
    if is_folder:
        details = _documents_of_folder(url, details)
    is_named = not is_folder and not glob.has_magic(url)
    return [_remote_input(system, url if is_named else None, detail) for detail in details]


def _documents_of_folder(url: str, details: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The files of documents that lie directly in a remote folder, chosen as in a local one.

    Raises:
        DataError: There are none, they do not tell what to read, or only ``datasets`` reads them.
    """
    names = {detail["name"].rsplit("/", 1)[-1]: detail for detail in details}
    if {"dataset_info.json", "dataset_dict.json", "state.json"} & names.keys():
        what = "is a folder of `datasets`, which is read from a local disk alone"
        raise DataError(url, what, "Copy it here, and give the copy")
    found = [Path(name) for name in sorted(names) if has_documents(name)]
    if not found:
        what = f"is a folder without files of documents (it has {len(names)} others)"
        raise DataError(url, what, f"Pass files of documents: {SUFFIXES}")
    return [names[str(path)] for path in choose_files(url, Path(), found, _kind_of_name)]


def _remote_input(system: Any, url: str | None, detail: dict[str, Any]) -> InputFile:
    path = system.unstrip_protocol(detail["name"]) if url is None else url
    kind, compression = _kind(path)
    size = int(detail.get("size") or 0)
    known = [detail.get(key) for key in ("etag", "ETag", "mtime", "LastModified", "created")]
    mark = next((str(value) for value in known if value), "")
    return InputFile(path, kind, compression, size, f"{size} {mark}")


def _kind(path: str) -> tuple[str, str | None]:
    words = path.rsplit("/", 1)[-1].lower().split(".")
    compression = COMPRESSIONS.get(words[-1])
    if words[-1] == "tgz":
        words, compression = [*words[:-1], "tar"], "gzip"
    elif compression:
        words = words[:-1]
    kind = _KINDS.get(words[-1]) if len(words) > 1 else None
    if kind is None or (compression and not kind.may_be_compressed):
        raise DataError(path, "unknown kind of file", f"Pass a {SUFFIXES} file")
    return kind.name, compression


def _kind_of_name(name: str) -> str | None:
    return _kind(name)[0] if has_documents(name) else None


def _cannot_open(path: str, error: Exception) -> DataError:
    cause = " ".join(str(error).split()) or type(error).__name__
    remedy = "Check the path and its permissions"
    if isinstance(error, ImportError | ValueError) and "://" in path:
        remedy = "Install the package that fsspec needs for this kind of URL"
    return DataError(path, f"cannot be opened ({cause})", remedy)


def signature_of(inputs: Sequence[InputFile]) -> str:
    """A digest of the names and signatures of all inputs."""
    digest = hashlib.sha256()
    for item in inputs:
        digest.update(f"{item.path}\0{item.signature}\n".encode())
    return digest.hexdigest()
