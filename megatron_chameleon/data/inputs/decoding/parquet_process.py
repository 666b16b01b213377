"""Decodes parquet and Arrow in a process of its own, whose memory is limited.

``parquet_client.py`` runs it. A few kilobytes of parquet can ask for any amount of memory before a
row can be looked at, and a damaged file can crash Arrow. Here both end this process only. It
imports nothing of the package.

A message is a byte for its kind, a length of 8 bytes and the content. After the file is opened, it
sends ``H``, the rows of each row group as JSON, and ``S``, the schema. Then each request, a line of
JSON, asks for rows of one row group. They come as ``B``, their number and an Arrow stream, as
``L``, the sizes of a row that is too large, or as ``X``, the fault of a row that is damaged. ``D``
ends the answer, ``E`` ends it with an error. ``R`` asks for bytes of a file that only the other
process can open.

A record batch of an Arrow file is a row group here. The stream format, which ``datasets`` writes,
has no list of its batches, so it is read once to count them. A local file is mapped: only the
pages that are looked at are in memory, and they are not counted as memory of the process.
"""

import json
import os
import resource
import struct
import sys
from collections.abc import Iterator
from typing import IO, Any

import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

FRAME = struct.Struct(">cQ")
BATCH_BYTES = 1 << 20
"""Rows are sent together up to this size."""


