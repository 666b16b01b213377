"""Finds what lies below the paths that a user names: files of documents, pictures, texts, the rest.

A folder that holds one data set (``data/inputs/folders.py``) stays one input. Pictures that a
``metadata`` file describes are its own, and no loose ones.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_chameleon.data.documents.media import (
    IMAGE,
    medium_of_bytes,
    medium_of_suffix,
)
from megatron_chameleon.data.inputs.files import has_documents
from megatron_chameleon.data.inputs.folders import METADATA, beside_documents, is_saved, split_of
from megatron_chameleon.errors import DataError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex")
CAPTION_SUFFIXES = (".txt", ".caption", ".text")
"""Of a text beside a picture of the same name, as trainers of image models write it."""
MOST_FILES = 2_000_000
_NOT_READ = ("svg", "heic", "heif", "jxl", "exr", "hdr", "apng")
"""Suffixes of pictures that Pillow does not read by itself, or that are no pixels."""


@dataclass(frozen=True)
class LooseFile:
    """A picture or a text that no file of documents names."""

    path: Path
    name: Path
    """From the folder on that the user named; of a file that was named, its name."""
    caption: Path | None = None
    """The text beside a picture."""


@dataclass
class Found:
    """What lies below the paths that a user names."""

    inputs: list[str] = field(default_factory=list)
    """Files of documents, folders of one data set, globs and URLs: as ``preprocess`` takes them."""
    pictures: list[LooseFile] = field(default_factory=list)
    texts: list[LooseFile] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    """Folders below which the loose pictures lie."""
    others: Counter[str] = field(default_factory=Counter)
    """Files that are read by nobody, by suffix."""
    left_out: list[str] = field(default_factory=list)
    """Sentences about files that were passed over on purpose."""
    unreadable: list[str] = field(default_factory=list)
    """Folders that could not be listed."""
    files: int = 0
    is_cut: bool = False
    """Whether there are more than ``MOST_FILES`` files."""

    def leave_out_pictures(self, folders: Collection[str | Path]) -> int:
        """Take out the pictures that lie right in these folders; returns how many."""
        places = {Path(folder).resolve() for folder in folders}
        if not places:
            return 0
        before = len(self.pictures)
        self.pictures = [p for p in self.pictures if p.path.parent.resolve() not in places]
        return before - len(self.pictures)


def find_loose(
    words: Sequence[str],
    excluded: Collection[str | Path] = (),
    claimed: Collection[str | Path] = (),
) -> Found:
    """Walk through paths.

    Args:
        words: Files, folders, globs and URLs.
        excluded: Folders and files that are passed over.
        claimed: Folders from which documents take their pictures: those right in them are not
            loose.

    Raises:
        DataError: A path does not exist.
    """
    found = Found()
    outside = frozenset(str(Path(path).resolve()) for path in excluded)
    for word in dict.fromkeys(words):
        path = Path(word)
        try:
            is_folder, exists = path.is_dir(), path.exists()
        except (OSError, ValueError) as error:
            what = f"cannot be looked up ({getattr(error, 'strerror', None) or error})"
            raise DataError(word[:200], what, "Check the path") from error
        if "://" in word:
            found.inputs.append(word)
        elif is_folder:
            _add_folder(found, path, outside)
        elif exists:
            _add_file(found, path.absolute(), Path(path.name), outside)
        else:
            _add_glob(found, word, outside)
    _pair_captions(found)
    found.leave_out_pictures(claimed)
    return found


def _add_glob(found: Found, word: str, outside: frozenset[str]) -> None:
    import glob

    if not glob.has_magic(word):
        raise DataError(word, "no such file or folder", "Check the path")
    paths = sorted(map(Path, glob.glob(word, recursive=True)))  # noqa: PTH207  # absolute patterns
    if not paths:
        raise DataError(word, "matches no file", "Check the pattern")
    for path in paths:
        if path.is_dir():
            continue
        _add_file(found, path.absolute(), Path(path.name), outside)


def _add_folder(found: Found, folder: Path, outside: frozenset[str]) -> None:
    top = folder.resolve()
    if is_saved(top):
        found.inputs.append(str(top))
        return
    documents: list[tuple[Path, Path]] = []
    for path in _files_below(found, top, outside):
        if found.files >= MOST_FILES:
            found.is_cut = True
            break
        _sort_in(found, path, path.relative_to(top), documents)
    if any(entry.path.is_relative_to(top) for entry in found.pictures):
        found.roots.append(str(top))
    _leave_out_splits(found, top, documents)


def _files_below(found: Found, top: Path, outside: frozenset[str]) -> Iterator[Path]:
    """The files below a folder in a fixed order; data sets within become inputs as they are."""

    def note(error: OSError) -> None:
        found.unreadable.append(f"{error.filename} ({error.strerror})")

    for place, folders, names in os.walk(top, onerror=note):
        here = Path(place)
        if str(here) in outside:
            folders.clear()
            continue
        if here != top and is_saved(here):
            found.inputs.append(place)
            folders.clear()
            continue
        hidden = (".", "__MACOSX")
        folders[:] = sorted(name for name in folders if not name.startswith(hidden))
        pictures = any(medium_of_suffix(name) == IMAGE for name in names)
        if set(names) & set(METADATA) and (pictures or folders):
            found.inputs.append(place)
            folders.clear()
            continue
        for name in sorted(names):
            if not name.startswith(hidden) and str(here / name) not in outside:
                yield here / name


def _add_file(found: Found, path: Path, name: Path, outside: frozenset[str]) -> None:
    if str(path.resolve()) in outside:
        return
    documents: list[tuple[Path, Path]] = []
    before = len(found.pictures)
    _sort_in(found, path, name, documents)
    found.inputs += [str(path) for path, _ in documents]
    if len(found.pictures) > before and str(path.parent) not in found.roots:
        found.roots.append(str(path.parent))


def _sort_in(found: Found, path: Path, name: Path, documents: list[tuple[Path, Path]]) -> None:
    found.files += 1
    suffix = path.suffix.lower()
    try:
        if not path.is_file():  # a pipe, a device, a link to nothing
            found.others["(no regular file)"] += 1
            return
        str(path).encode()
    except (OSError, UnicodeEncodeError):
        found.others["(name that is not UTF-8)"] += 1
        return
    if has_documents(path.name):
        if not beside_documents(path.name):
            documents.append((path, name))
    elif medium_of_suffix(path.name) == IMAGE and suffix[1:] not in _NOT_READ:
        found.pictures.append(LooseFile(path, name))
    elif suffix in (*TEXT_SUFFIXES, *CAPTION_SUFFIXES):
        found.texts.append(LooseFile(path, name))
    elif not suffix and _is_picture(path):
        found.pictures.append(LooseFile(path, name))
    else:
        found.others[suffix or "(no suffix)"] += 1


def _is_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return medium_of_bytes(file.read(64)) == IMAGE
    except OSError:
        return False


def _leave_out_splits(found: Found, top: Path, documents: list[tuple[Path, Path]]) -> None:
    """Of files for training and for testing, keep those for training."""
    splits = {split_of(name) for _, name in documents}
    others = {"test", "validation"} & splits
    if others and "train" in splits:
        kept = [(path, name) for path, name in documents if split_of(name) not in others]
        count = len(documents) - len(kept)
        what = f"{count} files of documents of {top} for {' and '.join(sorted(others))}"
        found.left_out.append(f"{what}, so that they can test the model")
        documents = kept
    stems = {path.with_suffix("") for path, _ in documents if path.suffix == ".tar"}
    found.inputs += [  # img2dataset lists the samples of each tar in a parquet file
        str(path)
        for path, _ in documents
        if path.suffix != ".parquet" or path.with_suffix("") not in stems
    ]
    folders = {split_of(entry.name.parent) for entry in found.pictures if entry.name.parent.parts}
    if "train" in folders and folders & {"test", "validation"}:
        below = [p for p in found.pictures if p.path.is_relative_to(top)]
        tested = [p for p in below if split_of(p.name.parent) in ("test", "validation")]
        gone = {p.path for p in tested}
        found.pictures = [p for p in found.pictures if p.path not in gone]
        what = f"{len(tested)} pictures in folders of {top} for test or validation"
        found.left_out.append(f"{what}, so that they can test the model")


def _pair_captions(found: Found) -> None:
    """Give each picture the text that lies beside it under its name."""
    unique = {entry.path: entry for entry in found.texts}
    texts: dict[Path, LooseFile] = {}
    for entry in unique.values():
        if entry.path.suffix.lower() in CAPTION_SUFFIXES:
            texts.setdefault(entry.path.with_suffix(""), entry)
    pictures, used = [], set()
    for picture in {entry.path: entry for entry in found.pictures}.values():
        beside = texts.get(picture.path.with_suffix(""))
        if beside is not None:
            used.add(beside.path)
            picture = LooseFile(picture.path, picture.name, beside.path)
        pictures.append(picture)
    found.pictures = pictures
    found.texts = [
        entry
        for path, entry in unique.items()
        if path not in used and path.suffix.lower() in TEXT_SUFFIXES
    ]
    for path in unique.keys() - used:
        if path.suffix.lower() not in TEXT_SUFFIXES:
            found.others[path.suffix.lower()] += 1
