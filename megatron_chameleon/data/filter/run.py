"""The whole way: measure all documents, decide, and write those that are kept.

The result is the same for any number of workers. It is complete or absent: the files appear when
everything is written, and ``NAME.filter.json``, which says what was done, appears last.
"""

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chameleon.announce import announced
from megatron_chameleon.data.documents.parse import UnusedKeys
from megatron_chameleon.data.filter.judge import Verdict, judge
from megatron_chameleon.data.filter.lines import AUTO, ImagePlaces
from megatron_chameleon.data.filter.measures.measure import Measurer, ReadOptions, make_measurer
from megatron_chameleon.data.filter.measures.options import SCORE_KEYS, FilterOptions
from megatron_chameleon.data.filter.measures.table import Table, TableBuilder
from megatron_chameleon.data.filter.page import MOST_SAMPLES, filter_page
from megatron_chameleon.data.filter.write import (
    DROPPED,
    KEPT,
    SAMPLE,
    LineWriter,
    Sample,
    Written,
    beside,
    make_line_maker,
    output_files,
    remove_old_copies,
)
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import InputFile, find_inputs, signature_of
from megatron_chameleon.data.inputs.records import Block
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.data.workers.pool import Pool, ignore_image_warnings
from megatron_chameleon.errors import DataError
from megatron_chameleon.files import replace_file, write_text
from megatron_chameleon.outputs import check_output, check_output_folder
from megatron_chameleon.pages.page import Origin
from megatron_chameleon.terminal import escape_line
from megatron_chameleon.wording import at_even_distances, counted, format_duration

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How the command works, which does not change what is kept."""

    output: str | None = None
    """None: nothing is written."""
    shards: int = 1
    images: str = AUTO
    page: str | None = None
    origin: Origin | None = None
    """Of the page."""
    workers: int = 1
    read: ReadOptions = field(default_factory=ReadOptions)


@dataclass
class Result:
    """What was found and done."""

    documents: int
    """That can be read."""
    kept: int
    verdict: Verdict
    unreadable: dict[str, int]
    files: list[Path]
    copied_images: int

    def to_json(self) -> dict[str, Any]:
        """As the file beside the output has it."""
        return {
            "documents": self.documents + sum(self.unreadable.values()),
            "unreadable": self.unreadable,
            "filters": [asdict(one) for one in self.verdict.filters],
            "kept": self.kept,
            "files": [path.name for path in self.files],
            "copied_images": self.copied_images,
        }


def filter_documents(inputs: Sequence[str], options: FilterOptions, run: RunOptions) -> Result:
    """Filter documents.

    Args:
        inputs: Files, globs or URLs (``data/inputs/files.py``).
        options: The filters.
        run: Where the result goes.

    Raises:
        ConfigError: Options cannot work.
        DataError: An input cannot be read, an output not written, or no document is left.
    """
    options.check()
    with announced(f"looking at {counted(len(inputs), 'input')}"):
        files = find_inputs(inputs)
        against = find_inputs(options.against)
        places = _places(run, [*files, *against])
        measurer = Measurer(options, run.read)  # missing packages and wrong lists are said at once
    before = signature_of(files)
    known = None
    if against:
        known = _measure(against, options, run, measurer, "reading --against")
        logger.debug("%s against which documents are compared", counted(len(known), "document"))
    table = _measure(files, options, run, measurer, "measuring")
    if not len(table):
        raise _nothing(table, files)
    names = _Names(files, table, against, known)
    labels = measurer.languages.labels if measurer.languages else []
    entries = measurer.blocklist.entries
    with announced(f"comparing {counted(len(table), 'document')}"):
        verdict = judge(options, table, known, entries, labels, names.where)
    kept = int(verdict.kept.sum())
    if not kept and places is not None:
        raise _nothing_kept(verdict, table)
    if (places is not None or run.page) and signature_of(find_inputs(inputs)) != before:
        what = "changed while they were read"
        raise DataError(files[0].path, f"the inputs {what}", "Run the command again")
    writing = _Writing(files, options, run, table, verdict, places)
    writing.write(kept)
    result = Result(
        len(table),
        kept,
        verdict,
        dict(table.unreadable.most_common()),
        writing.files,
        len(writing.copied),
    )
    if places is not None:
        report = {"inputs": [file.path for file in files], "options": _given(options)}
        text = json.dumps({**report, **result.to_json()}, indent=2, ensure_ascii=False)
        write_text(beside(places.output, ".filter.json"), text + "\n")
    if run.page and run.origin:
        found = result.to_json()
        page = filter_page(found, verdict, writing.samples, table.examples, inputs, run.origin)
        write_text(run.page, page)
    return result


def _given(options: FilterOptions) -> dict[str, Any]:
    defaults = asdict(FilterOptions())
    return {key: value for key, value in asdict(options).items() if value != defaults[key]}


def _places(run: RunOptions, inputs: Sequence[InputFile]) -> ImagePlaces | None:
    """Check the outputs; None if there are none."""
    paths = [file.path for file in inputs]
    if run.page:
        check_output("--html", run.page, paths)
    if run.output is None:
        return None
    files = output_files(run.output, run.shards)
    for path in (*files, beside(run.output, ".filter.json"), beside(run.output, ".dropped.tsv")):
        check_output("--output", path, paths)
        if run.page and Path(run.page).absolute() == path.absolute():
            what = f"{run.page} is also written by --output"
            raise DataError("--html", what, "Give another name")
    pattern = beside(run.output, "-?????-of-?????.jsonl*").name
    stale = [p for p in Path(run.output).parent.glob(_literal(pattern)) if p not in files]
    if run.shards > 1 and stale:
        what = f"there are files of another --shards here, such as {stale[0].name}"
        raise DataError(run.output, what, "Remove them, or give another --output")
    copies = beside(run.output, "-images")
    check_output_folder("--output", copies)
    return ImagePlaces(str(run.output), str(copies), run.images)


def _literal(pattern: str) -> str:
    return pattern.replace("[", "[[]")


def _nothing(table: Table, files: Sequence[InputFile]) -> DataError:
    where = files[0].path if len(files) == 1 else f"{len(files)} inputs"
    if not table.unreadable:
        return DataError(where, "no documents found", "Check the inputs")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in table.unreadable.most_common())
    first = next(iter(table.examples.values()))[0]
    what = f"no document can be read ({reasons}); the first: {first.where}: {first.detail}"
    return DataError(where, what, "Check that these are the right files")


def _nothing_kept(verdict: Verdict, table: Table) -> DataError:
    dropped = ", ".join(f"{one.name} {one.dropped:,}" for one in verdict.filters if one.dropped)
    what = f"the filters drop all {len(table):,} documents ({dropped}), so nothing is written"
    return DataError("--output", what, "Loosen a filter; --dry-run counts without writing")


@dataclass
class _Names:
    """Names documents by their numbers."""

    files: Sequence[InputFile]
    table: Table
    against: Sequence[InputFile]
    known: Table | None

    def where(self, document: int, is_known: bool) -> str:
        """The file and record of a document, or of one of ``--against``."""
        table, files = (self.known, self.against) if is_known else (self.table, self.files)
        assert table is not None
        file = files[table.columns["input"][document]]
        return f"{file.path}:{table.columns['record'][document]}"


def _measure(
    files: Sequence[InputFile],
    options: FilterOptions,
    run: RunOptions,
    measurer: Measurer,
    verb: str,
) -> Table:
    """Measure all documents of inputs."""
    builder, unused = TableBuilder(), UnusedKeys()
    progress = _Progress(files, verb)
    arguments = (options, run.read)
    results = _results(files, options, run, measurer.measure, make_measurer, arguments)
    with closing(results) as blocks:
        for block in blocks:
            unused.add(block.unused_keys)
            builder.add(block)
            progress.update(builder.documents, block.read_bytes)
    unused.names -= {*SCORE_KEYS, *(name.upper() for name in SCORE_KEYS), options.score_key or ""}
    unused.report()
    return builder.table()


def _results(
    files: Sequence[InputFile],
    options: FilterOptions,
    run: RunOptions,
    here: Callable[[Block], Any],
    make: Callable[..., Callable[[Block], Any]],
    arguments: tuple[Any, ...],
) -> Any:
    """What is made of each block, in order; ``here`` in this process if there is one worker."""
    columns = {*SCORE_KEYS}
    if options.score_key is not None:
        columns = {options.score_key.lower(), options.score_key.split(".")[0].lower()}
    blocks = read_blocks(files, plan_ranges(files, (0, 1)), None, run.read.limits, columns)
    if run.workers == 1:
        yield from _here(blocks, here)
        return
    pool = Pool(make, arguments, run.workers)
    try:
        yield from pool.work(blocks)
    finally:
        pool.kill()


def _here(blocks: Iterator[Block], work: Callable[[Block], Any]) -> Iterator[Any]:
    with warnings.catch_warnings():
        ignore_image_warnings()
        yield from map(work, blocks)


class _Progress:
    """Lines on stderr, every second on a terminal and every ten seconds in a log."""

    def __init__(self, files: Sequence[InputFile], verb: str) -> None:
        self._total = max(sum(file.size_bytes for file in files), 1)
        self._verb = verb
        self._started = time.monotonic()
        self._interval = 1.0 if sys.stderr.isatty() else 10.0
        self._due = self._started + 2.0

    def update(self, documents: int, read_bytes: int) -> None:
        """Say how far the work is, if it is time for a line."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self._interval
        share = min(read_bytes / self._total, 1.0)
        left = (now - self._started) * (1 - share) / max(share, 1e-9)
        line = f"{self._verb}: {documents:,} documents, {100 * share:.0f}%"
        line += f", {format_duration(left)} left" if share > 0.01 else ""
        logger.info(line, extra={"stderr": True})


