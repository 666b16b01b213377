"""Find the reference that a run has kept, to measure its checkpoints with."""

from collections.abc import Sequence
from pathlib import Path

from megatron_chameleon.checkpoint.state.folders import STATE_FILE, load_state
from megatron_chameleon.data.mixture.sources import DataSource
from megatron_chameleon.training.reference.measure import REFERENCE, missing_pairs
from megatron_chameleon.training.reference.tables import (
    REFERENCE_FILE,
    REFERENCE_FOLDER,
    Tables,
    files_digest,
    read_tables,
)


def stored_reference(
    checkpoint: Path, sources: Sequence[DataSource], seq_length: int
) -> tuple[Tables, None] | tuple[None, str]:
    """The reference's log-probabilities of the pairs of some sources.

    Args:
        checkpoint: A step folder of a run, or an exported folder inside the run folder.
        sources: Token files of pairs.
        seq_length: Longer pairs are not measured.

    Returns:
        The tables by prefix, or why there are none: one sentence for the user.

    Raises:
        CheckpointError: The state of the checkpoint is damaged.
    """
    what = "so the rewards of its answers are not measured, only their log-probabilities"
    parents = list(checkpoint.resolve().parents)[:2]
    folders = [parent / REFERENCE_FOLDER for parent in parents]
    folder = next((f for f in folders if (f / REFERENCE_FILE).is_file()), None)
    if folder is None:
        return None, f"{checkpoint}: belongs to no run that has kept a reference, {what}"
    found = read_tables(folder, files_digest(list(sources)))
    if found is None:
        names = ", ".join(source.corpus.prefix for source in sources)
        return None, f"{folder}: does not have the pairs of {names}, {what}"
    tables, digest, _ = found
    if (checkpoint / STATE_FILE).is_file():
        named = load_state(checkpoint).get(REFERENCE)
        if named != digest:
            return None, f"{checkpoint}: was not trained with the reference in {folder}, {what}"
    if missing := missing_pairs(sources, tables, seq_length):
        return None, f"{folder}: {missing}, {what}"
    return tables, None
