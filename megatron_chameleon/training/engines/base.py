"""The two training engines behind one interface; this is the only place that chooses."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from megatron_chameleon.checkpoint.state.save import Snapshot
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.deepspeed_setup import check_deepspeed, prepare_deepspeed
from megatron_chameleon.parallel.launch import find_launch
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.metrics.step_metrics import Monitor
from megatron_chameleon.training.metrics.stragglers import StepClock


class TrainingEngine(Protocol):
    """Model, gradients, optimizer and schedule of one rank.

    Every method but ``named_parameters`` is a collective: all ranks call it.
    """

    config: Config
    monitor: Monitor
    clock: StepClock

    @property
    def parts(self) -> Sequence[nn.Module]:
        """This rank's parts of the model."""

    def train_step(
        self, step: int, micro_batches: Sequence[Batch], *, update: bool = True
    ) -> dict[str, Any]:
        """One step: gradients, update, schedule.

        The update is left out, and weights and moments stay as they are to the last bit, where the
        loss or a gradient is not finite.

        Args:
            step: The update being done, counted from 1.
            micro_batches: This data-parallel rank's share of the global batch.
            update: False leaves the update out in any case.

        Returns:
            The metrics of the whole job, the same on every rank; with ``"skipped": True`` where the
            update was left out.
        """

    def repeat_pass(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """The forward and backward passes of a step once more, for whoever has put hooks on
        ``parts``; nothing else comes of it."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the parameters under their names in the whole model."""

    def snapshot(self) -> Snapshot:
        """The state to save."""

    def restore(self, checkpoint: Path, step: int) -> None:
        """Take over a checkpoint's state, saved by any engine and layout after ``step`` updates.

        Weights and moments are the checkpoint's; learning rate, betas and the like are this
        config's, so that a run can be continued with other values.

        Raises:
            CheckpointError: It cannot be read.
        """

    def restore_weights(self, checkpoint: Path) -> None:
        """Take over a checkpoint's weights only; moments and schedule begin anew.

        Raises:
            CheckpointError: It cannot be read.
        """


def check_installed(config: Config) -> None:
    """See that the engine is installed, before anything is started.

    Raises:
        ConfigError: DeepSpeed is not there or of an untested version.
    """
    if config.engine.name == "deepspeed":
        check_deepspeed()


def build_engine(config: Config, vocab_size: int, topology: Topology) -> TrainingEngine:
    """The engine that ``engine.name`` asks for, at step 0.

    Args:
        config: A checked config.
        vocab_size: Tokens of the vocabulary.
        topology: From ``create_topology``.
    """
    if config.engine.name == "deepspeed":
        prepare_deepspeed(find_launch().local_rank)  # before deepspeed is imported
        from megatron_chameleon.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, vocab_size, topology)
    from megatron_chameleon.training.engines.megatron import MegatronEngine

    return MegatronEngine(config, vocab_size, topology)
