"""Open the data of a run: as it begins, or as it goes on after a checkpoint."""

from pathlib import Path

from megatron_chameleon.checkpoint.state.folders import list_checkpoints, load_state
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.training.run.folder import checkpoints_folder


def open_reader(config: Config, tokenizer: Tokenizer, checkpoint: Path | None) -> BatchReader:
    """The data of a run that begins, or goes on after a checkpoint.

    Args:
        config: A checked config.
        tokenizer: Of the token files.
        checkpoint: A whole one, or None.

    Raises:
        ChameleonError: The data is not there, or does not go on from the checkpoint.
    """
    state = load_state(checkpoint) if checkpoint is not None else {}
    if not state or state.get("optimizer") is False:  # weights alone: the run begins
        return BatchReader(config, tokenizer)
    if state.get("data") is None and state.get("training_config") is False:
        return BatchReader(config, tokenizer)  # others' run: this config, as if from its first step
    if state.get("data") is None:
        what = "it does not say what the run has read: an earlier version wrote it"
        remedy = "Resume with that version, or train into another logging.run_dir"
        raise CheckpointError(str(checkpoint), what, remedy)
    return BatchReader(config, tokenizer, state["data"], state["step"])


def open_newest(config: Config, tokenizer: Tokenizer) -> BatchReader:
    """The data of a run as its next start would read it: with the mixtures of its newest
    checkpoint, if it has one."""
    found = list_checkpoints(checkpoints_folder(config))
    return open_reader(config, tokenizer, found[-1] if found else None)
