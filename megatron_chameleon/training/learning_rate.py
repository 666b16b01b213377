"""The learning rate of a run, whose history says where a decay by tokens or stage begins.

Try it: ``run_learning_rate(config, reader.history).at(step)``
"""

import math

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.mixture.mixture_history import MixtureHistory, stage2_begin
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.schedules.learning_rate import LearningRate


def run_learning_rate(config: Config, history: MixtureHistory) -> LearningRate:
    """The learning rate of every step of a run.

    Args:
        config: A checked one.
        history: What the run has done so far, and does next: ``BatchReader.history``.

    Raises:
        ConfigError: The decay that the config describes does not fit into the run.
    """
    values, decay_steps = config.optimizer, None
    if values.lr_decay_style == "wsd" and values.lr_wsd_decay_on is not None:
        decay_steps = _stage2_steps(config, history)
    elif values.lr_decay_style == "wsd" and values.lr_wsd_decay_tokens is not None:
        decay_steps = _steps_of_tokens(config, history, values.lr_wsd_decay_tokens)
    return LearningRate.of(config, decay_steps, history.lr_warmup_begin)


def _stage2_steps(config: Config, history: MixtureHistory) -> int:
    key, steps, warmup = "lr_wsd_decay_on", config.training.steps, config.optimizer.lr_warmup_steps
    begin = stage2_begin(history, steps)
    if begin is None or steps - begin < 2:
        what = f"stage 2 has {steps - (steps if begin is None else begin)} of the {steps:,} steps, "
        border = "stage1_tokens" if config.data.stage1_tokens is not None else "stage1_fraction"
        remedy = f"Lower data.{border}, or place the decay by optimizer.lr_wsd_decay_steps"
        raise ConfigError(f"optimizer.{key}", f"{what}and a decay needs at least 2", remedy)
    if begin < warmup:
        what = f"stage 2 begins after step {begin:,}, within the warm-up of {warmup:,} steps"
        remedy = f"Let it begin later, or set optimizer.lr_warmup_steps to at most {begin}"
        raise ConfigError(f"optimizer.{key}", what, remedy)
    return steps - begin


def _steps_of_tokens(config: Config, history: MixtureHistory, tokens: int) -> int:
    key, steps = "lr_wsd_decay_tokens", config.training.steps
    samples, length = history.first_sample(steps), config.model.seq_length
    most = (samples - history.first_sample(config.optimizer.lr_warmup_steps)) * length
    if tokens > most:
        what = f"{tokens:,} is more than the {most:,} tokens that the run reads after its warm-up"
        raise ConfigError(f"optimizer.{key}", what, f"Use at most {most}")
    decay_steps = steps - history.steps_before(samples - math.ceil(tokens / length))
    if decay_steps < 2:
        least = (samples - history.first_sample(steps - 2)) * length
        what = f"{tokens:,} is less than the {least:,} tokens of two steps, which a decay needs"
        raise ConfigError(f"optimizer.{key}", what, f"Use at least {least}")
    return decay_steps
