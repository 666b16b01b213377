"""Wait for the other ranks of the job, and say for which.

Variables of a launcher outlive it: a shell inside an allocation, a container or a notebook may have
``SLURM_NTASKS=2`` or ``WORLD_SIZE=2`` although nobody starts a second process. PyTorch would then
wait half an hour in silence. So the ranks first meet here, at a store of key-value pairs that rank
0 opens (or torchrun's agent), and count themselves:

    waiting for ranks: 1 of 2 is here, missing: 1. They meet at node3:29500, until 14:30:00. ...

The wait is a loop in Python, which Ctrl-C and the signals of a batch system interrupt.
"""

import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch

from megatron_chameleon.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

LIMIT_SECONDS = 1800.0
"""PyTorch's own limit for the start of a process group."""
FIRST_LINE_SECONDS, NEXT_LINES_SECONDS = 2.0, 60.0
POLL_SECONDS = 0.1
CONNECT_SECONDS = 5.0
OWN_STORE_SECONDS = 20.0
"""Rank 0 reaches its own store at once, unless MASTER_ADDR is another machine's."""
SHOWN_RANKS = 12


_MET: dict[tuple[int, str, int, int], tuple[torch.distributed.Store, int]] = {}
"""The store of each place where this process has met the others as one of the ranks, and how often.

A program may train several times. Its ranks leave one run and come to the next at different
moments, so rank 0 keeps its store open, and each meeting has keys of its own in it."""


class StoppedWaiting(Exception):
    """A signal has asked this process to stop before all ranks were there; its name."""