class _Writing:
    """The second reading."""

    def __init__(
        self,
        files: Sequence[InputFile],
        options: FilterOptions,
        run: RunOptions,
        table: Table,
        verdict: Verdict,
        places: ImagePlaces | None,
    ) -> None:
        self._inputs, self._options, self._run = files, options, run
        self._table, self._verdict, self._places = table, verdict, places
        self.files: list[Path] = []
        self.copied: set[str] = set()
        self.samples: list[tuple[int, Sample]] = []
        """Numbers of documents, and what the page shows of them."""
        self._dropped = iter(np.flatnonzero(~verdict.kept).tolist())
        self._sampled = self._choose() if run.page else np.zeros(0, dtype=np.int64)

    def write(self, kept: int) -> None:
        """Write what the run asks for."""
        if self._places is None:
            if self._run.page:
                self._read(lambda _: None, lambda _: None)
            return
        self.files = output_files(self._places.output, self._run.shards)
        report = beside(self._places.output, ".filter.json")
        listed = beside(self._places.output, ".dropped.tsv")
        with replace_file(listed) as tsv:
            tsv.write(b"where\tid\tfilter\treason\n")
            with LineWriter(self.files, kept) as writer:
                self._read(writer.write, tsv.write)
                if report.exists():
                    report.unlink()
        remove_old_copies(Path(self._places.copies), self.copied)

    def _read(self, line: Callable[[bytes], Any], row: Callable[[bytes], Any]) -> None:
        states = self._states()
        arguments = (states, self._run.read, self._options.score_key, self._places)
        here = make_line_maker(*arguments) if self._run.workers == 1 else lambda _: None
        sampled = iter(self._sampled.tolist())
        progress = _Progress(self._inputs, "writing" if self._places else "looking for samples")
        documents = 0
        results = _results(self._inputs, self._options, self._run, here, make_line_maker, arguments)
        with closing(results) as blocks:
            for block in blocks:
                self._take(block, line, row)
                self.samples += [(next(sampled), sample) for sample in block.samples]
                documents += len(block.lines) + len(block.dropped)
                progress.update(documents, block.read_bytes)
        if len(self.samples) < len(self._sampled) or next(self._dropped, None) is not None:
            what = "has fewer documents than a moment ago"
            raise DataError(
                self._inputs[0].path, what, "Do not change the inputs while they are read"
            )

    def _take(
        self, block: Written, line: Callable[[bytes], Any], row: Callable[[bytes], Any]
    ) -> None:
        for content in block.lines:
            line(content)
        for name in block.dropped:
            number = next(self._dropped)
            cells = (self._where(number), name, self._filter(number), self._verdict.reason(number))
            text = "\t".join(escape_line(cell).replace("\t", " ") for cell in cells)
            row(text.encode("utf-8", "replace") + b"\n")
        self.copied |= block.copied

    def _where(self, number: int) -> str:
        columns = self._table.columns
        return f"{self._inputs[columns['input'][number]].path}:{columns['record'][number]}"

    def _filter(self, number: int) -> str:
        return self._verdict.filters[self._verdict.dropped_by[number]].name

    def _states(self) -> list[bytes]:
        """What becomes of each record, a byte each by input and number."""
        inputs, records = self._table.columns["input"], self._table.columns["record"]
        state = np.where(self._verdict.kept, KEPT, DROPPED).astype(np.uint8)
        state[self._sampled] += SAMPLE
        found = []
        for number in range(len(self._inputs)):
            mine = np.flatnonzero(inputs == number)
            states = np.zeros(int(records[mine].max(initial=-1)) + 1, dtype=np.uint8)
            states[records[mine]] = state[mine]
            found.append(states.tobytes())
        return found

    def _choose(self) -> np.ndarray:
        """Documents to show: of each filter and of those that are kept, at even distances."""
        chosen: list[np.int64] = []
        for number in range(-1, len(self._verdict.filters)):
            mine = np.flatnonzero(self._verdict.dropped_by == number)
            chosen += [mine[place] for place in at_even_distances(range(len(mine)), MOST_SAMPLES)]
        return np.sort(np.array(chosen, dtype=np.int64))
