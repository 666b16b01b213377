"""How long the training of an image tokenizer has taken, will take and may take."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_chameleon.tokenizer.image.config import ImageTrainingConfig
from megatron_chameleon.wording import format_duration

FIRST_STEPS, LONG_SECONDS, HOUR_SECONDS = 3, 60.0, 3600.0
"""After ``FIRST_STEPS`` steps, a training that will take longer than ``LONG_SECONDS`` says so; one
that will take longer than ``HOUR_SECONDS`` also says how to make it shorter."""


class TrainingClock:
    """Counts the time of all starts of a training; says when to save, and when it is over.

    Args:
        config: Has ``save_minutes`` and ``max_minutes``.
        earlier_seconds: What earlier starts have taken.
    """

    def __init__(self, config: ImageTrainingConfig, earlier_seconds: float = 0.0) -> None:
        self._save_seconds = 60 * config.save_minutes or math.inf
        self._max_seconds = 60 * config.max_minutes or math.inf
        self._earlier_seconds = earlier_seconds
        self._start = self._saved = time.perf_counter()

    def here(self) -> float:
        """Seconds since this process began to train."""
        return time.perf_counter() - self._start

    def total(self) -> float:
        """Seconds of all starts together."""
        return self._earlier_seconds + self.here()

    def left(self) -> float:
        """Seconds until ``max_minutes``; infinite without it."""
        return self._max_seconds - self.total()

    def is_save_due(self) -> bool:
        """Whether the last save was ``save_minutes`` ago."""
        return time.perf_counter() - self._saved >= self._save_seconds

    def note_save(self) -> None:
        """Count from now to the next save."""
        self._saved = time.perf_counter()


class Progress:
    """A line every ``log_every_steps``: losses, codebook use, speed and remaining time.

    Args:
        config: Of the training.
        report: Called with each line.
        clock: Of the training.
        done: Steps of earlier starts.
    """

    def __init__(
        self,
        config: ImageTrainingConfig,
        report: Callable[[str], None],
        clock: TrainingClock,
        done: int = 0,
    ) -> None:
        self.config = config
        self.report = report
        self.clock = clock
        self.earlier = done
        self.used: Tensor | None = None
        """Codes that have been used since the last line."""

    def step(
        self, step: int, losses: dict[str, Tensor], uses_K: Tensor, dropped: int
    ) -> dict[str, float] | None:
        """Note a step, counted from 0; print the line if it is time.

        Args:
            step: Its number.
            losses: Scalars, in the order of the line.
            uses_K: How often the step has chosen each code.
            dropped: Images that were left out so far.

        Returns:
            What the line says, by name; None if it was not time.
        """
        seen = uses_K.nonzero().flatten()
        self.used = seen if self.used is None else torch.cat([self.used, seen]).unique()
        done = step + 1
        here = done - self.earlier
        step_seconds = self.clock.here() / here
        if here == FIRST_STEPS:
            self._forecast(done, step_seconds)
        if done % self.config.log_every_steps and done != self.config.steps:
            return None
        left = max(min(step_seconds * (self.config.steps - done), self.clock.left()), 0)
        numbers = {name: value.item() for name, value in losses.items()}
        values = " ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        used, speed = self.used.numel(), self.config.batch_size / max(step_seconds, 1e-9)
        line = (
            f"step {done}/{self.config.steps} {values} codes {used} {speed:.0f} images/s "
            f"ETA {format_duration(left)}"
        )
        self.report(f"{line} dropped {dropped}" if dropped else line)
        self.used = None
        more = {"codes_used": used, "images_per_second": speed, "seconds": self.clock.total()}
        return {**numbers, **more}

    def _forecast(self, done: int, step_seconds: float) -> None:
        """Say how long the training will take, and if it will not come to its end."""
        config, rest = self.config, self.config.steps - done
        seconds = rest * step_seconds
        if seconds > self.clock.left() > 0:
            fitting = done + int(self.clock.left() / step_seconds)
            self.report(
                f"about {fitting:,} of {config.steps:,} steps fit into "
                f"training.max_minutes={config.max_minutes:g}; with training.steps={fitting} the "
                "learning rate would also reach its final value"
            )
        elif seconds > HOUR_SECONDS:
            every = f"every {format_duration(60 * config.save_minutes)}"
            saving = f"it saves {every if config.save_minutes else 'when it is asked to stop'}"
            self.report(
                f"{rest:,} steps will take about {format_duration(seconds)} here; {saving}, and "
                "after a kill the same command continues. training.steps=N or "
                "training.max_minutes=N makes it shorter"
            )
        elif seconds > LONG_SECONDS:
            self.report(f"{rest:,} steps will take about {format_duration(seconds)} here")
