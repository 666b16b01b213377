"""Convert a checkpoint of one format into another, whole or not at all.

    chameleon convert runs/digits exported/digits --to hf --dtype bf16

Any source joins any sink (``formats/``): the tensors stream from one into the other piece by piece,
so that memory is needed for a few tensors and not for the model. Afterwards the new files are
opened as a source, mapped back to megatron-core's layout and compared with what was meant to be
written.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from megatron_chameleon.checkpoint.formats import FORMATS, load_format
from megatron_chameleon.checkpoint.formats.base import SHARD_BYTES, Sink, Source, Target, count
from megatron_chameleon.checkpoint.formats.opening import open_source, open_tokenizer
from megatron_chameleon.checkpoint.formats.safetensors_files import as_bytes
from megatron_chameleon.checkpoint.names import Piece, pieces
from megatron_chameleon.errors import CheckpointError, ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPARE_BYTES = 2**26
"""For configs, tokenizer files that are copied and the file system's own needs."""
CAST_BLOCK = 2**24
"""Elements that are compared at a time after a cast."""

T = TypeVar("T")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a conversion will write.

    Attributes:
        parameters: Of the transformer.
        files: Names and sizes of the files with its tensors.
        free_bytes: On the destination's disk.
        largest_bytes: Of the largest tensor; a conversion holds some such in memory.
    """

    source: Source
    destination: Path
    to: str
    dtypes: tuple[torch.dtype, ...]
    parameters: int
    files: dict[str, int]
    tokenizer_bytes: int
    free_bytes: int
    largest_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values()) + self.tokenizer_bytes + SPARE_BYTES

    def text(self) -> str:
        """What ``--dry-run`` prints."""
        dims, model = self.source.dimensions, self.source.model
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        lines = [
            f"{self.source.folder} ({self.source.format}, step {self.source.step:,}) -> "
            f"{self.destination} ({self.to})",
            f"{self.parameters:,} parameters in {names}: {dims.num_layers} layers, hidden "
            f"{dims.hidden_size}, feed-forward {dims.ffn_hidden_size}, "
            f"{dims.num_attention_heads} heads, {dims.num_query_groups} key/value heads, "
            f"{dims.q_norm_groups} QK-norm groups, norm order {model.norm_order}, vocabulary "
            f"{dims.vocab_size}",
            *(f"{size_bytes:>16,} bytes  {file}" for file, size_bytes in self.files.items()),
            f"{self.total_bytes:>16,} bytes needed on disk, {self.free_bytes:,} are free",
            f"{3 * self.largest_bytes:>16,} bytes of memory beside the interpreter's, about",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    source: Path
    destination: Path
    step: int
    parameters: int
    """Of the transformer."""
    total_bytes: int
    """Of the files with its tensors."""
    seconds: float
    verify_seconds: float
    verified: bool
    largest_change: tuple[float, str] | None
    """By a cast: the largest |new - old| / |old| of an element, and its tensor; None: no cast."""


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    shards: int | None = None,
    tokenizer_folder: str | Path | None = None,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda line: None,
) -> Conversion:
    """Write a checkpoint in another format.

    Args:
        source: A checkpoint of any format; of a ``checkpoints`` or run folder the newest whole
            step.
        destination: A folder that does not exist; it appears when everything is written and
            verified.
        to: One of ``FORMATS``.
        dtype: fp32, bf16 or fp16 for the transformer; None keeps the source's. The VQGAN keeps its
            own.
        shards: Number of files (meta only); None: as few as the QK-norms allow.
        tokenizer_folder: Ours or Meta's; None takes the source's own.
        verify: Read everything back and compare.
        shard_bytes: Largest size of a file of tensors (hf only).
        progress: Gets a line after each layer.

    Raises:
        CheckpointError: The source cannot be converted, or the destination exists or cannot be
            written.
        ConfigError: An option does not fit.
        DataError: The tokenizer folder cannot be used.
    """
    started = time.monotonic()
    destination = Path(destination)
    _check_options(to, shards, destination)
    opened = open_source(source)
    with _partial_folder(destination, progress) as partial:
        target, sink, plan = _prepare(
            opened, destination, partial, to, dtype, shards, tokenizer_folder, shard_bytes
        )
        if plan.free_bytes < plan.total_bytes:
            what = f"disk full: {plan.free_bytes:,} bytes are free, {plan.total_bytes:,} are needed"
            raise CheckpointError(str(destination), what, "Free space, or give another place")
        stream = _Stream(opened, target, progress, verify)
        new = partial / "new"
        new.mkdir()
        sink.write(new, iter(stream))
        seconds = time.monotonic() - started
        if verify:
            _verify_written(load_format(to).Source(new), target, stream.checksums, partial)
        _sync(new)
        new.replace(destination)
    return Conversion(
        source=opened.folder,
        destination=destination,
        step=opened.step,
        parameters=plan.parameters,
        total_bytes=sum(plan.files.values()),
        seconds=seconds,
        verify_seconds=time.monotonic() - started - seconds,
        verified=verify,
        largest_change=stream.largest_change,
    )


def plan_conversion(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    shards: int | None = None,
    tokenizer_folder: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """What ``convert`` would write. Args and Raises: as there; nothing stays written."""
    import tempfile

    destination = Path(destination)
    _check_options(to, shards, destination)
    opened = open_source(source)
    with tempfile.TemporaryDirectory() as scratch:
        return _prepare(
            opened, destination, Path(scratch), to, dtype, shards, tokenizer_folder, shard_bytes
        )[2]


def _check_options(to: str, shards: int | None, destination: Path) -> None:
    if to not in FORMATS:
        names = ", ".join(FORMATS)
        what = f"this format is not available in this version, which writes {names}"
        raise ConfigError(f"--to {to}", what, f"Use one of {names}")
    if shards is not None and (to != "meta" or shards < 1):
        what = "is below 1" if shards < 1 else f"is for --to meta, and this is --to {to}"
        raise ConfigError(f"--shards {shards}", what, "Leave it out, or give 1 or more with meta")
    if destination.exists():
        raise CheckpointError(
            str(destination), "already exists", "Give a new folder, or remove this one first"
        )


def _prepare(
    source: Source,
    destination: Path,
    scratch: Path,
    to: str,
    dtype: str | None,
    shards: int | None,
    tokenizer_folder: str | Path | None,
    shard_bytes: int,
) -> tuple[Target, Sink, Plan]:
    """The target, its sink and the plan; a format that cannot hold the model refuses it here."""
    tokenizer = open_tokenizer(source, tokenizer_folder, scratch / "tokenizer")
    found = list(pieces(source.dimensions))
    target = Target(
        model=source.model,
        dimensions=source.dimensions,
        dtypes={piece.key: DTYPES[dtype] if dtype else source.dtype(piece) for piece in found},
        step=source.step,
        tokenizer=tokenizer,
        origin=str(source.folder),
        shards=shards,
        shard_bytes=shard_bytes,
    )
    sink = load_format(to).Sink(target)
    existing = destination.absolute().parent
    while not existing.is_dir():
        existing = existing.parent
    sizes = [
        count(p.shape) * max(target.dtypes[p.key], source.dtype(p), key=_width).itemsize
        for p in found
    ]
    files = (path for path in tokenizer.folder.iterdir() if path.is_file())
    plan = Plan(
        source=source,
        destination=destination,
        to=to,
        dtypes=tuple(dict.fromkeys(target.dtypes.values())),
        parameters=sum(count(piece.shape) for piece in found),
        files=sink.files(),
        tokenizer_bytes=sum(path.stat().st_size for path in files),
        free_bytes=shutil.disk_usage(existing).free,
        largest_bytes=max(sizes),
    )
    return target, sink, plan


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


class _Stream:
    """The source's pieces on their way to the sink: cast, and looked at while they pass.

    Args:
        source: Where they come from.
        target: What they become.
        progress: Gets a line after each layer.
        verify: Whether checksums will be wanted.
    """

    def __init__(self, source: Source, target: Target, progress: Progress, verify: bool) -> None:
        self._source, self._target, self._progress = source, target, progress
        self._verify = verify
        self.checksums: dict[str, str] = {}
        self.largest_change: tuple[float, str] | None = None

    def __iter__(self) -> Iterator[tuple[Piece, torch.Tensor]]:
        started, layers = time.monotonic(), self._target.dimensions.num_layers
        layer = None
        for piece, tensor in read_ahead(self._target.pieces, self._read):
            if layer is not None and piece.layer != layer:
                seconds = time.monotonic() - started
                left_seconds = seconds / (layer + 1) * (layers - layer - 1)
                self._progress(
                    f"layer {layer + 1}/{layers} · {seconds:.1f} s · {left_seconds:.0f} s left"
                )
            layer = piece.layer
            yield piece, tensor
            del tensor  # else it would be held until the next one is there

    def _read(self, piece: Piece) -> torch.Tensor:
        tensor = self._source.read(piece)
        dtype = self._target.dtypes[piece.key]
        if tensor.dtype != dtype:
            cast = tensor.to(dtype)
            change = (_largest_change(tensor, cast, piece.key), piece.key)
            self.largest_change = max(change, self.largest_change or change)
            tensor = cast
        if self._verify:
            self.checksums[piece.key] = checksum(tensor)
        return tensor


def read_ahead(found: Sequence[Piece], read: Callable[[Piece], T]) -> Iterator[tuple[Piece, T]]:
    """Each piece and what ``read`` gives of it; the next one is read while one is used."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(read, found[0])
        for piece, following in zip(found, [*found[1:], None], strict=True):
            value = pending.result()
            if following is not None:
                pending = pool.submit(read, following)
            yield piece, value
            del value


