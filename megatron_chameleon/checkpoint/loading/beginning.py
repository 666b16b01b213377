"""The weights that a run begins with: what its config inherits from them, and whether they fit."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.formats import FORMATS
from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.formats.opening import (
    check_encoder,
    check_fingerprint,
    check_tokens,
    warn_of_lacks,
)
from megatron_chameleon.checkpoint.names.architecture import ARCHITECTURE
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import make_folder, writing
from megatron_chameleon.tokenizer.common.files import tokenizer_file
from megatron_chameleon.tokenizer.folder import FINGERPRINTED_FILES, Tokenizer

FIXED = (*ARCHITECTURE, "qk_norm_groups")
"""What the weights decide about the model. Its other settings may differ in every run."""


def inherited_settings(model: ModelConfig) -> dict[str, Any]:
    """The values that a config takes over from weights where it has none of its own.

    Args:
        model: Of the weights.

    Returns:
        Values by section and key, for ``load_config``. Dropout is a choice of each run.
    """
    names = (*FIXED, "seq_length", "init_method_std")
    return {"model": {name: getattr(model, name) for name in names}}


def keep_tokenizer(reader: CheckpointReader, destination: Path) -> None:
    """Write the tokenizer of weights to a folder, whole or not at all; nothing if it is there.

    Args:
        reader: The weights.
        destination: A tokenizer folder; those above it are created.

    Raises:
        CheckpointError: The weights come without a tokenizer, or the folder cannot be written.
    """
    if os.path.lexists(destination):
        return
    make_folder(destination.parent, CheckpointError)
    with writing(destination.parent, CheckpointError):
        place = tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}.partial-")
    partial = Path(place)
    try:
        found = reader.tokenizer_folder(partial / "made")
        warn_of_lacks(reader, found)
        with writing(partial, CheckpointError):
            new = partial / "new"
            new.mkdir()
            for name in FINGERPRINTED_FILES:
                if (file := tokenizer_file(found, name)).is_file():
                    shutil.copyfile(file, new / name)
            if not destination.exists():
                new.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_architecture(reader: CheckpointReader, config: Config) -> None:
    """Refuse a config whose model is not that of the weights.

    Raises:
        CheckpointError: It names every value that differs, in one line.
    """
    found = [
        f"model.{name}={json.dumps(stored)} (your config: {json.dumps(wanted)})"
        for name in FIXED
        for stored, wanted in [(_resolved(reader.model, name), _resolved(config.model, name))]
        if stored != wanted
    ]
    if found:
        raise CheckpointError(
            str(reader.folder),
            f"The weights have {', '.join(found)}",
            f"Remove {'it' if len(found) == 1 else 'them'} from your config, which takes over what "
            "the weights say, or give other weights",
        )


def _resolved(model: ModelConfig, name: str) -> object:
    """A setting, or the number of heads where null stands for it."""
    value = getattr(model, name)
    if value is None and name in ("num_query_groups", "qk_norm_groups"):
        return model.num_attention_heads
    return value


def check_first_weights(reader: CheckpointReader, config: Config, tokenizer: Tokenizer) -> None:
    """Refuse weights that do not fit a run.

    Args:
        reader: The weights.
        config: The run's.
        tokenizer: The run's; its image tokenizer need not be loaded.

    Raises:
        CheckpointError: The model or the tokenizer is another one.
    """
    check_architecture(reader, config)
    folder, vocab_size = reader.folder, reader.dimensions.vocab_size
    if tokenizer.vocabulary.size != vocab_size:
        what = f"has {tokenizer.vocabulary.size:,} tokens, and the weights in {folder} have "
        what += f"{vocab_size:,}"
        remedy = "Remove tokenizer.path, which takes the tokenizer of the weights, or name that one"
        raise CheckpointError(str(tokenizer.folder), what, remedy)
    if reader.fingerprint is not None:
        check_fingerprint(tokenizer, reader.fingerprint, str(folder))
    check_tokens(tokenizer, reader)
    check_encoder(tokenizer, reader)


def describe_beginning(reader: CheckpointReader, config: Config) -> str:
    """From which weights a run begins, and whether its sequences are longer than theirs."""
    kind = FORMATS.get(reader.format, reader.format)
    text = f"starts from step 0 with the weights of {reader.folder} ({kind}"
    text += f", step {reader.step:,})" if reader.step else ")"
    longest = reader.model.seq_length
    if config.model.seq_length > longest:
        text += f"; its sequences of {config.model.seq_length:,} tokens are longer than the "
        text += f"{longest:,} that the weights know, so the positions beyond are new to them"
    return text
