"""Find out which format a checkpoint has, and open it with its tokenizer."""

from pathlib import Path

from megatron_chameleon.checkpoint.formats import FORMATS, load_format
from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.formats.meta_tokenizer import (
    META_TEXT_FILE,
    read_meta_tokenizer,
)
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Open a checkpoint of any format.

    Args:
        path: A training checkpoint, a ``checkpoints`` or run folder, a Hugging Face folder, or one
            of Meta's or of DeepSpeed's.

    Raises:
        CheckpointError: The path is none of these, or the checkpoint is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file, and checkpoints are folders" if folder.exists() else "no such folder"
        raise CheckpointError(str(path), what, "Give a checkpoint or a run folder")
    for name in FORMATS:
        module = load_format(name)
        if module.recognise(folder):
            return module.Reader(folder)
    raise CheckpointError(
        str(path),
        "has no state.json or step_... folder (megatron), no config.json (hf), no params.json "
        "(meta) and no latest or ..._states.pt (deepspeed)",
        "Give a checkpoint of one of these formats",
    )


def open_tokenizer(
    reader: CheckpointReader, folder: str | Path | None, scratch: Path, device: str = "cpu"
) -> Tokenizer:
    """Open the tokenizer that a checkpoint was trained with.

    Args:
        reader: The checkpoint.
        folder: A tokenizer folder, ours or Meta's; None takes the checkpoint's own.
        scratch: A folder that may be created, for files that have to be put together.
        device: The device on which the image tokenizer runs.

    Raises:
        DataError: The folder is not a whole tokenizer.
        CheckpointError: The checkpoint was trained with another tokenizer.
    """
    if folder is None:
        path = reader.tokenizer_folder(scratch)
    elif (Path(folder) / META_TEXT_FILE).is_file():
        path = read_meta_tokenizer(Path(folder), scratch)
    else:
        path = Path(folder)
    tokenizer = load_tokenizer(path, device=device)
    if reader.fingerprint is not None:
        check_fingerprint(tokenizer, reader.fingerprint, str(reader.folder))
    if tokenizer.vocabulary.size != reader.dimensions.vocab_size:
        raise CheckpointError(
            str(folder or path),
            f"has {tokenizer.vocabulary.size} tokens, the checkpoint has "
            f"{reader.dimensions.vocab_size}",
            "Give the tokenizer of the run with --tokenizer",
        )
    return tokenizer


def check_fingerprint(tokenizer: Tokenizer, expected: str, checkpoint: str) -> None:
    """Refuse a tokenizer whose ids mean something else than those the model was trained on.

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
