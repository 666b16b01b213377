"""Convert a checkpoint of one format into another, whole or not at all.

    chameleon convert runs/digits exported/digits --to hf --dtype bf16

Any source joins any sink (``formats/``): the tensors stream from one into the other row by row,
so that memory is needed for a few tensors and not for the model. Afterwards the new files are
opened as a source, mapped back to megatron-core's layout and compared with what was meant to be
written. Checksums of the source's files are checked, and those of the new files written.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.checkpoint.convert.partial_folder import flushing, partial_folder, sync
from megatron_chameleon.checkpoint.convert.streaming import (
    Progress,
    TensorStream,
    checksum,
    read_ahead,
)
from megatron_chameleon.checkpoint.formats import FORMATS, load_format
from megatron_chameleon.checkpoint.formats.base import (
    SHARD_BYTES,
    CheckpointReader,
    CheckpointWriter,
    Target,
)
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.checkpoint.state.integrity import check_files, write_sums
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.errors import CheckpointError, ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPARE_BYTES = 2**26
"""For configs, tokenizer files that are copied and the file system's own needs."""


@dataclass(frozen=True)
class ConversionOptions:
    """What a conversion can be asked for.

    Attributes:
        dtype: fp32, bf16 or fp16 for the transformer; None keeps the source's. The VQGAN keeps its
            own, optimizer state is in fp32.
        shards: Number of files (meta only); None: as few as the QK-norms allow.
        tokenizer_folder: Ours or Meta's; None takes the source's own.
        optimizer: Keep optimizer state where source and format have it.
        shard_bytes: Largest size of a file of tensors (hf only).
    """

    dtype: str | None = None
    shards: int | None = None
    tokenizer_folder: str | Path | None = None
    optimizer: bool = True
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write.

    Attributes:
        parameters: Of the transformer.
        optimizer: What happens to optimizer state, for people.
        files: Names and sizes of the files with its tensors.
        free_bytes: On the destination's disk.
        largest_bytes: Of the largest tensor; a conversion holds some such in memory.
    """

    source: CheckpointReader
    destination: Path
    to: str
    dtypes: tuple[torch.dtype, ...]
    parameters: int
    optimizer: str
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
            f"{dims.vocab_size}; optimizer state {self.optimizer}",
            *(f"{size_bytes:>16,} bytes  {file}" for file, size_bytes in self.files.items()),
            f"{self.total_bytes:>16,} bytes needed on disk, {self.free_bytes:,} are free",
            f"{3 * self.largest_bytes:>16,} bytes of memory beside the interpreter's, about",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did."""

    source: Path
    destination: Path
    step: int
    parameters: int
    """Of the transformer."""
    total_bytes: int
    """Of the files with its tensors."""
    optimizer: str
    """What happened to optimizer state."""
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
    verify: bool = True,
    progress: Progress = lambda line: None,
    **options: Any,
) -> ConversionResult:
    """Write a checkpoint in another format.

    Args:
        source: A checkpoint of any format; of a ``checkpoints`` or run folder the newest whole
            step.
        destination: A folder that does not exist; it appears when everything is written and
            verified.
        to: One of ``FORMATS``.
        verify: Check the source's files where they have checksums, read everything back and
            compare, and write ``SHA256SUMS``.
        progress: Gets a line after each layer.
        options: Those of ``ConversionOptions``.

    Raises:
        CheckpointError: The source cannot be converted, or the destination exists or cannot be
            written.
        ConfigError: An option does not fit.
        DataError: The tokenizer folder cannot be used.
    """
    started = time.monotonic()
    destination, chosen = Path(destination), ConversionOptions(**options)
    _check_options(to, chosen, destination)
    opened = open_checkpoint(source)
    if verify and (files := check_files(opened.folder)):
        progress(f"{files} files of {opened.folder} are what was written (SHA256SUMS)")
    with partial_folder(destination, progress) as partial:
        target, sink, plan = _prepare(opened, destination, partial, to, chosen)
        if plan.free_bytes < plan.total_bytes:
            what = f"disk full: {plan.free_bytes:,} bytes are free, {plan.total_bytes:,} are needed"
            raise CheckpointError(str(destination), what, "Free space, or give another place")
        stream = TensorStream(opened, target, progress, verify)
        new = partial / "new"
        new.mkdir()
        with flushing(new):
            sink.write(new, iter(stream))
        seconds = time.monotonic() - started
        if verify:
            _verify_written(load_format(to).Reader(new), target, stream.checksums, partial)
            write_sums(new, {})
        sync(new)
        new.replace(destination)
    return ConversionResult(
        source=opened.folder,
        destination=destination,
        step=opened.step,
        parameters=plan.parameters,
        optimizer=plan.optimizer,
        total_bytes=sum(plan.files.values()),
        seconds=seconds,
        verify_seconds=time.monotonic() - started - seconds,
        verified=verify,
        largest_change=stream.largest_change,
    )


