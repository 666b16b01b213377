"""Worker processes: their order, how far they run ahead, and their end."""

import json
import os
import signal
import threading
import time

import pytest

from megatron_chameleon.data.inputs.records import Block, FileSlice, Position
from megatron_chameleon.data.preprocess import memory_budget
from megatron_chameleon.data.preprocess.encode import EncodedBlock
from megatron_chameleon.data.preprocess.memory_budget import MemoryBudget
from megatron_chameleon.data.preprocess.options import EncodeOptions
from megatron_chameleon.data.preprocess.workers import encoding_pool
from megatron_chameleon.data.workers import pool as workers
from megatron_chameleon.errors import DataError

MIB = 1 << 20


def block(record, payload=b""):
    return Block("f.jsonl", 0, record, Position(record=record), payload)


@pytest.fixture
def no_processes(monkeypatch):
    """A pool whose workers answer at once, last block first."""
    pool = workers.Pool.__new__(workers.Pool)
    pool._workers = [workers._Worker(None, None) for _ in range(2)]
    pool._most_workers = 2
    pool._in_flight = workers.deque()
    pool._most_bytes = 64 * MIB
    pool.sent = []

    def send(block):
        task = workers._Task("", workers._size_of(block))
        pool._in_flight.append(task)
        pool.sent.append((task, block))

    def receive():
        task, block = pool.sent.pop()
        task.result, task.is_done = EncodedBlock(None, [], block.after), True

    monkeypatch.setattr(pool, "_send", send)
    monkeypatch.setattr(pool, "_receive", receive)
    return pool


def test_blocks_follow_the_results_closely_and_in_order(no_processes):
    """The reader must not run ahead of the writer: memory would grow with the input."""
    read = 0

    def blocks():
        nonlocal read
        for i in range(10):
            read += 1
            yield block(i)

    order = []
    for written, result in enumerate(no_processes.work(blocks())):
        assert read - written <= 5
        order.append(result.after.record)
    assert order == list(range(10))


def test_large_blocks_are_few_in_flight(no_processes):
    most = 0
    blocks = (block(i, FileSlice(0, 30 * MIB)) for i in range(9))
    for _ in no_processes.work(blocks):
        most = max(most, len(no_processes._in_flight) + 1)
    assert most == 2
    (alone,) = no_processes.work(iter([block(0, bytes(65 * MIB))]))
    assert alone.after.record == 0


@pytest.fixture
def pool(tokenizer):
    pool = encoding_pool(tokenizer, EncodeOptions(), 2)
    yield pool
    pool.kill()
    assert all(worker.process.exitcode is not None for worker in pool._workers)


def test_a_killed_worker_and_a_stuck_one(pool, tmp_path):
    """The killed one is named; the stuck one does not outlive the pool."""
    lines = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(50))
    blocks = [block(50 * i, lines) for i in range(4)]
    found = list(pool.work(iter(blocks)))
    assert [len(b.tokens.lengths) for b in found] == [50] * 4
    assert [b.after.record for b in found] == [0, 50, 100, 150]
    first, second = (worker.process.pid for worker in pool._workers)
    os.kill(second, signal.SIGSTOP)
    os.kill(first, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (first, signal.SIGKILL)).start()
    message = rf"f\.jsonl:1: worker process {first} was killed \(SIGKILL\) at or after this .*fewer"
    with pytest.raises(DataError, match=message):
        list(pool.work(iter(blocks)))
    started = time.monotonic()
    pool.kill()
    assert time.monotonic() - started < 2


def test_no_more_workers_are_started_than_blocks_keep_busy(tokenizer):
    pool = encoding_pool(tokenizer, EncodeOptions(), 1024)
    lines = b'{"text": "a line"}\n'
    try:
        found = list(pool.work(block(i, lines) for i in range(2)))
        assert [b.after.record for b in found] == [0, 1]
        assert len(pool._workers) == 2
    finally:
        pool.kill()


def test_an_error_of_a_worker_is_that_of_the_command(pool, tmp_path):
    missing = Block(str(tmp_path / "gone.jsonl"), 0, 0, Position(), FileSlice(0, 9))
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file\. Check the path"):
        list(pool.work(iter([missing])))


def test_memory_is_shared_and_who_asks_first_gets_first(monkeypatch):
    monkeypatch.setattr(memory_budget, "LEAST_BYTES", 100 * MIB)
    monkeypatch.setattr(memory_budget, "BYTES_PER_WORKER", 0)
    budget = MemoryBudget()
    held, order = [0], []
    lock = threading.Lock()

    def take(size):
        with budget.reserve(size * MIB):
            with lock:
                held[0] += min(size, 100)
                order.append((size, held[0]))
            time.sleep(0.05)
            with lock:
                held[0] -= min(size, 100)

    threads = []
    for size in (60, 900, 40, 40, 1):
        threads.append(threading.Thread(target=take, args=(size,)))
        threads[-1].start()
        time.sleep(0.01)
    for thread in threads:
        thread.join(5)
    assert [size for size, _ in order if size > 2] == [60, 900, 40, 40]
    assert max(most for _, most in order) <= 102
