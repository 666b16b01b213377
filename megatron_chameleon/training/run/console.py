"""Show the progress of a run: a bar on a terminal, otherwise a line every few steps."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from megatron_chameleon.terminal import escape_line
from megatron_chameleon.wording import format_duration

logger = logging.getLogger(__name__)

HELD_OUT_LOSS = "validation/loss"


class Progress:
    """Formats a line for a step, and estimates the time left from this process's own steps.

    Args:
        steps_done: Steps that earlier processes of the run have done.
        steps: Steps of the whole run.
        samples_before: Number of samples that a number of steps read, where batches differ in size;
            None: all steps are alike.
    """

    def __init__(
        self,
        steps_done: int,
        steps: int,
        samples_before: Callable[[int], int] | None = None,
    ) -> None:
        self._steps_done = steps_done
        self._steps = steps
        self._work = samples_before or (lambda steps: steps)
        self._start = time.perf_counter()

    def line(self, step: int, metrics: Mapping[str, float | None]) -> str:
        """The line for a step that was just done, with its metrics."""
        width = len(str(self._steps))
        return (
            f"step {step:>{width}}/{self._steps}  loss {_number(metrics, 'loss', '.4f')} "
            f"({_parts(metrics)})  "
            f"grad norm {_number(metrics, 'grad_norm', '.3f')}  "
            f"lr {_number(metrics, 'learning_rate', '.2e')}  "
            f"{_number(metrics, 'tokens_per_second', ',.0f')} tokens/s  ETA {self._left(step)}"
        )

    def short(self, step: int, metrics: Mapping[str, float | None]) -> str:
        """The short form, for the right of a bar."""
        return (
            f"{step}/{self._steps} loss {_number(metrics, 'loss', '.4f')} {self._left(step)} left"
        )

    def _left(self, step: int) -> str:
        elapsed = time.perf_counter() - self._start
        done = self._work(step) - self._work(self._steps_done)
        return format_duration(elapsed / done * (self._work(self._steps) - self._work(step)))


def held_out_line(step: int, metrics: Mapping[str, float | None]) -> str:
    """The line for a step after which the held-out loss was measured, with its metrics."""
    begin, end = "validation/", "/loss"
    names = [key[len(begin) :] for key in metrics if key.startswith(begin)]
    sources = ", ".join(
        f"{name[: -len(end)]} {_number(metrics, begin + name, '.4f')}"
        for name in names
        if name.endswith(end)
    )
    perplexity = ""
    if f"{begin}perplexity" in metrics:
        perplexity = f", perplexity {_number(metrics, f'{begin}perplexity', ',.4g')}"
    ema = f"{begin}ema_loss"
    if ema in metrics:
        sources += f"; of the EMA of the weights {_number(metrics, ema, '.4f')}"
    return (
        f"step {step}: held-out loss {_number(metrics, HELD_OUT_LOSS, '.4f')} "
        f"({_parts(metrics, begin)}){perplexity}; {sources}"
    )


def _parts(metrics: Mapping[str, float | None], begin: str = "") -> str:
    """What stands beside a loss: those of the modalities, or what pairs of answers have."""
    if f"{begin}reward_margin" not in metrics:
        text, image = (_number(metrics, f"{begin}loss_{m}", ".4f") for m in ("text", "image"))
        return f"text {text}, image {image}"
    margin = _number(metrics, f"{begin}reward_margin", ".3f")
    return f"margin {margin}, accuracy {_number(metrics, f'{begin}reward_accuracy', '.3f')}"


def _number(metrics: Mapping[str, float | None], key: str, form: str) -> str:
    value = metrics[key]
    return "-" if value is None else format(value, form)


class Console(Protocol):
    """Where a run shows what it does."""

    def say(self, text: str) -> None:
        """Show a line."""

    def warn(self, text: str) -> None:
        """Show a line, marked as a warning. ``--quiet`` does not hide it."""

    def step(self, step: int, short: str, line: str | None) -> None:
        """Show that a step was done.

        Args:
            step: Counted from 1.
            short: What fits beside a bar.
            line: What a log shows, or None for a step that it does not show.
        """

    def close(self) -> None: ...


def open_console(steps_done: int, steps: int, file: TextIO | None = None) -> Console:
    """A bar if ``file`` is a terminal and progress is to be shown, otherwise log lines.

    Args:
        steps_done: Steps that earlier processes of the run have done.
        steps: Steps of the whole run.
        file: Where the bar is drawn; None for standard output.
    """
    file = file or sys.stdout
    if file.isatty() and logger.isEnabledFor(logging.INFO):
        return BarConsole(steps_done, steps, file)
    return LineConsole()


class LineConsole:
    """Log lines, which the command line prints."""

    def say(self, text: str) -> None:
        logger.info(text)

    def warn(self, text: str) -> None:
        # Among the other lines, so that a log shows when it was. Where those are hidden it still
        # has to be seen.
        if logger.isEnabledFor(logging.INFO):
            logger.info("warning: %s", text)
        else:
            logger.warning(text)

    def step(self, step: int, short: str, line: str | None) -> None:
        if line is not None:
            self.say(line)

    def close(self) -> None:
        """Nothing is left to write."""


class BarConsole:
    """A bar at the bottom of the screen that moves with every step, and lines above it.

    Args:
        steps_done: Steps that earlier processes of the run have done.
        steps: Steps of the whole run.
        file: A terminal.
    """

    def __init__(self, steps_done: int, steps: int, file: TextIO) -> None:
        from rich import console, progress

        columns = (progress.BarColumn(), progress.TextColumn("{task.description}"))
        screen = console.Console(file=file, force_terminal=True, highlight=False)
        # It is redrawn when a step ends, so rich does not need its thread.
        self._bar: Any = progress.Progress(*columns, console=screen, auto_refresh=False)
        self._task = self._bar.add_task("", total=steps, completed=steps_done)
        self._bar.start()

    def say(self, text: str) -> None:
        self._bar.console.print(escape_line(text), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def step(self, step: int, short: str, line: str | None) -> None:
        if line is not None:
            self.say(line)
        self._bar.update(self._task, completed=step, description=short, refresh=True)

    def close(self) -> None:
        self._bar.stop()
