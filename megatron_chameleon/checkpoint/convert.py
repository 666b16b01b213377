"""Convert a training checkpoint into another format, whole or not at all.

    chameleon convert runs/digits exported/digits --to hf --dtype bf16

The tensors stream from the checkpoint into the new files one by one; afterwards the files are read
back, mapped back to megatron-core's layout and compared bit for bit with what was meant to be
written.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_chameleon.checkpoint.folders import find_checkpoint
from megatron_chameleon.checkpoint.formats import hf
from megatron_chameleon.checkpoint.names import Piece
from megatron_chameleon.checkpoint.reader import CheckpointReader
from megatron_chameleon.errors import CheckpointError, ConfigError
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    source: Path
    destination: Path
    step: int
    parameters: int
    """Of the transformer and the VQGAN's encoder, HF's repeated QK-norms included."""
    total_bytes: int
    seconds: float
    verified: bool


def load_matching_tokenizer(
    reader: CheckpointReader, folder: str | Path | None, device: str = "cpu"
) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    Args:
        reader: The checkpoint.
        folder: Where the tokenizer lies; None takes ``tokenizer.path`` of its config.
        device: Where the image tokenizer runs.

    Raises:
        DataError: The folder is no whole tokenizer.
        CheckpointError: It is another tokenizer than the checkpoint's.
    """
    path = Path(folder or reader.config.tokenizer.path)
    if folder is None and not path.is_dir():
        raise CheckpointError(
            str(reader.folder / "config.yaml"),
            f"its tokenizer.path {str(path)!r} is no folder seen from {Path.cwd()}",
            "Give the folder with --tokenizer",
        )
    tokenizer = load_tokenizer(path, device=device)
    check_fingerprint(tokenizer, str(reader.state.get("tokenizer_fingerprint")), str(reader.folder))
    if tokenizer.vocabulary.size != reader.state["vocab_size"]:
        raise CheckpointError(
            str(path),
            f"has {tokenizer.vocabulary.size} tokens, the checkpoint {reader.state['vocab_size']}",
            "Give the tokenizer of the run with --tokenizer",
        )
    return tokenizer


def check_fingerprint(tokenizer: Tokenizer, expected: str, checkpoint: str) -> None:
    """Refuse a tokenizer whose ids mean something else to the model.

    Raises:
        CheckpointError: The fingerprints differ.
    """
    if tokenizer.fingerprint != expected:
        raise CheckpointError(
            str(tokenizer.folder),
            f"its fingerprint is {tokenizer.fingerprint[:12]}, {checkpoint} was trained with "
            f"{expected[:12]}",
            "Give the tokenizer of the run with --tokenizer",
        )


def convert_to_hf(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    tokenizer_folder: str | Path | None = None,
    verify: bool = True,
    shard_bytes: int = hf.SHARD_BYTES,
    progress: Callable[[str], None] = lambda line: None,
) -> Conversion:
    """Write a Hugging Face folder.

    Args:
        source: A checkpoint, ``checkpoints`` or run folder; of the latter two the newest whole
            step.
        destination: A folder that does not exist; it appears when everything is written and
            verified.
        dtype: fp32 or bf16 for the transformer; None keeps the checkpoint's. The VQGAN keeps its
            own.
        tokenizer_folder: None takes the path in the checkpoint's config.
        verify: Read everything back and compare.
        shard_bytes: Largest size of a file of tensors.
        progress: Gets a line after each layer.

    Raises:
        CheckpointError: The source cannot be converted, or the destination exists or cannot be
            written.
        DataError: The tokenizer folder cannot be used.
    """
    started = time.monotonic()
    destination = Path(destination)
    if destination.exists():
        raise CheckpointError(
            str(destination), "already exists", "Give a new folder, or remove this one first"
        )
    reader = CheckpointReader(find_checkpoint(source))
    found = hf.checked_pieces(reader)
    tokenizer = load_matching_tokenizer(reader, tokenizer_folder)
    target = DTYPES[dtype] if dtype else reader.tensors[found[0].megatron_name].dtype
    partial = destination.with_name(f".{destination.name}.partial.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        written = _write_hf(partial, reader, found, tokenizer, target, shard_bytes, progress)
        if verify:
            hf.verify_weights(partial, found, hf.encoder_tensors(tokenizer), written)
        partial.replace(destination)
    except OSError as error:
        raise CheckpointError(
            str(destination), f"cannot be written ({error})", "Free space, or give another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Conversion(
        source=reader.folder,
        destination=destination,
        step=reader.state["step"],
        parameters=written.parameters,
        total_bytes=written.total_bytes,
        seconds=time.monotonic() - started,
        verified=verify,
    )


def _write_hf(
    folder: Path,
    reader: CheckpointReader,
    found: list[Piece],
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    shard_bytes: int,
    progress: Callable[[str], None],
) -> hf.Written:
    from transformers import GenerationConfig

    assert tokenizer.image is not None
    num_layers, vocabulary = reader.config.model.num_layers, tokenizer.vocabulary
    last_in_layer = [piece for piece in found if piece.layer is not None][-1].megatron_name
    started = time.monotonic()

    def read(piece: Piece) -> torch.Tensor:
        return reader.read(piece.megatron_name, piece.layer).to(dtype)

    def report(piece: Piece) -> None:
        if piece.layer is not None and piece.megatron_name == last_in_layer:
            done, seconds = piece.layer + 1, time.monotonic() - started
            left_seconds = seconds / done * (num_layers - done)
            progress(f"layer {done}/{num_layers} · {seconds:.1f} s · {left_seconds:.0f} s left")

    written = hf.write_weights(
        folder, found, read, hf.encoder_tensors(tokenizer), shard_bytes, report
    )
    config = hf.build_config(reader.config.model, vocabulary, tokenizer.image.config, dtype)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        pad_token_id=vocabulary.pad,
    ).save_pretrained(folder)
    hf.write_tokenizer(folder, tokenizer)
    origin = {
        "format": hf.EXPORT_FORMAT,
        "source": str(reader.folder),
        "step": reader.state["step"],
        "vocab_size": reader.state["vocab_size"],
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "parameters": written.parameters,
    }
    (folder / hf.EXPORT_FILE).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    return written


def check_format(name: str) -> None:
    """Refuse a target format that this version cannot write.

    Raises:
        ConfigError: It names the formats that there are.
    """
    if name != "hf":
        raise ConfigError(
            f"--to {name}",
            "this format is not available in this version, which writes hf",
            "Use --to hf",
        )
