"""Looks at a user's files within a bounded time, through the readers of ``preprocess``.

    looked = look(["photos/", "stories.jsonl"], Looking())
    looked.sources[0].documents      # an estimate, or the exact number

Of large inputs, the beginnings of some files are read. What was read is said.
"""

import glob
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_chameleon.data.documents.parse import parse_block
from megatron_chameleon.data.documents.records import Origin, document_of
from megatron_chameleon.data.documents.schema import Document
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import InputFile, InputRange, find_inputs
from megatron_chameleon.data.inputs.records import BROKEN_DOCUMENT, Fault
from megatron_chameleon.data.loose.records import NAMES, PICTURES, TEXTS, records_of
from megatron_chameleon.data.loose.walk import Found, LooseFile, find_loose
from megatron_chameleon.errors import ChameleonError, DataError
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.starter.looking.clipped import ClippedInput
from megatron_chameleon.starter.looking.tally import MOST_PICTURES, Tally
from megatron_chameleon.wording import at_even_distances

MOST_FILES = 40
"""Files of documents of one source that are opened."""
MOST_BYTES = 192 << 20
"""Bytes of documents that are read of one source."""
MOST_DOCUMENTS = 100_000
MOST_SOURCES = 8
"""Paths with documents that get a token file each; with more of them, all share one."""
_FEWEST_BYTES = 4 << 20


@dataclass(frozen=True)
class Looking:
    """How to look."""

    seconds: float = 25.0
    """About how long it may take, apart from listing the files."""
    captions: str = NAMES
    images: ImageOptions = field(default_factory=ImageOptions)
    excluded: tuple[str, ...] = ()
    """Folders that are passed over, such as the one that is written."""


@dataclass
class Source:
    """One token file to come."""

    name: str
    words: list[str]
    """Inputs of ``preprocess``; empty for loose files, whose documents are yet to be written."""
    tally: Tally
    files: int = 0
    size_bytes: int = 0
    looked_files: int = 0
    looked_bytes: int = 0
    is_complete: bool = True
    """Whether every document was read and every picture opened."""
    scale: float = 1.0
    """What was read times this is all of it."""

    @property
    def is_loose(self) -> bool:
        return not self.words

    @property
    def documents(self) -> int:
        """Documents of the source, an estimate unless ``scale`` is 1."""
        return round(self.tally.documents * self.scale)

    @property
    def pictures(self) -> int:
        return round(self.tally.pictures * self.scale)

    @property
    def characters(self) -> int:
        return round(self.tally.characters * self.scale)


@dataclass
class Looked:
    """What was found."""

    found: Found
    sources: list[Source]
    unusable: list[str]
    """Sentences about files that hold no document that can be read."""
    seconds: float = 0.0


def look(words: Sequence[str], looking: Looking) -> Looked:
    """Look at files, folders, globs and URLs.

    Raises:
        DataError: A path does not exist, or nothing can be trained on.
    """
    started = time.monotonic()
    found = find_loose(words, looking.excluded)
    groups = _groups(words, found)
    parts = len(groups) + bool(found.pictures) + bool(found.texts)
    share = looking.seconds / max(parts, 1)
    sources, unusable = [], []
    for name, inputs in groups:
        source, faults = _look_at_inputs(name, inputs, looking, time.monotonic() + share)
        unusable += faults
        if source is not None:
            sources.append(source)
    folders = {place for source in sources for place in source.tally.folders}
    named = sum(round(len(source.tally.named) * source.scale) for source in sources)
    _leave_out_named(found, folders, named)
    for name, files in ((PICTURES, found.pictures), (TEXTS, found.texts)):
        if files:
            sources.append(_look_at_loose(name, files, found, looking, time.monotonic() + share))
    sources = [source for source in sources if source.tally.documents]
    if not sources:
        raise _nothing_found(words, found, unusable)
    _name_apart(sources)
    return Looked(found, sources, unusable, time.monotonic() - started)


