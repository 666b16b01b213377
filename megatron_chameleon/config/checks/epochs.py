"""Check the length of a run where ``training.epochs`` says it."""

from collections.abc import Iterator

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError

UNKNOWN_STEPS = 10**9
"""Stands for the number of steps as long as nobody has read the data that decide it."""


def check_epochs(config: Config) -> Iterator[ConfigError]:
    """Problems of ``training.epochs`` that show without the data."""
    training, data = config.training, config.data
    if training.epochs is None:
        if training.steps == 0:
            what = "0, and training.epochs does not say how long the run is either"
            yield ConfigError("training.steps", what, "Set one of them")
        return
    if data.stage2:
        what = f"{training.epochs:g} passes over stage 1 leave no place for the sources of stage 2"
        remedy = "Remove data.stage2, or set training.steps in place of training.epochs"
        yield ConfigError("training.epochs", what, remedy)


def known_steps(config: Config) -> int:
    """The number of steps of a run; ``UNKNOWN_STEPS`` before the data have been read."""
    return config.training.steps or UNKNOWN_STEPS
