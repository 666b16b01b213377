"""How much of a model a run trains, in words: all of it, a part of it, or an adapter.

describe_parameters(config, vocabulary.size, vocabulary.code_token_ids)
"""

import math
from collections.abc import Sequence

import numpy as np

from megatron_chameleon.checkpoint.names.adapters import adapter_tensors
from megatron_chameleon.config.schema import Config
from megatron_chameleon.model.tuning.selection import select_trained
from megatron_chameleon.wording import counted


def describe_parameters(
    config: Config, vocab_size: int, image_ids: Sequence[int] | np.ndarray = ()
) -> str:
    """Say how many parameters a model has, and how many of them are trained.

    The parameters of an adapter count on both sides, as ``peft`` counts them.

    Args:
        config: Its sizes, patterns and adapter.
        vocab_size: Number of tokens in the vocabulary.
        image_ids: As for ``select_trained``.

    Returns:
        Such as "64,288 parameters", or "trains 3,072 of 67,360 parameters (4.56%): a LoRA adapter
        of rank 4 beside q_proj and v_proj".

    Raises:
        ConfigError: As ``select_trained`` does.
    """
    selection = select_trained(config, vocab_size, image_ids)
    trained, total, what = selection.trained_count, selection.total_count, selection.text
    if config.adapter.rank:
        added = _adapter_count(config)
        trained, total = trained + added, total + added
        what = _adapter_in_words(config)
    if trained == total:
        return f"{total:,} parameters"
    share = 100 * trained / total
    digits = 2 if share >= 0.01 else 6
    return f"trains {trained:,} of {total:,} parameters ({share:.{digits}f}%): {what}"


def _adapter_count(config: Config) -> int:
    adapter = config.adapter
    tensors = adapter_tensors(config.model, adapter.rank, adapter.target_modules, adapter.dora)
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _adapter_in_words(config: Config) -> str:
    adapter = config.adapter
    kind, names = "DoRA" if adapter.dora else "LoRA", sorted(set(adapter.target_modules))
    beside = counted(len(names), "linear layer") + " of each transformer layer"
    if len(names) <= 3:
        beside = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"a {kind} adapter of rank {adapter.rank} beside {beside}"
