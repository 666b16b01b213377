"""Ranks meet before anything else, and what is missing is named."""

import logging
import socket
import threading
import time

import pytest

from command_server import free_port
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.parallel import meeting
from megatron_chameleon.parallel.meeting import Meeting, StoppedWaiting

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(meeting, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(meeting, "POLL_SECONDS", 0.01)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    caplog.set_level(logging.INFO, meeting.logger.name)


def test_all_ranks_get_one_store() -> None:
    port = free_port()
    stores = {}

    def join(rank: int) -> None:
        stores[rank] = Meeting(rank, 3).wait(HOST, port)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(timeout=30)
    stores[2].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_rank_0_names_the_missing_ranks(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    alone = "env -u RANK chameleon train"
    with pytest.raises(ConfigError) as caught:
        Meeting(0, 3, run_alone=alone, limit_seconds=0.3).wait(HOST, port)
    here = f"1 of 3 is here, missing: 1, 2; they meet at {HOST}:{port}"
    line = caplog.records[0].getMessage()
    assert line.startswith(f"waiting for ranks: {here}, until ")
    assert line.endswith(f"To run this process alone: {alone}")
    assert len(caplog.records) == 1, "the next line comes a minute later"
    assert here in str(caught.value) and alone in str(caught.value)


def test_a_rank_without_rank_0(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=f"rank 1 waits for rank 0 at {HOST}:{port} .*refused"):
        Meeting(1, 2, limit_seconds=0.3).wait(HOST, port)
    assert "rank 1 waits for rank 0" in caplog.text
    caplog.clear()
    with pytest.raises(ConfigError, match="rank 1 of 2 waits for other ranks"):
        Meeting(1, 2, is_first_of_node=False, limit_seconds=0.1).wait(HOST, port)
    assert caplog.text == "", "one rank of each node speaks"


def test_a_signal_ends_the_wait() -> None:
    start = time.monotonic()

    def stop() -> str | None:
        return "SIGTERM" if time.monotonic() > start + 0.1 else None

    with pytest.raises(StoppedWaiting, match="SIGTERM"):
        Meeting(0, 2, stop_signal=stop).wait(HOST, free_port())


def test_two_processes_of_one_rank() -> None:
    port = free_port()
    with pytest.raises(ConfigError):
        Meeting(0, 2, limit_seconds=0.05).wait(HOST, port)
    first = Meeting(0, 1)  # its store stays open
    store = first.wait(HOST, port)
    with pytest.raises(ConfigError, match=r"another process is already rank 1|rank 1"):
        Meeting(1, 3, limit_seconds=0.2).wait(HOST, port)
    with pytest.raises(ConfigError, match="another process is already rank 1 of the job"):
        Meeting(1, 3, limit_seconds=0.2).wait(HOST, port)
    del store


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"MASTER_PORT: port {port} of this machine is alr"):
            Meeting(0, 2).wait(HOST, port)


def test_many_missing_ranks_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"missing: 1, 2, 3, .*12, \.\.\. \(511 ranks\); they"):
        Meeting(0, 512, limit_seconds=0.05).wait(HOST, free_port())


def test_the_ranks_of_a_program_meet_for_each_of_its_runs() -> None:
    port = free_port()
    stores = {}

    def train_three_times(rank: int) -> None:
        for run in range(3):
            stores[run, rank] = Meeting(rank, 2).wait(HOST, port)
            time.sleep(0.1 * rank)  # rank 0 is at its next meeting before rank 1 has left

    threads = [threading.Thread(target=train_three_times, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for run in range(3):
        assert stores[run, 0].add("key", 1) == 1, "the key of an earlier run"
        assert stores[run, 1].add("key", 1) == 2
