"""Ctrl-C and SIGTERM end every command within seconds, with one line that says what comes next.

Python runs a signal's handler in the main thread, and only between two bytecodes. A command that
waits in C, for another rank or for a disk, would not notice Ctrl-C. So the kernel's signal also
wakes a thread, which ends the process if the command has not ended ``GRACE_SECONDS`` later. A
second Ctrl-C ends it at once.

The exit code is 128 + the signal's number, as for a process that the signal has killed: 130 after
Ctrl-C and 143 after SIGTERM. ``train`` takes SIGTERM and SIGUSR1 as requests to save and stop, and
ends with 75; until it handles them itself there is nothing to save, and this module ends it.
``tokenizer image`` does so too while it trains (``stopping.py``).
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from megatron_chameleon.announce import is_importing

GRACE_SECONDS = 2.5
"""How long a command may close its files after the first signal."""
SAME_PRESS_SECONDS = 0.5
"""A terminal sends Ctrl-C to torchrun and to its ranks, and torchrun passes it on to them again."""
REQUEUE_CODE = 75
"""``training.faults.signals.EXIT_CODE``, which cannot be imported before torch."""

AGAIN = "the same command starts again"
COMPLETE = "the command was already complete"
NOTHING = f"nothing was written, and {AGAIN}"
NEXT_STEPS = {
    "tokenizer": NOTHING,
    "tokenizer image": "the same command continues from the last save, if there is one",
    "preprocess": "the same command continues from what it has saved",
    "preprocess --status": AGAIN,
    "train": "the same command resumes from the run's newest checkpoint, or starts at step 0 if it "
    "has none (a run that gets `kill -USR1 PID` saves before it stops)",
    "train --dry-run": NOTHING,
    "status --watch": "the runs go on, and the same command shows them again",
    "convert": NOTHING,
    "evaluate": "the same command continues after the answers that it has stored",
    "annotate": AGAIN,
    "annotate answer": "the same command continues after the answers that it has stored",
}
"""What the same command does next, by its verb and one other word; ``AGAIN`` for all others."""


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by the first signal. Library code lets it pass."""


def interruptible(words: Sequence[str], ends_process: bool) -> "Interrupts":
    """A context in which signals end the command.

    Args:
        words: The command's, such as ``["train", "x.yaml"]``.
        ends_process: Whether the process ends with the command. The signals are then handled to the
            process's end, instead of only inside the ``with`` block.
    """
    verb = words[0] if words else ""
    return Interrupts(
        _next_step(words), saves=verb == "train", is_silent=_rank(verb) > 0, stays=ends_process
    )


def end_process(code: int) -> NoReturn:
    """End the process as Python does at its end, without taking its modules apart.

    That takes seconds with PyTorch loaded, and signals would find no handler in that time.
    """
    with contextlib.suppress(SystemExit):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(code)


def _next_step(words: Sequence[str]) -> str:
    for name, step in reversed(NEXT_STEPS.items()):
        if words[:1] == [name.split()[0]] and set(name.split()) <= set(words):
            return step
    return AGAIN


def _rank(verb: str) -> int:
    """Of this process in its job; only rank 0 prints the line."""
    if verb not in ("train", "preprocess"):
        return 0
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.parallel.launch import find_launch

    try:
        return find_launch().rank
    except ConfigError:  # the verb reports it
        return 0


