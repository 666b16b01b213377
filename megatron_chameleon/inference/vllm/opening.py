"""Open an exported folder for ``VllmEngine``."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.inference.vllm.arguments import parse_options
from megatron_chameleon.inference.vllm.engine import VllmEngine
from megatron_chameleon.inference.vllm.installed import check_installed
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE
from megatron_chameleon.tokenizer.folder import Tokenizer

EXPORTED = "exported"
"""Where the demo's run folder has its export."""


@dataclass(frozen=True)
class Exported:
    """A model for vLLM; the engine is not started yet."""

    engine: VllmEngine
    tokenizer: Tokenizer
    reader: CheckpointReader
    version: str
    """Of vLLM."""


def open_exported(path: str | Path, device: str, options: Sequence[str]) -> Exported:
    """Open a folder that ``chameleon convert --to hf`` wrote. Its weights are not read here.

    Args:
        path: The folder.
        device: Of the image tokenizer, which runs in this process.
        options: ``NAME=VALUE`` texts for vLLM.

    Raises:
        ConfigError: vLLM is missing or has another version, or an option is malformed.
        CheckpointError: The folder has another format, or no vocabulary of ours.
        DataError: A file of the tokenizer is damaged.
    """
    version = check_installed()
    parsed = parse_options(options)
    reader = open_checkpoint(path)
    if reader.format != "hf" or not (reader.folder / VOCABULARY_FILE).is_file():
        raise _not_exported(path, reader)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = open_tokenizer(reader, None, Path(scratch), device)
    context_tokens = reader.model.seq_length
    engine = VllmEngine(reader.folder, tokenizer.image_form, context_tokens, parsed)
    return Exported(engine, tokenizer, reader, version)


def _not_exported(path: str | Path, reader: CheckpointReader) -> CheckpointError:
    if reader.format == "hf":
        what = f"has no {VOCABULARY_FILE}, so `chameleon convert` did not write it"
    else:
        what = "vLLM reads exported folders, and this is none"
    existing = Path(path) / EXPORTED
    if (existing / VOCABULARY_FILE).is_file():
        return CheckpointError(str(path), what, f"Give {existing}, which is one")
    remedy = f"Run `chameleon convert {path} FOLDER --to hf` and give that folder"
    return CheckpointError(str(path), what, remedy)
