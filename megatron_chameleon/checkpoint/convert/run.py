"""Convert a checkpoint of one format into another, whole or not at all.

    chameleon convert runs/digits exported/digits --to hf --dtype bf16

Any reader joins any writer (``formats/``). The tensors stream from one to the other row by row, so
that the conversion needs memory for a few tensors and not for the model. Afterwards the new files
are opened with the new format's reader, mapped back to megatron-core's form and compared with what
was meant to be written. Checksums of the source's files are checked, and those of the new files
are written.
"""

import errno
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.convert.model_card import CARD_FILE, model_card
from megatron_chameleon.checkpoint.convert.partial_folder import flushing, partial_folder, sync
from megatron_chameleon.checkpoint.convert.plan import (
    ConversionOptions,
    check_conversion_options,
    check_destination,
    make_plan,
    make_target,
)
from megatron_chameleon.checkpoint.convert.streaming import (
    Progress,
    TensorStream,
    checksum,
    read_tensors_ahead,
)
from megatron_chameleon.checkpoint.formats import load_format
from megatron_chameleon.checkpoint.formats.base import CheckpointReader, CheckpointWriter, Target
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.checkpoint.state.integrity import check_files, write_sums
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import write_text


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did."""

    source: Path
    destination: Path
    step: int
    parameters: int
    """Number of the transformer's parameters."""
    total_bytes: int
    """Size of the files that hold the transformer's tensors."""
    optimizer: str
    """A sentence that says what happened to optimizer state."""
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
        source: A checkpoint of any format; in a ``checkpoints`` or run folder, its newest whole
            step.
        destination: A folder that does not exist. It appears when everything is written and
            verified.
        to: One of ``FORMATS``.
        verify: Check the source's files where they have checksums, read everything back and
            compare it, and write ``SHA256SUMS``.
        progress: Called with a line after each layer.
        options: Those of ``ConversionOptions``.

    Raises:
        CheckpointError: The source cannot be converted, or the destination exists or cannot be
            written.
        ConfigError: An option does not fit.
        DataError: The tokenizer folder cannot be used.
    """
    started = time.monotonic()
    destination, chosen = Path(destination), ConversionOptions(**options)
    check_conversion_options(to, chosen, destination)
    reader = open_checkpoint(source, ema=chosen.ema, base=chosen.base)
    check_destination(source, reader, destination)
    if verify:
        _check_source(reader, progress)
    with partial_folder(destination, progress) as partial:
        target = make_target(reader, to, chosen, partial)
        writer = load_format(to).Writer(target)  # refuses what the format cannot hold
        plan = make_plan(reader, target, writer, destination, to, ema=chosen.ema)
        plan.check_disk()
        stream, new = TensorStream(reader, target, progress, verify), partial / "new"
        _write(writer, new, stream, model_card(target, destination.name) if to == "hf" else "")
        seconds = time.monotonic() - started
        if verify:
            _verify_written(load_format(to).Reader(new), target, stream.checksums, partial)
            write_sums(new, {})
        sync(new)
        new.replace(destination)
    return ConversionResult(
        source=reader.folder,
        destination=destination,
        step=reader.step,
        parameters=plan.parameters,
        optimizer=plan.optimizer,
        total_bytes=sum(plan.files.values()),
        seconds=seconds,
        verify_seconds=time.monotonic() - started - seconds,
        verified=verify,
        largest_change=stream.largest_change,
    )


def _check_source(reader: CheckpointReader, progress: Progress) -> None:
    files = check_files(reader.folder)
    if files:
        progress(f"{files} files of {reader.folder} match their checksums (SHA256SUMS)")


def _write(writer: CheckpointWriter, folder: Path, stream: TensorStream, card: str) -> None:
    folder.mkdir()
    with flushing(folder):
        try:
            writer.write(folder, iter(stream))
        except RuntimeError as error:
            if "inline_container" not in str(error):
                raise
            # torch's zip writer hides the reason
            number = errno.EIO if shutil.disk_usage(folder).free > 2**22 else errno.ENOSPC
            raise OSError(number, os.strerror(number)) from error
        if card:
            write_text(folder / CARD_FILE, card, CheckpointError)


def _verify_written(
    written: CheckpointReader, target: Target, checksums: dict[str, str], scratch: Path
) -> None:
    """Read the new files and compare settings, every tensor and the tokenizer.

    Args:
        written: A reader of the new files.
        target: What was to be written.
        checksums: The checksum of each tensor when it was written, by its row's key.
        scratch: A folder for tokenizer files that have to be put together.

    Raises:
        CheckpointError: Something differs.
    """
    for name, new, old in (
        ("the model's settings", written.model, target.model),
        ("the tensors' sizes", written.dimensions, target.dimensions),
    ):
        if new != old:
            what = f"{name} differ after writing: {new}, was {old}"
            raise CheckpointError(str(written.folder), what, "Report this bug")
    for row, found in read_tensors_ahead(target.rows, lambda row: checksum(written.read(row))):
        expected = checksums[row.key]
        if found != expected:
            raise CheckpointError(
                str(written.folder),
                f"{row.key} differs after writing (sha256 {found[:12]}, was {expected[:12]})",
                "Convert again, and check the disk if it differs again",
            )
    tokenizer = open_tokenizer(written, None, scratch / "written")
    assert tokenizer.fingerprint == target.tokenizer.fingerprint