def _groups(words: Sequence[str], found: Found) -> list[tuple[str, list[str]]]:
    """The inputs of each path that the user gave, with a name; all in one if there are many."""
    if not found.inputs:
        return []
    inputs = list(dict.fromkeys(found.inputs))
    groups: dict[str, list[str]] = {}
    places = [(word, Path(word).resolve()) for word in words if "://" not in word]
    for item in inputs:
        owner = next(
            (w for w, place in places if "://" not in item and Path(item).is_relative_to(place)),
            item,
        )
        groups.setdefault(owner, []).append(item)
    if len(groups) > MOST_SOURCES:
        return [("documents", inputs)]
    return [(_name(owner), items) for owner, items in groups.items()]


def _name(word: str) -> str:
    last = word.rstrip("/").rsplit("/", 1)[-1] or "documents"
    stem = Path(word).resolve().name if last in (".", "..") else last
    stem = stem if Path(word).is_dir() else stem.split(".")[0]
    return re.sub(r"[^\w-]+", "_", stem, flags=re.ASCII).strip("_")[:40] or "documents"


def _name_apart(sources: list[Source]) -> None:
    taken: set[str] = set()
    for source in sources:
        name, number = source.name, 2
        if name.endswith("-holdout"):
            name = f"{name}_"
        while name.lower() in taken:
            name, number = f"{source.name}_{number}", number + 1
        source.name = name
        taken.add(name.lower())


