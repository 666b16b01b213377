"""Signals that ask a run to save and stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from megatron_chameleon.errors import TrainingError
from megatron_chameleon.training.faults.signals import SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def job_of_one() -> Iterator[None]:
    """A process group, and this process's signals as they were."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_is_noted_and_named(name: str) -> None:
    with StopSignals() as stop_signals:
        assert stop_signals.agreed() is None
        os.kill(os.getpid(), signal.Signals[name])
        # Another thread may get the signal first, and this one a moment later.
        deadline = time.monotonic() + 10
        while not stop_signals.agreed() and time.monotonic() < deadline:
            pass
        assert stop_signals.agreed() == name
        assert stop_signals.agreed() == name, "the signal was forgotten"


def test_a_failure_of_a_rank_is_raised() -> None:
    failure = TrainingError("metrics.jsonl", "cannot be written", "Make room")
    with StopSignals() as stop_signals, pytest.raises(TrainingError) as caught:
        stop_signals.agreed(failure)
    assert caught.value is failure


def test_processes_started_meanwhile_survive() -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')"
    with StopSignals():
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "alive\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == -signal.SIGUSR1, "without StopSignals they do not survive"


def test_a_run_that_was_not_interrupted_leaves_the_signals_as_they_were() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals():
        assert signal.getsignal(signal.SIGUSR1) != before
    assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_second_signal_does_not_end_an_interrupted_run() -> None:
    """Otherwise the early end of one rank would change the exit code of the others."""
    with StopSignals() as stop_signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        stop_signals.agreed()
    assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    signal.sigtimedwait(SIGNALS, 0)