def plan_conversion(
    source: str | Path, destination: str | Path, to: str, **options: Any
) -> ConversionPlan:
    """What ``convert`` would write. Args and Raises: as there; nothing stays written."""
    import tempfile

    destination, chosen = Path(destination), ConversionOptions(**options)
    _check_options(to, chosen, destination)
    opened = open_checkpoint(source)
    with tempfile.TemporaryDirectory() as scratch:
        return _prepare(opened, destination, Path(scratch), to, chosen)[2]


def _check_options(to: str, options: ConversionOptions, destination: Path) -> None:
    shards = options.shards
    if to not in FORMATS:
        names = ", ".join(FORMATS)
        what = f"there is no such format, there are {names}"
        raise ConfigError(f"--to {to}", what, f"Use one of {names}")
    if shards is not None and (to != "meta" or shards < 1):
        what = "is below 1" if shards < 1 else f"is for --to meta, and this is --to {to}"
        raise ConfigError(f"--shards {shards}", what, "Leave it out, or give 1 or more with meta")
    if destination.exists():
        raise CheckpointError(
            str(destination), "already exists", "Give a new folder, or remove this one first"
        )


def _prepare(
    source: CheckpointReader, destination: Path, scratch: Path, to: str, options: ConversionOptions
) -> tuple[Target, CheckpointWriter, ConversionPlan]:
    """The target, its sink and the plan; a format that cannot hold the model refuses it here."""
    tokenizer = open_tokenizer(source, options.tokenizer_folder, scratch / "tokenizer")
    dtype = DTYPES[options.dtype] if options.dtype else None
    weights = list(tensor_rows(source.dimensions))
    sink_class = load_format(to).Writer
    target = Target(
        model=source.model,
        dimensions=source.dimensions,
        dtypes={row.key: dtype or source.dtype(row) for row in weights},
        step=source.step,
        tokenizer=tokenizer,
        origin=str(source.folder),
        shards=options.shards,
        shard_bytes=options.shard_bytes,
        has_optimizer=options.optimizer and source.has_optimizer and sink_class.holds_optimizer,
        config=source.config,
        data=source.data,
        skipped_steps=source.skipped_steps,
    )
    sink = sink_class(target)
    existing = destination.absolute().parent
    while not existing.is_dir():
        existing = existing.parent
    sizes = [
        element_count(p.shape) * max(target.dtype(p), source.dtype(p), key=_width).itemsize
        for p in target.rows
    ]
    files = (path for path in tokenizer.folder.iterdir() if path.is_file())
    plan = ConversionPlan(
        source=source,
        destination=destination,
        to=to,
        dtypes=tuple(dict.fromkeys(target.dtypes.values())),
        parameters=sum(element_count(row.shape) for row in weights),
        optimizer=_optimizer_text(source, target, to),
        files=sink.files(),
        tokenizer_bytes=sum(path.stat().st_size for path in files),
        free_bytes=shutil.disk_usage(existing).free,
        largest_bytes=max(sizes),
    )
    return target, sink, plan


def _optimizer_text(source: CheckpointReader, target: Target, to: str) -> str:
    if target.has_optimizer:
        return "kept"
    if not source.has_optimizer:
        return "not there"
    return "left out" if load_format(to).Writer.holds_optimizer else f"left out ({to} has no place)"


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _verify_written(
    again: CheckpointReader, target: Target, checksums: dict[str, str], scratch: Path
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
    sums = read_ahead(target.rows, lambda row: checksum(again.read(row)))
    for row, found in sums:
        expected = checksums[row.key]
        if found != expected:
            what = f"{row.key} differs after writing (sha256 {found[:12]}, was {expected[:12]})"
            raise CheckpointError(str(again.folder), what, remedy)
    tokenizer = open_tokenizer(again, None, scratch / "again")
    assert tokenizer.fingerprint == target.tokenizer.fingerprint
