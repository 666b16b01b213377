"""How much a run has read of each source up to a step."""

from collections.abc import Mapping
from typing import Any

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.tokenizer.folder import load_tokenizer


def open_recorded(config: Config, state: Mapping[str, Any]) -> BatchReader:
    """The data of a run, as its newest checkpoint left it.

    Args:
        config: The run's.
        state: ``state.json`` of the checkpoint; empty without one.

    Raises:
        ChameleonError: The token files or the tokenizer cannot be read, or do not fit the run.
    """
    tokenizer = load_tokenizer(config.tokenizer.path, images=False)
    order = state.get("data")
    return BatchReader(config, tokenizer, order, state["step"] if order else 0)


def tokens_seen(reader: BatchReader, steps: int) -> dict[str, tuple[float, float]]:
    """Tokens, and how many times all documents were read, of each source.

    Whole packing blocks are exact; of a block that is read in part, each source counts in
    proportion.

    Args:
        reader: Of the run.
        steps: How many steps are done, at least 1.
    """
    last = min(reader.history.first_sample(steps), reader.samples) - 1
    mixture = reader.mixture(last)
    place = mixture.locate(last)
    share = (place.sequence + 1) / place.phase.sequences
    found = {}
    for key, cursor in place.phase.cursors.items():
        done: float = cursor.base - cursor.backlog_tokens
        if key in place.phase.rates:
            before = place.phase.position(key, place.block)
            done += before + share * (place.phase.position(key, place.block + 1) - before)
        found[key] = (max(0.0, done), max(0.0, done) / max(cursor.stream.corpus.tokens, 1))
    return found
