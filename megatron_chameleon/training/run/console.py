"""The progress of a run: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO


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
        width = len(str(self._steps))
        return (
            f"step {step:>{width}}/{self._steps}  loss {_number(metrics, 'loss', '.4f')} "
            f"(text {_number(metrics, 'loss_text', '.4f')}, "
            f"image {_number(metrics, 'loss_image', '.4f')})  "
            f"grad norm {_number(metrics, 'grad_norm', '.3f')}  "
            f"lr {_number(metrics, 'learning_rate', '.2e')}  "
            f"{_number(metrics, 'tokens_per_second', ',.0f')} tokens/s  ETA {self._left(step)}"
        )

    def short(self, step: int, metrics: Mapping[str, float | None]) -> str:
        """What fits beside a bar."""
        return (
            f"{step}/{self._steps} loss {_number(metrics, 'loss', '.4f')} {self._left(step)} left"
        )

    def _left(self, step: int) -> str:
        elapsed = time.perf_counter() - self._start
        return format_duration(elapsed / (step - self._first_step) * (self._steps - step))


def _number(metrics: Mapping[str, float | None], key: str, form: str) -> str:
    value = metrics[key]
    return "-" if value is None else format(value, form)


class Console(Protocol):
    """Where a run's words go."""

    def say(self, text: str) -> None: ...

    def step(self, step: int, short: str, line: str | None) -> None:
        """After a step: what fits beside a bar, and the line if it is one that a log shows."""

    def close(self) -> None: ...


def open_console(first_step: int, steps: int, file: TextIO | None = None) -> Console:
    """A bar where ``file`` (standard output) is a terminal, else plain lines.

    Args:
        first_step: Steps done before this process.
        steps: Steps of the whole run.
        file: None for standard output.
    """
    file = file or sys.stdout
    return BarConsole(first_step, steps, file) if file.isatty() else LineConsole(file)


class LineConsole:
    """Lines, each written at once.

    Args:
        file: Where to.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def say(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def step(self, step: int, short: str, line: str | None) -> None:
        if line is not None:
            self.say(line)

    def close(self) -> None:
        self._file.flush()


class BarConsole:
    """A bar at the bottom that every step moves, and the lines above it.

    Args:
        first_step: Steps done before this process.
        steps: Steps of the whole run.
        file: A terminal.
    """

    def __init__(self, first_step: int, steps: int, file: TextIO) -> None:
        from rich import console, progress

        columns = (progress.BarColumn(), progress.TextColumn("{task.description}"))
        screen = console.Console(file=file, force_terminal=True, highlight=False)
        # without rich's thread: it is redrawn when a step has ended
        self._bar: Any = progress.Progress(*columns, console=screen, auto_refresh=False)
        self._task = self._bar.add_task("", total=steps, completed=first_step)
        self._bar.start()

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int, short: str, line: str | None) -> None:
        if line is not None:
            self.say(line)
        self._bar.update(self._task, completed=step, description=short, refresh=True)

    def close(self) -> None:
        self._bar.stop()