def _look_at_inputs(
    name: str, words: list[str], looking: Looking, deadline: float
) -> tuple[Source | None, list[str]]:
    """Read documents of a source; files that give none are taken out of it."""
    items: list[tuple[str, InputFile]] = []
    faults: list[str] = []
    for word in words:
        try:
            items += [(word, item) for item in find_inputs([word])]
        except DataError as error:
            faults.append(f"{error.where}: {error.what}")
    chosen = at_even_distances(items, MOST_FILES)
    source = Source(name, [], Tally(), files=len(items))
    source.size_bytes = sum(item.size_bytes for _, item in items)
    budget = max(MOST_BYTES // max(len(chosen), 1), _FEWEST_BYTES)
    bad: set[str] = set()
    good: set[str] = set()
    reasons: dict[str, str] = {}
    all_read = len(chosen) == len(items)
    for index, (word, item) in enumerate(chosen):
        before = source.tally.documents
        left = max(deadline - time.monotonic(), 0.0)
        until = time.monotonic() + left / (len(chosen) - index)
        try:
            all_read &= _read(item, source, looking, min(budget, item.size_bytes + 1), until)
        except ChameleonError as error:
            faults.append(f"{error.where}: {error.what}")
        (good if source.tally.documents > before else bad).add(word)
        reasons[word] = source.tally.last_fault
    used = list(dict.fromkeys(word for word, _ in items))
    empty = bad - good
    for word in used:
        if word in empty:
            why = reasons.get(word, "").removeprefix(word).lstrip(":")
            faults.append(f"{word}: no document in it{f' ({why[:200]})' if why else ''}")
    source.words = shorten([word for word in used if word not in empty])
    source.looked_files = len(chosen)
    source.is_complete = all_read and source.tally.all_opened
    if not all_read and source.looked_bytes:
        source.scale = max(source.size_bytes / source.looked_bytes, 1.0)
    return (source if source.words and source.tally.documents else None), faults


def _read(item: InputFile, source: Source, looking: Looking, most: int, until: float) -> bool:
    """Read a part of a file; returns whether that is all of it."""
    size = item.size_bytes
    starts = [0]
    if item.kind == "lines" and item.compression is None and size > 4 * most:
        starts = [0, size // 2, size - size // 10]  # a sorted file differs from its beginning
    is_random = item.kind in ("parquet", "arrow")
    complete = len(starts) == 1
    for number, start in enumerate(starts, start=1):
        part = most // len(starts)
        now = time.monotonic()
        stop = now + (until - now) / (len(starts) - number + 1)
        clipped = ClippedInput.of(item, start, part)
        reading: InputFile = item if is_random else clipped
        ended, read_bytes, pending = True, start, None
        for block in read_blocks([reading], [InputRange(0, start, None, size)]):
            if pending is not None:
                source.tally.add(pending, may_open=True)
            pending = None
            for document in parse_block(block, images=looking.images):
                if pending is not None:
                    source.tally.add(pending, time.monotonic() < stop)
                pending = document  # one behind: the last may be cut
            read_bytes = max(read_bytes, start + block.after.read_bytes)
            enough = read_bytes - start >= part and not clipped.clip.was_hit
            if enough or time.monotonic() > stop or source.tally.documents >= MOST_DOCUMENTS:
                ended = block.after.range_index > 0
                break
        was_cut = clipped.clip.was_hit and not is_random
        if pending is not None and not (was_cut and isinstance(pending, Fault)):
            source.tally.add(pending, time.monotonic() < stop)
        taken = part if was_cut else read_bytes - start
        source.looked_bytes += min(taken, size - start) if size else 0
        complete &= ended and not was_cut
    return complete


def _look_at_loose(
    name: str, files: Sequence[LooseFile], found: Found, looking: Looking, deadline: float
) -> Source:
    chosen = at_even_distances(files, MOST_PICTURES if name == PICTURES else MOST_DOCUMENTS // 10)
    source = Source(name, [], Tally(), files=len(files))
    roots = (*found.roots, *looking.images.roots)
    images = ImageOptions(roots, looking.images.protocols, looking.images.profiles)
    for file in chosen:
        if time.monotonic() > deadline and source.looked_files >= 50:
            break
        source.looked_files += 1
        size = _size(file.path)
        source.size_bytes += size
        for item in _documents_of(file, looking.captions, images):
            source.tally.add(item, may_open=True)
            if source.tally.characters > 4 * MOST_BYTES:
                source.is_complete = False
                break
    source.looked_bytes = source.size_bytes
    source.scale = len(files) / max(source.looked_files, 1)
    source.size_bytes = round(source.size_bytes * source.scale)
    source.is_complete &= source.looked_files == len(files)
    return source


def _documents_of(
    file: LooseFile, captions: str, images: ImageOptions
) -> Iterator[Document | Fault]:
    try:
        for record in records_of(file, captions):
            yield document_of(record, Origin(str(file.path), 1, images=images))
    except DataError as error:
        yield Fault(error, BROKEN_DOCUMENT, str(file.name))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _leave_out_named(found: Found, folders: Collection[Path], named: int) -> None:
    """Pictures in a folder from which documents take theirs belong to the documents.

    Args:
        found: The loose files.
        folders: From which documents take their pictures.
        named: How many picture files the documents name.
    """
    count = found.leave_out_pictures(folders)
    if count > named:
        what = f"{count:,} pictures in folders from which documents take theirs"
        found.left_out.append(f"{what}: only those that a document names are read")


def shorten(words: list[str]) -> list[str]:
    """Many files of one folder as a glob, where it matches these and no others."""
    groups: dict[tuple[str, str], list[str]] = {}
    for word in words:
        place, _, name = word.rpartition("/")
        groups.setdefault((place, name.partition(".")[2]), []).append(word)
    found: list[str] = []
    for (place, suffix), members in groups.items():
        pattern = f"{glob.escape(place)}/*.{glob.escape(suffix)}"
        is_glob = len(members) > 8 and sorted(glob.glob(pattern)) == sorted(members)  # noqa: PTH207
        found += [pattern] if is_glob else members
    return found


def _nothing_found(words: Sequence[str], found: Found, unusable: Sequence[str]) -> DataError:
    where = " ".join(words)[:300]
    if unusable:
        more = f" ({len(unusable)} such inputs)" if len(unusable) > 1 else ""
        what = f"no document can be read: {unusable[0]}{more}"
        return DataError(where, what[:600], "`chameleon inspect FILE` shows how a file is read")
    if not found.files:
        return DataError(
            where, "is an empty folder", "Give files or folders with pictures or texts"
        )
    others = ", ".join(f"{count:,} {suffix}" for suffix, count in found.others.most_common(5))
    what = f"none of its {found.files:,} files can be trained on"
    remedy = "Give pictures, .txt or .md files, or files of documents (docs/data.md)"
    return DataError(where, f"{what} ({others})" if others else what, remedy)
