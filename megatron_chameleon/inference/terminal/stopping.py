"""Ctrl-C stops an answer, not the command."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stopping:
    """Whether somebody wants the answer to stop. The decoder is not interrupted inside a step."""

    is_wanted = False


@contextlib.contextmanager
def stopping(is_on: bool) -> Iterator[Stopping]:
    """Note the first Ctrl-C while the block runs; a second one does what it did before.

    Args:
        is_on: Whether to do that; the block then runs in the main thread.
    """
    stop = Stopping()
    if not is_on:
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.is_wanted:
            signal.signal(number, before)
            signal.raise_signal(number)
        stop.is_wanted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
