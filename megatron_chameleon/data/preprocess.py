"""Files of documents to a token file, in the order of the input whatever the number of workers.

The parent reads documents and writes tokens; workers encode chunks of ``CHUNK_DOCUMENTS``. At most
two chunks a worker are under way, so memory does not grow with the input. Each worker uses one
thread: the parallelism is over chunks.

Try: ``chameleon preprocess documents.jsonl --tokenizer DIR --output PREFIX --workers 4``
"""

import itertools
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.data.documents import Document
from megatron_chameleon.data.encode import Encoded, encode_documents, load_for_encoding
from megatron_chameleon.data.readers import ReadProgress, read_documents
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.tokenizer.folder import Tokenizer

if TYPE_CHECKING:  # indexed.py imports megatron-core, seconds that the workers need not spend
    from megatron_chameleon.data.indexed import TokenFileInfo, TokenFileWriter

CHUNK_DOCUMENTS = 64


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents, and how far into the input the last of them reaches."""

    documents: list[Document]
    read_bytes: int


def output_prefix(prefix: str | Path, shard: tuple[int, int]) -> str:
    """PREFIX itself, or PREFIX.shard-I-of-N for one of several shards."""
    return str(prefix) if shard[1] == 1 else f"{prefix}.shard-{shard[0]}-of-{shard[1]}"


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer_folder: str | Path,
    prefix: str | Path,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> "TokenFileInfo":
    """Encode documents and write PREFIX.bin, .idx and .json.

    If documents were dropped, PREFIX.dropped.jsonl lists them.

    Args:
        inputs: Files of documents, see ``readers.py``.
        tokenizer_folder: Folder written by ``chameleon tokenizer``.
        prefix: Path of the output without suffix; an older output stays until the new one is whole.
        workers: Processes that encode; 1 encodes in this process.
        shard: (I, N), 0 <= I < N: take documents I, I + N, I + 2N, ... and write
            PREFIX.shard-I-of-N.

    Returns:
        What was written.

    Raises:
        ConfigError: When an option cannot work.
        DataError: When an input or the tokenizer is broken, or no document is left; nothing is
            written then.
    """
    from megatron_chameleon.data.indexed import TokenFileWriter

    _check_options(inputs, prefix, workers, shard)
    tokenizer = load_for_encoding(tokenizer_folder)
    read = ReadProgress()
    report = _Report(read)
    with TokenFileWriter(output_prefix(prefix, shard), tokenizer) as writer:
        chunks = _chunks(inputs, read, shard)
        first_drop: Encoded | None = None
        for chunk, results in _encode_chunks(chunks, tokenizer, workers):
            for result in results:
                if result.token_ids is not None:
                    writer.add(result.token_ids, result.images)
                else:
                    first_drop = first_drop or result
                    reason, detail = result.dropped or "", result.detail or ""
                    writer.drop(result.id, "", result.where, reason, detail)
            report.update(writer, chunk.read_bytes)
        if not writer.documents:
            raise _no_documents(inputs, shard, writer, first_drop)
        info = writer.commit()
    report.finish(info, writer.path(""))
    return info


def _check_options(
    inputs: Sequence[str | Path], prefix: str | Path, workers: int, shard: tuple[int, int]
) -> None:
    if workers < 1:
        raise ConfigError(
            "--workers", f"{workers} is less than 1", "Give the number of processes, such as 4"
        )
    index, count = shard
    if not 0 <= index < count:
        raise ConfigError(
            "--shard",
            f"{index}/{count} is not within 0/{count} to {count - 1}/{count}",
            "Count from 0",
        )
    if not Path(prefix).name:
        raise ConfigError(
            "--output", f"{str(prefix)!r} names no file", "Give a path such as data/train"
        )
    written = {
        Path(output_prefix(prefix, shard) + suffix).resolve()
        for suffix in (".bin", ".idx", ".json")
    }
    written.add(Path(output_prefix(prefix, shard) + ".dropped.jsonl").resolve())
    for path in inputs:
        if Path(path).resolve() in written:
            raise ConfigError(
                "--output", f"{prefix} would overwrite the input {path}", "Choose another --output"
            )


def _no_documents(
    inputs: Sequence[str | Path],
    shard: tuple[int, int],
    writer: "TokenFileWriter",
    first_drop: Encoded | None,
) -> DataError:
    where = str(inputs[0]) if len(inputs) == 1 else f"{len(inputs)} inputs"
    if first_drop is None:
        part = f"no documents for shard {shard[0]}/{shard[1]}" if shard[1] > 1 else "no documents"
        return DataError(
            where,
            part,
            "Give files that hold some, or fewer shards" if shard[1] > 1 else "Check them",
        )
    dropped = sum(writer.dropped.values())
    what = f"all {dropped} documents were dropped ({_dropped(writer.dropped)}), the first for "
    what += f"{first_drop.detail}"
    return DataError(where, what, "Check the images; paths are relative to the file of documents")


def _dropped(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def _chunks(
    inputs: Sequence[str | Path], read: ReadProgress, shard: tuple[int, int]
) -> Iterator[Chunk]:
    documents = itertools.islice(read_documents(inputs, read), shard[0], None, shard[1])
    while chunk := list(itertools.islice(documents, CHUNK_DOCUMENTS)):
        yield Chunk(chunk, read.read_bytes)


# Encoding, here or in other processes


def _encode_chunks(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Chunk, list[Encoded]]]:
    """Each chunk with its encoded documents, in the order of the chunks."""
    if workers == 1:
        with _one_thread():
            for chunk in chunks:
                yield chunk, encode_documents(chunk.documents, tokenizer)
        return
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_Worker.start,
        initargs=(str(tokenizer.folder),),
    )
    pending: deque[tuple[Chunk, Future[list[Encoded]]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, executor.submit(_Worker.encode, chunk.documents)))
            if len(pending) >= 2 * workers:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        executor.shutdown(cancel_futures=True)


def _result(chunk: Chunk, future: "Future[list[Encoded]]") -> tuple[Chunk, list[Encoded]]:
    try:
        return chunk, future.result()
    except BrokenProcessPool as error:
        remedy = "Look for an out-of-memory kill, then use fewer --workers"
        raise DataError(
            chunk.documents[0].where, "a worker process died at or near this document", remedy
        ) from error


class _Worker:
    """What one worker process keeps between chunks; the parent never sets it."""

    folder: str = ""
    tokenizer: Tokenizer | None = None

    @classmethod
    def start(cls, folder: str) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, once
        import torch

        torch.set_num_threads(1)
        cls.folder = folder

    @classmethod
    def encode(cls, documents: list[Document]) -> list[Encoded]:
        # loaded here, because an error in start() would only break the pool
        if cls.tokenizer is None:
            cls.tokenizer = load_for_encoding(cls.folder)
        return encode_documents(documents, cls.tokenizer)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread, as in the workers: the output must not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Progress


class _Report:
    """Progress on stderr, each second on a terminal and each ten in a log; a summary on stdout."""

    def __init__(self, read: ReadProgress) -> None:
        self.read = read
        self.terminal = sys.stderr.isatty()
        self.interval_seconds = 1.0 if self.terminal else 10.0
        self.started = self.printed = time.monotonic()

    def update(self, writer: "TokenFileWriter", read_bytes: int) -> None:
        now = time.monotonic()
        if now - self.printed < self.interval_seconds:
            return
        self.printed = now
        elapsed = now - self.started
        left = elapsed * (self.read.total_bytes - read_bytes) / max(read_bytes, 1)
        done = 100 * read_bytes / max(self.read.total_bytes, 1)
        rates = _rates(writer.documents, writer.tokens, read_bytes, elapsed)
        line = f"preprocess: {writer.documents:,} documents, {done:.0f}% of input, {rates}"
        line += f", ETA {_duration(left)}"
        print(
            f"\r{line}\033[K" if self.terminal else line,
            end="" if self.terminal else "\n",
            file=sys.stderr,
        )
        sys.stderr.flush()

    def finish(self, info: "TokenFileInfo", path: Path) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        elapsed = time.monotonic() - self.started
        share = 100 * info.image_tokens / info.tokens
        size = f"{info.bin_bytes / 1e6:.2f} MB of {info.dtype}"
        dropped = f"{sum(info.dropped.values())} dropped"
        if info.dropped:
            dropped += f" ({_dropped(info.dropped)}; listed in {path}.dropped.jsonl)"
        rates = _rates(info.documents, info.tokens, self.read.total_bytes, elapsed)
        print(
            f"{path}: {info.documents:,} documents, {info.tokens:,} tokens ({share:.1f}% image), "
            f"{info.images:,} images, {size}, {dropped}, {_duration(elapsed)} at {rates}"
        )


def _rates(documents: int, tokens: int, read_bytes: int, seconds: float) -> str:
    seconds = max(seconds, 1e-9)
    return (
        f"{documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s, "
        f"{read_bytes / seconds / 1e6:.2f} MB/s"
    )


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
