"""How many tokens a run has trained on: those that counted in the loss of a step with an update.

``consumed_tokens`` counts every token that was read: padding, prompts and the first token of each
document as well, and those of skipped steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.errors import ChameleonError, CheckpointError

MOST_COUNTED = 512
"""If a run has read more samples, the estimate counts the tokens of this many."""
_PLACES = 16
"""So many packing blocks at most are packed again for it."""


@dataclass
class TrainedTokens:
    """The count of a run, on every rank."""

    total: int | None = 0
    """Tokens up to the last step; None if nobody knows."""
    note: str = ""
    """How it was found if no checkpoint had it, for the user; else empty."""

    def add(self, tokens: int, *, is_skipped: bool) -> None:
        """Count a step.

        Args:
            tokens: That counted in its loss.
            is_skipped: Whether its update was left out.
        """
        if self.total is not None and not is_skipped:
            self.total += tokens


def find_trained_tokens(state: Mapping[str, Any], reader: BatchReader) -> TrainedTokens:
    """The count of a run that begins, or that continues from a checkpoint.

    Checkpoints of earlier versions, and those that another program trained, have no count. It is
    then estimated from samples that are spread over what the run has read.

    Args:
        state: The ``state.json`` of the checkpoint; empty for a run that begins.
        reader: Of the run.

    Raises:
        CheckpointError: The count in the state is damaged.
    """
    if not state or state.get("optimizer") is False:  # bare weights: a new run begins
        return TrainedTokens()
    saved = state.get("trained_tokens")
    if type(saved) is int and saved >= 0:
        return TrainedTokens(saved)
    if saved is not None:
        what = f"trained_tokens in its state.json is {saved!r:.99}, which is not a number of tokens"
        raise CheckpointError(f"the checkpoint of step {state['step']}", what, "Use another one")
    return _estimate(reader, state["step"])


def _estimate(reader: BatchReader, steps_done: int) -> TrainedTokens:
    samples = reader.history.first_sample(steps_done)
    chosen = list(range(samples))
    if samples > MOST_COUNTED:
        each = MOST_COUNTED // _PLACES
        firsts = np.linspace(0, samples - each, _PLACES).astype(int)
        chosen = [first + i for first in firsts.tolist() for i in range(each)]
    try:
        counts = [int(reader.sample(index).in_loss.sum()) for index in chosen]
    except ChameleonError as error:
        what = f"trained_tokens is null: the checkpoint lacks it, and {error.where}: {error.what}"
        return TrainedTokens(None, what)
    total = round(sum(counts) * samples / max(len(chosen), 1))
    consumed = samples * reader.config.model.seq_length
    how = f"counted in its {samples:,} samples"
    if samples > MOST_COUNTED:
        how = f"estimated from {len(chosen)} of its {samples:,} samples"
    share = f"{100 * total / max(consumed, 1):.1f}% of {consumed:,} consumed tokens"
    note = f"trained_tokens continues from {total:,} ({share}), {how}, because the checkpoint lacks"
    return TrainedTokens(total, f"{note} it")
