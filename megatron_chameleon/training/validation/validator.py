"""Measure the held-out loss of a run, every few steps and after the last one.

Training is not affected: the documents have a reader of their own, no gradient is computed, and
each micro-batch of training sets its random streams itself.
"""

from collections.abc import Callable

from megatron_chameleon.announce import announced
from megatron_chameleon.data.validation.reader import HeldOutReader
from megatron_chameleon.errors import ChameleonError, DataError
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.base import TrainingEngine
from megatron_chameleon.training.faults.hang import HangWatch
from megatron_chameleon.training.faults.signals import StopSignals
from megatron_chameleon.training.validation.losses import HeldOutLosses, PreferenceLosses
from megatron_chameleon.training.validation.measure import measure


class Validator:
    """Measures the held-out loss of a run.

    Args:
        reader: The held-out documents; None if the config names none.
        engine: Whose model is measured.
        topology: The place of this process.
        watch: Learns that each chunk of micro-batches is progress.
        stop_signals: A signal ends a measurement, because the time that is left is for saving.
        warn: Called with a line for the user.
    """

    def __init__(
        self,
        reader: HeldOutReader | None,
        engine: TrainingEngine,
        topology: Topology,
        watch: HangWatch,
        stop_signals: StopSignals,
        warn: Callable[[str], None],
    ) -> None:
        self._reader, self._engine, self._topology = reader, engine, topology
        self._watch, self._stop_signals, self._warn = watch, stop_signals, warn

    def is_due(self, step: int) -> bool:
        """Whether the config wants the loss after this step, counted from 1."""
        config = self._engine.config
        every = config.data.validation.every_steps
        is_last = step == config.training.steps
        return self._reader is not None and (is_last or (every > 0 and step % every == 0))

    def measure(self, step: int) -> dict[str, float | None]:
        """The metrics of a step that was just done, ``validation/loss`` and so on. A collective.

        Returns:
            Nothing if a rank cannot read the documents, which does not end the training, or if a
            signal asked the run to stop before all of them were measured.
        """
        assert self._reader is not None

        def go_on(failure: ChameleonError | None) -> bool:
            self._watch.begin("measuring the held-out loss", step, is_long=True)
            return self._stop_signals.agreed(failure) is None

        reason = "a signal asks the run to stop"
        try:
            with announced(f"measuring the held-out loss after step {step}"):
                losses = measure(self._engine.evaluate, self._reader, self._topology, go_on)
                averaged: HeldOutLosses | PreferenceLosses | None = None
                if losses is not None and self._engine.average.updates:
                    with self._engine.ema_weights():
                        averaged = measure(
                            self._engine.evaluate, self._reader, self._topology, go_on
                        )
            if losses is not None:
                return losses.metrics() | (averaged.ema_metrics() if averaged else {})
        except DataError as error:  # the same on every rank
            reason = str(error)
        self._warn(f"step {step}: the held-out loss was not measured: {reason}")
        return {}