class Meeting:
    """The wait of one rank for all others.

    Args:
        rank: Of this process.
        world_size: Number of ranks of the job.
        is_first_of_node: Whether this process reports for its node while rank 0 is missing.
        run_alone: The words before a command that make it a job of its own.
        stop_signal: Returns the name of a signal that asks this process to stop, or None.
        limit_seconds: How long to wait.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        is_first_of_node: bool = True,
        run_alone: str = "",
        stop_signal: Callable[[], str | None] = lambda: None,
        limit_seconds: float = LIMIT_SECONDS,
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._is_first_of_node = is_first_of_node
        self._run_alone = run_alone
        self._stop_signal = stop_signal
        self._limit_seconds = limit_seconds
        self._start = time.monotonic()
        self._until = time.strftime("%H:%M:%S", time.localtime(time.time() + limit_seconds))
        self._next_line = self._start + FIRST_LINE_SECONDS
        self._has_reported = False

    def wait(self, address: str, port: int) -> torch.distributed.Store:
        """Meet all ranks at an address, where this process may have met them before.

        Returns:
            A store that all of them are connected to, whose keys are those of this meeting.

        Raises:
            ConfigError: The address cannot be used, two processes have the same rank, or some ranks
                have not come in time.
            StoppedWaiting: A signal came first.
        """
        self._place = f"{address}:{port}"
        key = (os.getpid(), self._place, self._rank, self._world_size)
        store, number = _MET.get(key) or (self._reach_store(address, port), 0)
        # after a restart, torchrun's store still has the keys of the earlier start
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        found = self._gather(torch.distributed.PrefixStore(f"start-{start}-{number}", store))
        _MET[key] = store, number + 1
        return found

    def _reach_store(self, address: str, port: int) -> torch.distributed.Store:
        agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self._rank == 0 and not agent_has_store:
            return self._open_store(address, port)
        self._wait_for_store(address, port)
        return self._connect(address, port)

    def _gather(self, store: torch.distributed.Store) -> torch.distributed.Store:
        if store.add(f"rank-{self._rank}", 1) > 1:
            what = f"another process is already rank {self._rank} of the job at {self._place}"
            raise ConfigError("launch", what, f"Give each process its own rank{self._hint()}")
        here = store.add("here", 1)
        while here < self._world_size:
            self._pause(lambda: self._describe_missing(store))
            here = store.add("here", 0)
        if self._has_reported:
            logger.info(f"all {self._world_size} ranks are here", extra={"stderr": True})
        return store

    def _open_store(self, address: str, port: int) -> torch.distributed.Store:
        try:
            store = torch.distributed.TCPStore(
                address,
                port,
                self._world_size,
                is_master=True,
                timeout=timedelta(seconds=OWN_STORE_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, ValueError) as error:
            if "EADDRINUSE" in str(error) or "already in use" in str(error):
                what = f"port {port} of this machine is already in use"
                remedy = "Set MASTER_PORT to a free port, or end the process that uses this one"
                raise ConfigError("MASTER_PORT", what, remedy) from error
            what = f"rank 0 runs on {socket.gethostname()} and cannot reach itself at {self._place}"
            raise ConfigError(
                "MASTER_ADDR", f"{what} ({first_line(error)[:200]})", "Name the machine of rank 0"
            ) from error
        store.set_timeout(timedelta(seconds=self._limit_seconds))
        return store

    def _wait_for_store(self, address: str, port: int) -> None:
        """Wait until something listens there."""
        while True:
            try:
                socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
                return
            except OSError as error:
                reason = error.strerror or first_line(error)
            self._pause(functools.partial(self._describe_rank_0, reason))

    def _describe_rank_0(self, reason: str) -> str | None:
        where = f"rank 0 at {self._place} ({reason})"
        return f"rank {self._rank} waits for {where}" if self._is_first_of_node else None

    def _connect(self, address: str, port: int) -> torch.distributed.Store:
        limit = timedelta(seconds=self._limit_seconds)
        try:
            return torch.distributed.TCPStore(
                address, port, self._world_size, False, limit, wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            what = f"what listens at {self._place} is not rank 0 ({first_line(error)[:200]})"
            raise ConfigError("MASTER_PORT", what, "Set MASTER_ADDR and MASTER_PORT") from error

    def _pause(self, describe: Callable[[], str | None]) -> None:
        """Sleep for a moment. Say from time to time what is waited for, and not wait forever."""
        if signal := self._stop_signal():
            raise StoppedWaiting(signal)
        now = time.monotonic()
        minutes = f"{self._limit_seconds / 60:.0f} minutes"
        if now >= self._start + self._limit_seconds:
            what = describe() or f"rank {self._rank} of {self._world_size} waits for other ranks"
            remedy = f"Look at what the missing ranks print{self._hint()}"
            raise ConfigError("launch", f"{what}, after {minutes}", remedy)
        if now >= self._next_line:
            self._next_line = now + NEXT_LINES_SECONDS
            if found := describe():
                self._has_reported = True
                line = f"waiting for ranks: {found}, until {self._until} ({minutes}){self._hint()}"
                logger.info(line, extra={"stderr": True})
        time.sleep(POLL_SECONDS)

    def _describe_missing(self, store: torch.distributed.Store) -> str | None:
        """Which ranks are missing. Only the first of those that are here says it."""
        if any(store.check([f"rank-{rank}"]) for rank in range(self._rank)):
            return None
        others = [rank for rank in range(self._world_size) if not store.check([f"rank-{rank}"])]
        here = self._world_size - len(others)
        verb = "is" if here == 1 else "are"
        return (
            f"{here} of {self._world_size} {verb} here, missing: {_shorten(others)}; they meet at "
            f"{self._place}"
        )

    def _hint(self) -> str:
        return f". To run this process alone: {self._run_alone}" if self._run_alone else ""


def _shorten(ranks: Sequence[int]) -> str:
    """``1, 2, 3`` or ``1, 2, ... (510 ranks)``."""
    shown = ", ".join(str(rank) for rank in ranks[:SHOWN_RANKS])
    return shown if len(ranks) <= SHOWN_RANKS else f"{shown}, ... ({len(ranks)} ranks)"
