"""Reports on preprocessing: the progress line, the summary, and the status of shards.

Try: ``chameleon preprocess --status --output PREFIX``
"""

import logging
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_chameleon.data.token_files.format import (
    TokenFileInfo,
    file_of,
    partial_folder_of,
    read_info,
)
from megatron_chameleon.data.token_files.split_writer import held_out_state
from megatron_chameleon.data.token_files.writer_state import WriterState, read_writer_state
from megatron_chameleon.errors import DataError
from megatron_chameleon.wording import counted, format_duration

logger = logging.getLogger(__name__)

FIRST_SECONDS = 2.0
_SHARD = re.compile(r"\.shard-(\d+)-of-(\d+)\.[a-z]+(?:\.jsonl)?")


def shard_prefix(prefix: str | Path, shard: tuple[int, int]) -> str:
    """PREFIX itself, or PREFIX.shard-I-of-N for one of several shards."""
    return str(prefix) if shard[1] == 1 else f"{prefix}.shard-{shard[0]}-of-{shard[1]}"


def find_shards(prefix: str | Path) -> int:
    """Find the N of the shards ``PREFIX.shard-I-of-N``; 0 if there are no shards.

    Raises:
        DataError: If there are shards with different N.
    """
    folder = Path(prefix).parent
    name = Path(prefix).name
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = (_SHARD.fullmatch(found.removeprefix(name)) for found in names)
    counts = sorted({int(match[2]) for match in matches if match})
    if len(counts) > 1:
        what = f"there are shards of {' and of '.join(map(str, counts))} here"
        raise DataError(str(prefix), what, "Remove those that you do not want")
    return counts[0] if counts else 0


class ProgressReport:
    """Reports progress on stderr, every second on a terminal and every ten seconds in a log.

    A thread of its own prints the lines, because a block of images may take minutes. The first line
    comes after three seconds. Use it as a context.

    Args:
        total_bytes: Bytes of the input on disk.
        start: What earlier runs have done.
        start_bytes: Bytes of the input that they have read.
    """

    def __init__(self, total_bytes: int, start: WriterState, start_bytes: int = 0) -> None:
        self.total_bytes = total_bytes
        self.start_bytes = start_bytes
        self.before = (start.documents, start.tokens, start.images)
        self.terminal = sys.stderr.isatty()
        self.interval_seconds = 1.0 if self.terminal else 10.0
        self.started = time.monotonic()
        self._due = self.started + min(FIRST_SECONDS, self.interval_seconds)
        self._now = (start, start_bytes)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> "ProgressReport":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def update(self, state: WriterState, read_bytes: int) -> None:
        """Say how far the work is; a line shows it when it is time for one."""
        self._now = (state, read_bytes)

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.show_if_due()

    def show_if_due(self) -> None:
        """Show a line if the last one is old enough."""
        now = time.monotonic()
        if now < self._due or not logger.isEnabledFor(logging.INFO):
            return
        self._due = now + self.interval_seconds
        state, read_bytes = self._now
        elapsed = now - self.started
        here = read_bytes - self.start_bytes
        left = elapsed * (self.total_bytes - read_bytes) / here if here else None
        done = 100 * read_bytes / max(self.total_bytes, 1)
        bad = sum(list(state.dropped.values()))  # the main thread may add to it
        line = f"preprocess: {state.documents:,} documents, {bad:,} bad, {done:.0f}% of input, "
        line += f"{self._rates(state, here, elapsed)}, "
        line += "ETA unknown" if left is None else f"ETA {format_duration(left)}"
        if self.terminal:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            logger.info(line, extra={"stderr": True})

    def finish(self, info: TokenFileInfo, state: WriterState, path: Path) -> None:
        """Log the summary."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        elapsed = time.monotonic() - self.started
        rates = self._rates(state, self.total_bytes - self.start_bytes, elapsed)
        summary = describe_token_file(info, path)
        logger.info("%s, %s at %s", summary, format_duration(elapsed), rates)

    def _rates(self, state: WriterState, read_bytes: int, seconds: float) -> str:
        seconds = max(seconds, 1e-9)
        done = (state.documents, state.tokens, state.images)
        documents, tokens, images = (
            (now - before) / seconds for now, before in zip(done, self.before, strict=True)
        )
        text = f"{documents:,.0f} documents/s, {tokens:,.0f} tokens/s, "
        text += f"{images:,.1f} images/s, " if state.images else ""
        return f"{text}{read_bytes / seconds / 1e6:.2f} MB/s"


def describe_token_file(info: TokenFileInfo, path: Path) -> str:
    """A line about a token file."""
    share = 100 * info.image_tokens / max(info.tokens, 1)
    dropped = f"{sum(info.dropped.values())} dropped"
    if info.dropped:
        dropped += f" ({count_reasons(info.dropped)}; listed in {path}.dropped.jsonl)"
    return (
        f"{path}: {counted(info.documents, 'document')}, {counted(info.tokens, 'token')} "
        f"({share:.1f}% image), {counted(info.images, 'image')}, "
        f"{info.bin_bytes / 1e6:.2f} MB of {info.dtype}, {dropped}"
    )


def count_reasons(counts: Mapping[str, int]) -> str:
    """``2 corrupt image, 1 missing image``."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


