"""Signals that ask a run to save and stop: a time limit is near, or the job is preempted.

    kill -USR1 PID     # of any rank: all ranks save and stop after the same step

SLURM sends such a signal to every process of a job step (``--signal=USR1@300``, ``scancel
--signal=TERM``), which includes the processes that a rank has started. Those must live on, since
the rank may need them to save. So the signals are blocked here: a new process inherits blocked
signals, but not a handler.

The run then ends with ``EXIT_CODE``, which tells whatever started it to start it again.
"""

import signal
from types import FrameType
from typing import Any

import torch

from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.collectives import raise_together

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run was saved before its end; the same command resumes it."""


class StopSignals:
    """Notes the signals of this process while it is entered; ``agreed`` asks all ranks."""

    def __init__(self) -> None:
        self._received = 0
        self._handlers: dict[signal.Signals, Any] = {}
        self._mask: set[int] = set()

    def __enter__(self) -> "StopSignals":
        # Threads that exist already do not block the signals: one that gets a signal runs this.
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        self._take_pending()
        if self._received:
            # The ranks do not end at the same moment. When one has ended, SLURM signals the
            # others, and these must still end with the same exit code.
            return
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _take_pending(self) -> None:
        while (found := signal.sigtimedwait(SIGNALS, 0)) is not None:
            self._received = found.si_signo

    def received(self) -> str | None:
        """The name of a signal that this rank has received, or None."""
        self._take_pending()
        return signal.Signals(self._received).name if self._received else None

    def agreed(self, failure: ChameleonError | None = None) -> str | None:
        """The name of a signal that any rank has received, or None; the same on every rank.

        A collective: every rank calls it after every step.

        Args:
            failure: Why this rank cannot go on.

        Raises:
            ChameleonError: On every rank, if any rank has a failure.
        """
        self._take_pending()
        own = [self._received, int(failure is not None)]
        received = torch.tensor(own, device=platform.device())
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        number, has_failure = map(int, received.tolist())
        if has_failure:
            raise_together(failure)
        return signal.Signals(number).name if number else None
