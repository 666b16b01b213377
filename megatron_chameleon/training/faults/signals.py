"""A signal asks a run to save and stop: a time limit that comes near, or a preemption.

    kill -USR1 PID     # of any rank: all of them stop after the same step, saved

SLURM sends one to every process of a job step (``--signal=USR1@300``, ``scancel --signal=TERM``),
those that a rank has started included: they must go on, since the rank may need them to save. So
the signals are blocked, which processes inherit and a handler is not.

The run then ends with ``EXIT_CODE``, which tells whoever started it to start it again.
"""

import signal
from types import FrameType
from typing import Any

import torch

from megatron_chameleon.parallel import platform

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: saved and not finished; the same command goes on."""


class Interruption:
    """Notes the signals of this process while it is entered; ``agreed`` makes them the job's."""

    def __init__(self) -> None:
        self._received = 0
        self._handlers: dict[signal.Signals, Any] = {}
        self._mask: set[int] = set()

    def __enter__(self) -> "Interruption":
        # threads that are there already do not block them: one that gets a signal calls the handler
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        self._take_pending()
        if self._received:
            # The ranks do not end at once, and where one has ended SLURM signals the others: they
            # are to end with the same exit code.
            return
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _take_pending(self) -> None:
        while (found := signal.sigtimedwait(SIGNALS, 0)) is not None:
            self._received = found.si_signo

    def agreed(self) -> str | None:
        """The name of a signal that any rank has received, the same on every rank; else None.

        A collective: every rank calls it after every step.
        """
        self._take_pending()
        received = torch.tensor([self._received], device=platform.device())
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        number = int(received.item())
        return signal.Signals(number).name if number else None
