"""The interface of the two training engines, and the only place that chooses between them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.state.save import Snapshot
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.deepspeed_setup import check_deepspeed, prepare_deepspeed
from megatron_chameleon.parallel.launch import find_launch
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.schedules.learning_rate import LearningRate
from megatron_chameleon.training.engines.ema import WeightAverage
from megatron_chameleon.training.engines.objective import Measurement
from megatron_chameleon.training.metrics.step_metrics import StepMonitor
from megatron_chameleon.training.metrics.stragglers import StepClock


class TrainingEngine(Protocol):
    """The model, gradients, optimizer and schedule of one rank.

    Every method except ``named_parameters`` is a collective: all ranks call it.
    """

    config: Config
    monitor: StepMonitor
    clock: StepClock
    average: WeightAverage

    @property
    def parts(self) -> Sequence[nn.Module]:
        """This rank's parts of the model."""

    def train_step(
        self, step: int, micro_batches: Sequence[Batch], *, update: bool = True
    ) -> dict[str, Any]:
        """Do one step: gradients, update, schedule.

        If the loss or a gradient is not finite, the update is left out, and weights and moments
        stay as they are to the last bit.

        Args:
            step: The update being done, counted from 1.
            micro_batches: This data-parallel rank's share of the global batch.
            update: False leaves the update out in any case.

        Returns:
            The metrics of the whole run, the same on every rank, with ``"skipped": True`` if the
            update was left out.
        """

    def repeat_pass(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Repeat the forward and backward passes of a step, for hooks on ``parts`` to watch.

        It changes neither weights nor moments.

        Args:
            step: As in ``train_step``.
            micro_batches: As in ``train_step``.
        """

    def evaluate(
        self, micro_batches: Sequence[Batch], measurement: Measurement | None = None
    ) -> Tensor:
        """Numbers, such as the losses, of micro-batches that are not trained, with dropout off.

        Nothing that a training step sees changes: neither weights, moments and FP8 scales, nor the
        metrics of the next step.

        Args:
            micro_batches: This data-parallel rank's, as many on every rank and at least one; with
                interleaved pipelines, a multiple of the pipeline's size.
            measurement: What to take; None for ``held_out_measurement``.

        Returns:
            float64 [micro-batches, numbers]; zeros on ranks that do not compute the loss.
            Tensor-parallel ranks have equal values.
        """

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the parameters under their names in the whole model."""

    def ema_weights(self) -> AbstractContextManager[None]:
        """Let the model compute with the moving average of its weights.

        Afterwards it computes with the weights again, to the last bit. Without an average, and
        before the first update, these are the weights themselves. Nothing may train or save inside.
        """

    def complete_weights(self) -> None:
        """Make the weights of this rank those after the last update.

        With ``parallel.overlap_param_gather``, a rank has updated only its own share of them, and
        would get the others during its next forward pass. Call it before reading
        ``named_parameters`` between two steps.
        """

    def snapshot(self) -> Snapshot:
        """The state to save."""

    def restore(self, checkpoint: Path, step: int) -> None:
        """Load the state of a checkpoint, which any engine and layout may have saved.

        Weights and moments are the checkpoint's. Learning rate, betas and the like are this
        config's, so that a run can continue with other values.

        Args:
            checkpoint: A whole one.
            step: The last step that was done before it was saved.

        Raises:
            CheckpointError: It cannot be read.
        """

    def restore_weights(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint only; moments and schedule start from the beginning.

        Raises:
            CheckpointError: It cannot be read.
        """

    def close(self) -> None:
        """Let go of the model, after the last step, so that a later run in the process has room."""


def check_installed(config: Config) -> None:
    """Check that the engine is installed, before anything is started.

    Raises:
        ConfigError: DeepSpeed is missing, or its version has not been tested.
    """
    if config.engine.name == "deepspeed":
        check_deepspeed()


def build_engine(
    config: Config,
    vocab_size: int,
    topology: Topology,
    learning_rate: LearningRate | None = None,
    image_ids: Sequence[int] = (),
    weights: CheckpointReader | None = None,
) -> TrainingEngine:
    """The engine that ``engine.name`` asks for, before its first step.

    Args:
        config: A checked config.
        vocab_size: Number of tokens in the vocabulary.
        topology: From ``create_topology``.
        learning_rate: Of each step; None: as the config alone says.
        image_ids: The token ids of the image codes, which ``model.train`` and ``freeze`` may name.
        weights: The checkpoint whose weights the model begins with; None: they are drawn.
    """
    if config.engine.name == "deepspeed":
        prepare_deepspeed(find_launch().local_rank)  # before deepspeed is imported
        from megatron_chameleon.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, vocab_size, topology, learning_rate, image_ids, weights)
    from megatron_chameleon.training.engines.megatron import MegatronEngine

    return MegatronEngine(config, vocab_size, topology, learning_rate, image_ids, weights)