def main() -> None:
    """Open the file that the first line names, and answer requests until the pipe is closed."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    opening = json.loads(requests.readline())
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_cpu_count(1)
    path, is_arrow = opening["path"], opening["kind"] == "arrow"
    try:
        mapped = os.path.getsize(path) if is_arrow and path else 0  # noqa: PTH202  # no more imports
        _limit_memory(opening["memory_bytes"] + mapped)
        file = path or _RemoteFile(requests, answers, opening["size_bytes"])
        table = _open_arrow(file) if is_arrow else _Parquet(file)
        send(answers, b"H", json.dumps(table.rows).encode())
        send(answers, b"S", table.schema.serialize().to_pybytes())
        while line := requests.readline():
            for kind, content in _rows(table, **json.loads(line)):
                send(answers, kind, content)
            send(answers, b"D", b"")
    except Exception as error:  # Arrow raises many kinds for a damaged file
        send(answers, b"E", json.dumps(_describe(error)).encode())


def send(stream: IO[bytes], kind: bytes, content: bytes) -> None:
    """Write one message."""
    stream.write(FRAME.pack(kind, len(content)))
    stream.write(content)
    stream.flush()


def _limit_memory(size: int) -> None:
    """Let this process take so many bytes more than now."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  # no more imports
        used = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = used + size if hard == resource.RLIM_INFINITY else min(used + size, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _describe(error: Exception) -> dict[str, Any]:
    return {
        "needs_memory": isinstance(error, MemoryError),
        "errno": error.errno if isinstance(error, OSError) else None,
        "cause": " ".join(str(error).split())[:300] or type(error).__name__,
    }


class _Parquet:
    """A parquet file; its pages are checked and decoded one by one, since a whole column might not
    fit in memory."""

    def __init__(self, file: Any) -> None:
        self._file = pyarrow.parquet.ParquetFile(
            file, pre_buffer=False, page_checksum_verification=True, buffer_size=1 << 16
        )
        metadata = self._file.metadata
        self.rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self.schema = self._file.schema_arrow

    def batches(self, group: int, size: int, columns: list[str]) -> Iterator[Any]:
        """The rows of a row group, at most ``size`` at a time."""
        yield from self._file.iter_batches(size, row_groups=[group], columns=columns)


class _ArrowFile:
    """Arrow's file format (also Feather's second version), which lists its record batches."""

    def __init__(self, file: Any) -> None:
        self._reader = pyarrow.ipc.open_file(file)
        self.schema = self._reader.schema
        self.rows = [self._reader.get_batch(i).num_rows for i in range(self._count())]

    def batches(self, group: int, size: int, columns: list[str]) -> Iterator[Any]:
        """The rows of a record batch, at most ``size`` at a time."""
        yield from _pieces(self._reader.get_batch(group), size, columns)

    def _count(self) -> int:
        return int(self._reader.num_record_batches)


class _ArrowStream:
    """Arrow's stream format. Where the file breaks off, there is one row that cannot be read."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._at = 0
        """Batches that have been read."""
        self._batch: Any = None
        """The last of them."""
        self._open()
        self.schema = self._reader.schema
        self.rows: list[int] = []
        self._fault = ""
        try:
            while (batch := self._next()) is not None:
                self.rows.append(batch.num_rows)
        except (pyarrow.ArrowException, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._fault = f"the file breaks off: {error}"
            self.rows.append(1)
        self._open()

    def batches(self, group: int, size: int, columns: list[str]) -> Iterator[Any]:
        """The rows of a record batch, at most ``size`` at a time."""
        if self._fault and group == len(self.rows) - 1:
            raise ValueError(self._fault)
        if group < self._at:
            self._open()
        while self._at < group + 1:
            self._batch = self._next()
        yield from _pieces(self._batch, size, columns)

    def _open(self) -> None:
        self._file.seek(0)
        self._reader = pyarrow.ipc.open_stream(self._file)
        self._at, self._batch = 0, None

    def _next(self) -> Any:
        try:
            batch = self._reader.read_next_batch()
        except StopIteration:
            return None
        self._at += 1
        return batch


def _open_arrow(file: Any) -> _Parquet | _ArrowFile | _ArrowStream:
    """An Arrow file of either format; parquet that is called so is read as well."""
    if isinstance(file, str):
        file = pyarrow.memory_map(file)
    head = file.read(8)
    file.seek(0)
    if head[:4] == b"PAR1":
        return _Parquet(file)
    if head[:4] == b"FEA1":
        raise ValueError("it is Feather of the first version, which is not read")
    return _ArrowFile(file) if head[:6] == b"ARROW1" else _ArrowStream(file)


def _pieces(batch: Any, size: int, columns: list[str]) -> Iterator[Any]:
    """The rows of a batch, at most ``size`` at a time, whose extension types are as in parquet."""
    batch.validate()
    arrays = [batch.column(batch.schema.names.index(name)) for name in columns]
    plain = [a.storage if isinstance(a, pyarrow.ExtensionArray) else a for a in arrays]
    whole = pyarrow.record_batch(plain, names=columns)
    for begin in range(0, whole.num_rows, size):
        yield whole.slice(begin, size)


def _rows(
    table: Any,
    *,
    group: int,
    first: int,
    stop: int,
    batch_rows: int,
    columns: list[str],
    limits: list[int],
    text_columns: list[str],
) -> Iterator[tuple[bytes, bytes]]:
    """The messages of the rows [first, stop) of a row group.

    ``limits`` are those of a row: bytes, values at all depths, and bytes of text.
    """
    at = 0
    for batch in table.batches(group, batch_rows, columns):
        begin, end = max(first - at, 0), min(stop - at, batch.num_rows)
        at += batch.num_rows
        if begin < end:
            yield from _messages(batch.slice(begin, end - begin), limits, text_columns)
        if at >= stop:
            return


def _messages(
    batch: Any, limits: list[int], text_columns: list[str]
) -> Iterator[tuple[bytes, bytes]]:
    """Rows in halves, until they are small enough together or alone."""
    try:
        batch.validate(full=True)  # an Arrow file may hold anything; its offsets are followed below
    except pyarrow.ArrowException as error:
        if batch.num_rows == 1:
            yield b"X", str(error)[:300].encode()
            return
        size = values = BATCH_BYTES + 1
    else:
        size, values = sum(map(_bytes, batch.columns)), sum(map(_count_values, batch.columns))
    if batch.num_rows > 1 and size + 64 * values > BATCH_BYTES:
        half = batch.num_rows // 2
        yield from _messages(batch.slice(0, half), limits, text_columns)
        yield from _messages(batch.slice(half), limits, text_columns)
        return
    if batch.num_rows == 1:
        texts = sum(_text_bytes(batch.column(name)) for name in text_columns)
        if any(found > most for found, most in zip((size, values, texts), limits, strict=True)):
            yield b"L", json.dumps([size, values, texts]).encode()
            return
    if any(_is_dictionary(column) for column in batch.columns):
        batch = pyarrow.record_batch([*map(_decoded, batch.columns)], names=batch.schema.names)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    yield b"B", batch.num_rows.to_bytes(8, "big") + sink.getvalue()


def _is_dictionary(array: Any) -> bool:
    return bool(pyarrow.types.is_dictionary(array.type))


def _bytes(array: Any) -> int:
    """Bytes of an array; of a dictionary's those that its rows would have without it."""
    if not _is_dictionary(array):
        return int(array.nbytes)
    try:
        lengths = pyarrow.compute.binary_length(array.dictionary)
    except pyarrow.ArrowException:  # numbers
        return 8 * len(array)
    return 8 * len(array) + (pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0)


def _decoded(array: Any) -> Any:
    return array.dictionary_decode() if _is_dictionary(array) else array


def _text_bytes(array: Any) -> int:
    """Bytes of a row's text if it is long; a ``data:`` URI is a picture."""
    size = _bytes(array)
    if size <= BATCH_BYTES:
        return 0
    is_picture = pyarrow.compute.starts_with(_decoded(array), "data:", ignore_case=True)[0].as_py()
    return 0 if is_picture else size


def _count_values(array: Any) -> int:
    """Values of an array at all depths. A list of a million nulls has no bytes."""
    kind, count = array.type, len(array)
    if pyarrow.types.is_struct(kind):
        return count + sum(_count_values(array.field(i)) for i in range(kind.num_fields))
    if pyarrow.types.is_fixed_size_list(kind):
        size = kind.list_size
        return count + _count_values(array.values.slice(array.offset * size, count * size))
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    if count and (is_list or pyarrow.types.is_map(kind)):
        first, last = array.offsets[0].as_py(), array.offsets[count].as_py()
        sides = [array.values] if is_list else [array.keys, array.items]
        return count + sum(_count_values(side.slice(first, last - first)) for side in sides)
    return count


class _RemoteFile:
    """A file that the other process reads."""

    closed = False

    def __init__(self, requests: IO[bytes], answers: IO[bytes], size: int) -> None:
        self._requests, self._answers, self._size = requests, answers, size
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        size = left if size < 0 else min(size, left)
        send(self._answers, b"R", json.dumps([self._at, size]).encode())
        data = self._requests.read(size)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        """The other process closes it."""


if __name__ == "__main__":
    main()