# Status


@dataclass(frozen=True)
class ShardStatus:
    """How far one shard is."""

    name: str
    state: str
    """done, unfinished or not begun."""
    share: float
    """Share of its input that has been read, 0 to 1."""
    documents: int = 0
    images: int = 0
    tokens: int = 0
    bad: int = 0
    held_out: int | None = None
    """Documents of the held-out side, which the other numbers leave out; None without one."""
    megabytes_per_second: float = 0.0
    eta_seconds: float | None = None
    saved_seconds_ago: float | None = None


def status_of(prefix: str | Path, name: str) -> ShardStatus:
    """How far one token file is.

    Args:
        prefix: The token file, a shard or the whole.
        name: What the table calls it.

    Raises:
        DataError: If its sidecar or state cannot be read.
    """
    if partial_folder_of(prefix).is_dir():
        state = read_writer_state(prefix)
        if state is None:
            return ShardStatus(name, "unfinished", 0.0)
        at = state.position
        share = at.get("read_bytes", 0) / max(at.get("total_bytes", 0), 1)
        rate = at.get("bytes_per_second", 0.0)
        left = at.get("total_bytes", 0) - at.get("read_bytes", 0)
        age = max(time.time() - at.get("saved_at", 0.0), 0.0)
        other = held_out_state(state, prefix)
        return ShardStatus(
            name,
            "unfinished",
            share,
            state.documents,
            state.images,
            state.tokens,
            sum(state.dropped.values()),
            None if other is None else other.documents,
            rate / 1e6,
            left / rate if rate else None,
            age,
        )
    if file_of(prefix, ".json").is_file():
        info = read_info(prefix)
        bad = sum(info.dropped.values())
        held_out = info.holdout.held_out_documents if info.holdout else None
        return ShardStatus(
            *(name, "done", 1.0, info.documents, info.images, info.tokens, bad, held_out)
        )
    return ShardStatus(name, "not begun", 0.0)


def status_table(prefix: str | Path) -> str:
    """The status of PREFIX and of all its shards, one line each, and the total of the shards.

    Raises:
        DataError: If there is nothing, or something cannot be read.
    """
    count = find_shards(prefix)
    rows = [
        status_of(shard_prefix(prefix, (index, count)), f"shard {index}/{count}")
        for index in range(count)
        if count > 1
    ]
    whole = status_of(prefix, "whole")
    if whole.state != "not begun":
        rows.insert(0, whole)
    if not rows:
        what = "there is no token file and there are no shards here, finished or not"
        raise DataError(str(prefix), what, "Check --output")
    shards = [row for row in rows if row.name != "whole"]
    if len(shards) > 1:
        rows.append(_total(shards))
    splits = any(row.held_out is not None for row in rows)
    titles = (
        *("", "state", "input", "documents", "images", "tokens", "bad"),
        *(("held out",) if splits else ()),
        *("MB/s", "ETA", "saved"),
    )
    table = [titles, *(_table_row(row, splits) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(titles))]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in table
    )
    return "\n".join(line.rstrip() for line in lines)


def _table_row(status: ShardStatus, splits: bool) -> tuple[str, ...]:
    held_out = "" if status.held_out is None else f"{status.held_out:,}"
    eta, age = status.eta_seconds, status.saved_seconds_ago
    return (
        status.name,
        status.state,
        f"{100 * status.share:.0f}%",
        *(f"{n:,}" for n in (status.documents, status.images, status.tokens, status.bad)),
        *((held_out,) if splits else ()),
        f"{status.megabytes_per_second:.1f}" if status.megabytes_per_second else "",
        "" if eta is None else format_duration(eta),
        "" if age is None else f"{format_duration(age)} ago",
    )


def _total(shards: list[ShardStatus]) -> ShardStatus:
    done = sum(shard.state == "done" for shard in shards)
    etas = [shard.eta_seconds for shard in shards if shard.eta_seconds is not None]
    return ShardStatus(
        "all shards",
        f"{done}/{len(shards)} done",
        sum(shard.share for shard in shards) / len(shards),
        sum(shard.documents for shard in shards),
        sum(shard.images for shard in shards),
        sum(shard.tokens for shard in shards),
        sum(shard.bad for shard in shards),
        sum(counts) if (counts := [s.held_out for s in shards if s.held_out is not None]) else None,
        sum(shard.megabytes_per_second for shard in shards),
        max(etas, default=None),
    )
