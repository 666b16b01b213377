"""The length of a run that ``training.epochs`` gives: where its last epoch ends, in steps.

It follows from how the documents are packed, so it is found by planning the phases of the mixture
to their end. Nothing is packed for that but a few blocks on trial. The last step is a whole batch:
behind the last document its sequences are padding, which is in no loss.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.shares import amounts_of
from megatron_chameleon.data.mixture.mixture import ExhaustedError, Mixture
from megatron_chameleon.data.mixture.mixture_history import MixtureHistory
from megatron_chameleon.data.mixture.sources import DataSource
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.wording import counted


@dataclass(frozen=True)
class EpochsEnd:
    """Where the last epoch ends."""

    config: Config
    """That of the run, with its number of steps."""
    samples: int
    """Number of samples of the run that hold documents."""
    last_size: int
    """Samples of the last step that hold documents, at least 1."""
    description: str
    """Such as "3 epochs of 1,234 conversations = 57 steps of 8 sequences"."""


def find_end(
    config: Config, sources: Sequence[DataSource], history: MixtureHistory, mixture: Mixture
) -> EpochsEnd:
    """Find the last step of a run with ``training.epochs``.

    Args:
        config: Of the run; its ``training.steps`` is 0, or is compared with what is found.
        sources: Those of ``with_shares``, all with a limit of epochs.
        history: Of the run.
        mixture: The last one of the history.

    Raises:
        ConfigError: The config has another number of steps, or nothing is left to train.
    """
    try:
        mixture.phases(sys.maxsize)
        raise AssertionError("a source without a limit of epochs")
    except ExhaustedError as error:
        samples = error.samples
    steps, claimed = history.steps_before(samples), config.training.steps
    epochs = f"training.epochs {config.training.epochs:g}"
    if steps == 0:
        what = f"{config.training.epochs:g} of the documents of stage 1 is not a single one"
        raise ConfigError("training.epochs", what, "Use a larger number")
    if claimed not in (0, steps):
        what = f"{claimed:,}, but {epochs} of these sources is {counted(steps, 'step')}"
        remedy = "Remove one of the two, or set it behind the config: training.epochs="
        remedy += f"{config.training.epochs:g} or training.steps={claimed}"
        raise ConfigError("training.steps", what, remedy)
    found = replace(config, training=replace(config.training, steps=steps))
    last_size = samples - history.first_sample(steps - 1)
    end = EpochsEnd(found, samples, last_size, "")
    return replace(end, description=_describe(end, sources, history))


def _describe(end: EpochsEnd, sources: Sequence[DataSource], history: MixtureHistory) -> str:
    training = end.config.training
    amounts = [amounts_of(end.config, source) for source in sources]
    documents = sum(amount.documents for amount in amounts)
    noun = "document" if any(not _is_all_talk(source) for source in sources) else "conversation"
    assert training.epochs is not None
    times = {source.epochs for source in sources}
    text = f"{training.epochs:g} epoch{'' if training.epochs == 1 else 's'}"
    text += f" of {counted(documents, noun)}"
    if left_out := sum(amount.left_out for amount in amounts):
        text += f" ({left_out:,} too long ones are left out)"
    size = history.batch_size(training.steps - 1)
    up_to = "up to " if len(history.batches) > 1 else ""
    text += f" = {counted(training.steps, 'step')} of {up_to}{counted(size, 'sequence')}"
    if len(times) > 1:
        each = ", ".join(f"{source.key} {source.epochs:.4g}" for source in sources)
        text += f"; times that each source is read: {each}"
    if end.last_size < size:
        text += f"; the last step has {end.last_size:,} of its {size:,}, and padding for the rest"
    return text


def _is_all_talk(source: DataSource) -> bool:
    info = source.corpus.token_file.info  # type: ignore[attr-defined]
    return info.total("conversations") == info.documents