class Interrupts:
    """Handles the signals that end a command, while it is entered.

    Args:
        next_step: What the same command does next, as the end of "interrupted: ".
        saves: Whether the command is ``train``, for which SIGTERM and SIGUSR1 mean "save and stop".
        is_silent: Whether another rank prints the line.
        stays: Whether the process ends with the command. The signals are then handled to the
            process's end, instead of only inside the ``with`` block.

    Attributes:
        received: The first signal, or None.
    """

    def __init__(
        self,
        next_step: str,
        *,
        saves: bool = False,
        is_silent: bool = False,
        stays: bool = False,
    ) -> None:
        self._next_step = next_step
        self._is_silent = is_silent
        self.received: signal.Signals | None = None
        self._stays = stays
        self._numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        self._requeues = (signal.SIGTERM, signal.SIGUSR1) if saves else ()
        if saves:
            self._numbers.append(signal.SIGUSR1)
        self._handlers: dict[signal.Signals, Any] = {}
        self._first_seconds = 0.0
        self._reported = threading.Lock()
        self._has_begun = self._raised = False
        self._over = False
        self._ends: list[int] = []
        self._old_wakeup = -1
        self._old_hook = sys.unraisablehook
        self._process = os.getpid()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._ends = list(os.pipe())
        os.set_blocking(self._ends[1], False)
        self._old_wakeup = signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
        sys.unraisablehook = self._report_unraisable
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        os.register_at_fork(after_in_child=self._forget)
        for number in self._numbers:
            # a signal that whoever started this process ignores, as nohup does, stays ignored
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def begin(self) -> None:
        """Note that the caller's ``try`` block has begun, which may see ``Interrupted``."""
        self._has_begun = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if isinstance(error, Interrupted):  # while an error was being printed
            self.end()
        self._over = True
        if self._stays or not self._ends:
            return
        signal.set_wakeup_fd(self._old_wakeup)
        sys.unraisablehook = self._old_hook
        self._restore()
        os.close(self._ends[1])  # ends the thread
        self._ends = []

    def end(self, is_complete: bool = False) -> NoReturn:
        """End the process after the first signal, once the command has closed its files.

        Args:
            is_complete: Whether the command has done all its work. Some library code, such as the
                imports in an extension module, drops the exception.
        """
        if is_complete:
            self._next_step = COMPLETE
        if self._stays:
            with contextlib.suppress(BaseException):  # such as a reader that has gone
                sys.stdout.flush()
        self._report()
        if self._stays:
            self._exit_now()
        sys.exit(self.exit_code())

    def exit_code(self) -> int:
        """Of a process that ends because of the first signal."""
        number = self.received or signal.SIGINT
        return REQUEUE_CODE if number in self._requeues else 128 + number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork that has not forgotten its parent's handler yet
            os._exit(128 + number)
        self._note(number)
        if self._over:
            self._next_step = COMPLETE
        # An exception in the import of an extension module may be dropped or abort the process, and
        # there is nothing to close then.
        if self._over or not self._has_begun or (self._stays and is_importing(frame)):
            self._report()
            self._exit_now()
        if self._raised:
            if not self._is_same_press():
                self._force()
            return
        self._raised = True
        raise Interrupted

    def _report_unraisable(self, unraisable: Any) -> None:
        """Say nothing of an ``Interrupted`` that a destructor or a callback in C has dropped."""
        if not issubclass(unraisable.exc_type, Interrupted):
            self._old_hook(unraisable)

    def _note(self, number: int) -> None:
        """Called by the handler and by the thread; either may be first."""
        if self.received is None:
            self._first_seconds = time.monotonic()
            self.received = signal.Signals(number)

    def _is_same_press(self) -> bool:
        return time.monotonic() - self._first_seconds < SAME_PRESS_SECONDS

    def _watch(self) -> None:
        # so that signals reach the main thread, where they interrupt system calls
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        reading = self._ends[0]
        deadline_set = False
        while data := os.read(reading, 1):
            number = data[0]
            # a handler of the library's, such as the training loop's, knows what to do
            if self._over or signal.getsignal(number) != self._handle:
                continue
            self._note(number)
            if not deadline_set:
                deadline_set = True
                self._force_after(GRACE_SECONDS)
            elif not self._is_same_press():
                self._force()
        os.close(reading)

    def _force_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._force)
        timer.daemon = True
        timer.start()

    def _force(self) -> None:
        """End the process now, whatever the main thread is doing."""
        if not self._over:
            self._report()
            self._exit_now()

    def _report(self) -> None:
        """Print the line, once. It is written without Python's buffers, whose locks may be held."""
        if not self._reported.acquire(blocking=False) or self._is_silent:
            return
        number = self.received or signal.SIGINT
        what = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        line = f"{what}: {self._next_step}\n"
        if self._stays:
            with contextlib.suppress(OSError):
                os.write(2, line.encode("utf-8", "backslashreplace"))
        else:
            print(line, end="", file=sys.stderr)

    def _exit_now(self) -> NoReturn:
        for child in multiprocessing.active_children():
            with contextlib.suppress(OSError, AttributeError, ValueError):
                child.kill()
        os._exit(self.exit_code())

    def _forget(self) -> None:
        """In a forked process: its signals are its own, and its parent reports."""
        if self._ends and signal.getsignal(signal.SIGINT) == self._handle:
            signal.set_wakeup_fd(-1)
            self._restore()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
