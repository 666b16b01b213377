"""Signals that ask a command of one process to save and stop: SIGTERM, SIGUSR1 and Ctrl-C.

The command ends its step first, which may take long on a small machine. A second signal ends it at
once, as ``interrupts.py`` does for every command: what was saved before remains.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from megatron_chameleon.cli.interrupts import REQUEUE_CODE, SAME_PRESS_SECONDS

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PATIENCE_SECONDS = 1.5
"""If the command has not ended after this time, a line says why."""


class StopRequests:
    """Notes the signals while it is entered, in the main thread.

    Entering it returns a function, which returns the name of the first signal, or None.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._seconds = 0.0
        self._timer = threading.Timer(_PATIENCE_SECONDS, _ask_for_patience)
        self._timer.daemon = True

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and others ignore some
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._restore()

    def __call__(self) -> str | None:
        """The name of the first signal, or None."""
        return self._received.name if self._received is not None else None

    def exit_code(self) -> int:
        """As of ``train``: 75 asks for a restart, 130 says that the user has pressed Ctrl-C."""
        return 128 + signal.SIGINT if self._received == signal.SIGINT else REQUEUE_CODE

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number)
            self._seconds = time.monotonic()
            self._timer.start()
        elif time.monotonic() - self._seconds >= SAME_PRESS_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _ask_for_patience() -> None:
    os.write(2, b"stopping after this step, to save; a second signal ends the command at once\n")
