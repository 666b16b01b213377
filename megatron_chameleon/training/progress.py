"""The progress line of a run: step, losses, norm, rate and the time that is left."""

import time
from collections.abc import Mapping


def format_duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m or 4d03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Progress:
    """Formats one line a step and estimates the time left from this process's own steps.

    Args:
        first_step: Steps done before this process started.
        steps: Steps of the whole run.
    """

    def __init__(self, first_step: int, steps: int) -> None:
        self._first_step = first_step
        self._steps = steps
        self._start = time.perf_counter()

    def line(self, step: int, metrics: Mapping[str, float | None]) -> str:
        """The line for ``step`` updates done, with the metrics of the last one."""

        def number(key: str, form: str) -> str:
            value = metrics[key]
            return "-" if value is None else format(value, form)

        elapsed = time.perf_counter() - self._start
        left = elapsed / (step - self._first_step) * (self._steps - step)
        width = len(str(self._steps))
        return (
            f"step {step:>{width}}/{self._steps}  loss {number('loss', '.4f')} "
            f"(text {number('loss_text', '.4f')}, image {number('loss_image', '.4f')})  "
            f"grad norm {number('grad_norm', '.3f')}  lr {number('learning_rate', '.2e')}  "
            f"{number('tokens_per_second', ',.0f')} tokens/s  ETA {format_duration(left)}"
        )