def _largest_change(old: torch.Tensor, new: torch.Tensor, name: str) -> float:
    """The largest |new - old| / |old| of an element.

    Raises:
        CheckpointError: A finite number has become infinite.
    """
    largest = 0.0
    pairs = zip(old.flatten().split(CAST_BLOCK), new.flatten().split(CAST_BLOCK), strict=True)
    for before, after in pairs:
        wide = torch.promote_types(before.dtype, torch.float32)
        before, after = before.to(wide), after.to(wide)
        if (after.isinf() & before.isfinite()).any():
            raise CheckpointError(
                name,
                f"holds {before.abs().max():.3g}, which is beyond {new.dtype}".replace(
                    "torch.", ""
                ),
                "Use --dtype bf16 or fp32",
            )
        change = ((after - before) / before).abs().nan_to_num(0.0)  # 0/0: a zero that stayed one
        largest = max(largest, change.max().item())
    return largest


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def _verify_written(
    again: Source, target: Target, checksums: dict[str, str], scratch: Path
) -> None:
    """Read the new files and compare settings, every tensor and the tokenizer.

    Raises:
        CheckpointError: Something differs.
    """
    remedy = "Convert again, and check the disk if it differs again"
    for name, new, old in (
        ("the model's settings", again.model, target.model),
        ("the tensors' sizes", again.dimensions, target.dimensions),
    ):
        if new != old:
            what = f"{name} differ after writing: {new}, was {old}"
            raise CheckpointError(str(again.folder), what, "Report this bug")
    sums = read_ahead(target.pieces, lambda piece: checksum(again.read(piece)))
    for piece, found in sums:
        expected = checksums[piece.key]
        if found != expected:
            what = f"{piece.key} differs after writing (sha256 {found[:12]}, was {expected[:12]})"
            raise CheckpointError(str(again.folder), what, remedy)
    tokenizer = open_tokenizer(again, None, scratch / "again")
    assert tokenizer.fingerprint == target.tokenizer.fingerprint


@contextmanager
def _partial_folder(destination: Path, progress: Progress) -> Iterator[Path]:
    """A hidden folder beside the destination, locked, empty, and gone afterwards.

    Raises:
        CheckpointError: It cannot be written, or another conversion is at work in it.
    """
    partial = destination.absolute().with_name(f".{destination.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
        try:
            _take(lock, destination)
            if any(partial.iterdir()):
                for path in partial.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                progress(f"removed what an interrupted conversion left in {partial}: starts anew")
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)
    except OSError as error:
        raise CheckpointError(
            str(destination), f"cannot be written ({error})", "Free space, or give another place"
        ) from error


def _take(lock: int, destination: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            str(destination), "another conversion is writing it", "Wait for it, or end it"
        ) from error


def _sync(folder: Path) -> None:
    """Bring everything to the disk, so that a crash after the renaming finds it whole."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
