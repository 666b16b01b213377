"""What a conversion will write, and how much disk and memory it needs.

chameleon convert runs/digits exported/digits --to hf --dry-run
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.checkpoint.formats import FORMATS, load_format
from megatron_chameleon.checkpoint.formats.base import (
    SHARD_BYTES,
    CheckpointReader,
    CheckpointWriter,
    Target,
)
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.checkpoint.names.optimizer_state import AVERAGE
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.errors import CheckpointError, ConfigError
from megatron_chameleon.outputs import check_name, check_output_folder
from megatron_chameleon.tokenizer.common.files import tokenizer_file
from megatron_chameleon.tokenizer.folder import FINGERPRINTED_FILES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPARE_BYTES = 2**26
"""For configs, copied tokenizer files and the file system's own needs."""


@dataclass(frozen=True)
class ConversionOptions:
    """The choices that a user has.

    Attributes:
        dtype: fp32, bf16 or fp16 for the transformer; None keeps the source's. The VQGAN keeps its
            own dtype, and optimizer state is always in fp32.
        shards: Number of files (meta only); None: as few as the QK-norms allow.
        tokenizer_folder: Ours or Meta's; None takes the source's own.
        optimizer: Whether to keep optimizer state where source and format have it.
        ema: Whether to write the moving average of the weights as the weights.
        shard_bytes: Largest size of a file of tensors (hf only).
        base: Where the base weights of an adapter are; None: where they were when it was trained.
    """

    dtype: str | None = None
    shards: int | None = None
    tokenizer_folder: str | Path | None = None
    optimizer: bool = True
    ema: bool = False
    shard_bytes: int = SHARD_BYTES
    base: str | Path | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write.

    Attributes:
        reader: The opened source.
        destination: The folder to be written.
        to: The format to be written, one of ``FORMATS``.
        dtypes: The dtypes of the transformer's weights.
        parameters: Number of the transformer's parameters.
        optimizer: A sentence that says what happens to optimizer state.
        files: Names and sizes of the files that hold the transformer's tensors.
        tokenizer_bytes: Size of the tokenizer's files.
        free_bytes: Free space on the destination's disk.
        largest_bytes: Size of the largest tensor; a conversion holds a few of this size in memory.
    """

    reader: CheckpointReader
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
        """Disk space that the conversion needs."""
        return sum(self.files.values()) + self.tokenizer_bytes + SPARE_BYTES

    def check_disk(self) -> None:
        """Refuse a destination whose disk is too full.

        Raises:
            CheckpointError: The files do not fit.
        """
        if self.free_bytes < self.total_bytes:
            raise CheckpointError(
                str(self.destination),
                f"disk full: {self.free_bytes:,} bytes are free, {self.total_bytes:,} are needed",
                "Free space, or give another destination",
            )

    def text(self) -> str:
        """The lines that ``--dry-run`` prints."""
        reader, dims = self.reader, self.reader.dimensions
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        lines = [
            f"{reader.folder} ({reader.format}, step {reader.step:,}) -> "
            f"{self.destination} ({self.to})",
            f"{self.parameters:,} parameters in {names}: {dims.num_layers} layers, hidden "
            f"{dims.hidden_size}, feed-forward {dims.ffn_hidden_size}, "
            f"{dims.num_attention_heads} heads, {dims.num_query_groups} key/value heads, "
            f"{dims.q_norm_groups} QK-norm groups, norm order {reader.model.norm_order}, "
            f"vocabulary {dims.vocab_size}",
            self.optimizer,
            *(f"{size_bytes:>16,} bytes  {file}" for file, size_bytes in self.files.items()),
            f"{self.total_bytes:>16,} bytes needed on disk, {self.free_bytes:,} are free",
            f"{3 * self.largest_bytes:>16,} bytes of memory, about, on top of the interpreter's",
        ]
        return "\n".join(lines)


def plan_conversion(
    source: str | Path, destination: str | Path, to: str, **options: Any
) -> ConversionPlan:
    """Find out what ``convert`` would write, without leaving anything on the disk.

    Args and Raises: as for ``convert``.
    """
    destination, chosen = Path(destination), ConversionOptions(**options)
    check_conversion_options(to, chosen, destination)
    reader = open_checkpoint(source, ema=chosen.ema, base=chosen.base)
    check_destination(source, reader, destination)
    with tempfile.TemporaryDirectory() as scratch:
        target = make_target(reader, to, chosen, Path(scratch))
        writer = load_format(to).Writer(target)
        return make_plan(reader, target, writer, destination, to, ema=chosen.ema)


def check_conversion_options(to: str, options: ConversionOptions, destination: Path) -> None:
    """Refuse options that do not fit, before anything is opened.

    Raises:
        ConfigError: The format is unknown, or the number of shards does not fit.
        CheckpointError: The destination exists.
    """
    shards = options.shards
    if to not in FORMATS:
        raise ConfigError(f"--to {to}", "Unknown format", f"Use one of {', '.join(FORMATS)}")
    if shards is not None and (to != "meta" or shards < 1):
        what = "is below 1" if shards < 1 else f"is for --to meta, and this is --to {to}"
        raise ConfigError(f"--shards {shards}", what, "Leave it out, or give 1 or more with meta")
    check_name("the destination", destination, ConfigError)
    if os.path.lexists(destination):
        what = "is a link" if destination.is_symlink() else "already exists"
        raise CheckpointError(str(destination), what, "Give a new folder, or remove this one first")


def check_destination(source: str | Path, reader: CheckpointReader, destination: Path) -> None:
    """Refuse a destination that cannot be written, or that would become a part of the source.

    Raises:
        CheckpointError: It names the destination.
    """
    for folder in (Path(source).resolve(), reader.folder.resolve()):
        if folder in destination.resolve().parents:
            what = f"lies inside {folder}, which is to be converted"
            raise CheckpointError(str(destination), what, "Give a folder beside it")
    check_output_folder("the destination", destination, CheckpointError)


def make_target(
    reader: CheckpointReader, to: str, options: ConversionOptions, scratch: Path
) -> Target:
    """Decide what the writer gets: dtypes, tokenizer and whether optimizer state comes along.

    Args:
        reader: The opened source.
        to: The format to be written.
        options: The user's choices.
        scratch: A folder for tokenizer files that have to be put together.

    Raises:
        CheckpointError, DataError: The tokenizer cannot be used.
    """
    tokenizer = open_tokenizer(reader, options.tokenizer_folder, scratch / "tokenizer")
    dtype = DTYPES[options.dtype] if options.dtype else None
    holds, rows = load_format(to).Writer.holds, list(tensor_rows(reader.dimensions))
    return Target(
        model=reader.model,
        dimensions=reader.dimensions,
        dtypes={row.key: dtype or reader.dtype(row) for row in rows},
        step=reader.step,
        tokenizer=tokenizer,
        origin=f"{reader.folder}{' (EMA of the weights)' if options.ema else ''}",
        shards=options.shards,
        shard_bytes=options.shard_bytes,
        has_optimizer=options.optimizer and reader.has_optimizer and _can_hold(reader, to),
        config=reader.config,
        data=reader.data,
        skipped_steps=reader.skipped_steps,
        conversations=reader.conversations,
        moments={row.key: tuple(p for p in reader.moments(row) if p in holds) for row in rows},
        ema_updates=reader.ema_updates,
    )


def _can_hold(reader: CheckpointReader, to: str) -> bool:
    """Whether a format can store all that an optimizer needs, which the average is not."""
    holds = {*load_format(to).Writer.holds, AVERAGE}
    return len(holds) > 1 and all(
        holds.issuperset(reader.moments(row)) for row in tensor_rows(reader.dimensions)
    )


def make_plan(
    reader: CheckpointReader,
    target: Target,
    writer: CheckpointWriter,
    destination: Path,
    to: str,
    *,
    ema: bool = False,
) -> ConversionPlan:
    """Add up what a conversion will write and need."""

    def largest_bytes(row: TensorRow) -> int:
        """Of a row as it is read or as it is written, whichever is wider."""
        itemsize = max(target.dtype(row).itemsize, reader.dtype(row).itemsize)
        return element_count(row.shape) * itemsize

    existing = destination.absolute().parent
    while not existing.is_dir():
        existing = existing.parent
    tokenizer_files = (tokenizer_file(target.tokenizer.folder, n) for n in FINGERPRINTED_FILES)
    return ConversionPlan(
        reader=reader,
        destination=destination,
        to=to,
        dtypes=tuple(dict.fromkeys(target.dtypes.values())),
        parameters=sum(element_count(row.shape) for row in target.weights),
        optimizer=_optimizer_sentence(reader, target, to, ema),
        files=writer.files(),
        tokenizer_bytes=sum(path.stat().st_size for path in tokenizer_files if path.is_file()),
        free_bytes=shutil.disk_usage(existing).free,
        largest_bytes=max(largest_bytes(row) for row in target.rows),
    )


def _optimizer_sentence(reader: CheckpointReader, target: Target, to: str, ema: bool) -> str:
    if ema:
        updates = f"{reader.ema_updates:,} update{'s' if reader.ema_updates > 1 else ''}"
        return f"The weights are their EMA after {updates}. Optimizer state omitted."
    average = "; the EMA of the weights omitted (--ema writes it as the weights)"
    if target.keeps_average:
        average = ", and the EMA of the weights with it"
    return f"{_state_sentence(reader, target, to)}{average if reader.ema_updates else ''}."


def _state_sentence(reader: CheckpointReader, target: Target, to: str) -> str:
    if target.has_optimizer:
        return "Optimizer state kept"
    if reader.format == "adapter":
        return "Optimizer state omitted: an adapter has none for the whole weights"
    if not reader.has_optimizer:
        return "Optimizer state omitted: the source has none"
    if _can_hold(reader, to):
        return "Optimizer state omitted, as requested"
    return f"Optimizer state omitted: the {FORMATS[to]} format cannot store it"
