"""How much a run has read of each source up to a step."""

from collections.abc import Mapping
from typing import Any

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.mixture.phases import Phase
from megatron_chameleon.tokenizer.folder import load_tokenizer


def tokens_seen(
    config: Config, state: Mapping[str, Any], steps: int
) -> dict[str, tuple[float, float]]:
    """Tokens, and times that all documents were read, of each source.

    Whole packing blocks are exact; of a block that is read in part, each source counts in
    proportion.

    Args:
        config: The run's.
        state: ``state.json`` of its newest checkpoint; empty without one.
        steps: How many steps are done.

    Raises:
        ChameleonError: The token files or the tokenizer cannot be read, or do not fit the run.
    """
    tokenizer = load_tokenizer(config.tokenizer.path, images=False)
    order = state.get("data")
    reader = BatchReader(config, tokenizer, order, state["step"] if order else 0)
    history = reader.history
    samples = history.first_sample(steps)
    tokens: dict[str, float] = {}
    size: dict[str, int] = {}
    ends = [*(entry.first_sample for entry in history.entries[1:]), samples]
    for entry, end in zip(history.entries, ends, strict=True):
        end = min(end, samples)
        if entry.first_sample >= end:
            continue
        mixture = reader.mixture(entry.first_sample)
        for phase in mixture.phases(end):
            stop = end if phase.end_sample is None else min(end, phase.end_sample)
            for key in phase.rates:
                tokens[key] = tokens.get(key, 0.0) + _taken(phase, key, stop - phase.first_sample)
                size[key] = mixture.cursors[key].stream.corpus.tokens
    return {key: (count, count / max(size[key], 1)) for key, count in tokens.items()}


def _taken(phase: Phase, key: str, samples: int) -> float:
    """Tokens of a source in the first samples of a phase."""
    block, rest = divmod(samples, phase.sequences)
    before = phase.position(key, block)
    return before + (phase.position(key, block + 1) - before) * rest / phase.sequences
