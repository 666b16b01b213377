"""The learning rate of each step of a run; both engines and every message take it from here.

The formulas are megatron-core's (``OptimizerParamScheduler``), with one difference: a warm-up of N
steps gives its first step 1/N of the peak, where megatron-core gives it 0 and so wastes an update.
docs/schedules.md has the table of formulas.

    >>> from megatron_chameleon.config.schema import Config, OptimizerConfig
    >>> rate = LearningRate.of(Config(optimizer=OptimizerConfig(lr=8.0, lr_warmup_steps=4)))
    >>> [rate.at(step) for step in (1, 2, 4, 5)]
    [2.0, 4.0, 8.0, 8.0]
"""

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Protocol

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_chameleon.config.schema import Config


class HasParamGroups(Protocol):
    """An optimizer of either engine."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a pure function of the step."""

    peak: float
    lowest: float
    """What the decay would reach in the step after the last one."""
    warmup_steps: int
    steps: int
    """Of the whole run."""
    style: str
    """``optimizer.lr_decay_style``."""
    decay_steps: int
    """Number of last steps over which the rate falls; 0 for the style ``constant``."""
    decay_shape: str
    """``optimizer.lr_wsd_decay_style``."""
    warmup_begin: int = 1
    """1: the warm-up's first step has 1/N of the peak; 0: it has 0, as in earlier versions."""

    @classmethod
    def of(
        cls, config: Config, decay_steps: int | None = None, warmup_begin: int = 1
    ) -> "LearningRate":
        """The learning rate of a config.

        Args:
            config: A checked one.
            decay_steps: Of the style ``wsd``, where a run's history decides it
                (``training/learning_rate.py``); None: ``optimizer.lr_wsd_decay_steps``.
            warmup_begin: See the attribute.
        """
        values, steps = config.optimizer, config.training.steps
        if values.lr_decay_style == "wsd":
            count = decay_steps if decay_steps is not None else values.lr_wsd_decay_steps
            assert count is not None, "the run's history decides where the decay begins"
        else:
            has_decay = values.lr_decay_style != "constant"
            count = steps - values.lr_warmup_steps if has_decay else 0
        return cls(
            values.lr,
            values.min_lr,
            values.lr_warmup_steps,
            steps,
            values.lr_decay_style,
            count,
            values.lr_wsd_decay_style,
            warmup_begin,
        )

    def at(self, step: int) -> float:
        """The learning rate of a step's update.

        Args:
            step: Counted from 1.
        """
        self._alone.num_steps = step - 1
        return self._alone.get_lr({})

    @cached_property
    def _alone(self) -> "StepScheduler":
        return StepScheduler(SimpleNamespace(param_groups=[]), self)


class StepScheduler(OptimizerParamScheduler):
    """Sets the learning rate and the weight decay of an optimizer's parameter groups.

    Its ``num_steps`` counts the steps that were done.

    Args:
        optimizer: Of either engine.
        rate: The learning rate of each step.
        weight_decay: Of every step; a group's ``wd_mult`` multiplies it.
    """

    def __init__(
        self, optimizer: HasParamGroups, rate: LearningRate, weight_decay: float = 0.0
    ) -> None:
        self._warmup_begin = rate.warmup_begin
        # The paper decays exponentially to 0 and gives no rate. megatron-core's exponential curve
        # falls to exactly ``min_lr``; it has it as a shape of WSD only.
        exponential = rate.style == "exponential"
        is_wsd = exponential or rate.style == "wsd"
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=rate.peak,
            min_lr=rate.lowest,
            lr_warmup_steps=rate.warmup_steps,
            lr_decay_steps=rate.steps,
            lr_decay_style="WSD" if is_wsd else rate.style,
            wsd_decay_steps=rate.decay_steps if is_wsd else None,
            lr_wsd_decay_style="exponential" if exponential else rate.decay_shape,
            start_wd=weight_decay,
            end_wd=weight_decay,
            wd_incr_steps=rate.steps,
            wd_incr_style="constant",
        )

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """The learning rate of the next step for a group, which may have a peak of its own."""
        step = self.num_steps + 1
        if self._warmup_begin and step <= self.lr_warmup_steps:
            return param_group.get("max_lr", self.max_lr) * (step / self.lr_warmup_steps)
        return super().get_lr(param_group)

    def continue_after(self, steps_done: int) -> None:
        """Set the values of the step after ``steps_done``."""
        self.num_steps = steps_done
        self.step(0)
