"""Open the data of a run, from its first step or where a checkpoint stopped reading."""

from pathlib import Path

from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.checkpoint.state.line import list_line
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.training.run.folder import checkpoints_folder


def open_reader(config: Config, tokenizer: Tokenizer, checkpoint: Path | None) -> BatchReader:
    """The data of a run that begins, or that is resumed from a checkpoint.

    Args:
        config: A checked config.
        tokenizer: The one that the token files were written with.
        checkpoint: A whole one, or None.

    Raises:
        ChameleonError: The data is missing, or does not continue what the checkpoint has read.
    """
    state = load_state(checkpoint) if checkpoint is not None else {}
    if not state or state.get("optimizer") is False:  # bare weights: a new run begins
        return BatchReader(config, tokenizer)
    if state.get("data") is None and state.get("training_config") is False:
        # Another program trained it: read as if this config had been used from the first step.
        return BatchReader(config, tokenizer)
    if state.get("data") is None:
        what = "it does not record what the run has read, because an earlier version wrote it"
        remedy = "Resume with that version, or train into another logging.run_dir"
        raise CheckpointError(str(checkpoint), what, remedy)
    return BatchReader(config, tokenizer, state["data"], state["step"])


def open_newest(config: Config, tokenizer: Tokenizer) -> BatchReader:
    """The data of a run as its next start would read it.

    If the run has checkpoints, the newest one says which mixtures it has used so far.

    Args:
        config: A checked config.
        tokenizer: The one that the token files were written with.
    """
    found = list_line(checkpoints_folder(config))
    return open_reader(config, tokenizer, found[-1] if found else None)
