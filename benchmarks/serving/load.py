"""Load on `chameleon serve`: many clients at once, some of them slow, some leaving in the middle.

    python -W ignore -m benchmarks.serving.load runs/digits
    python -W ignore -m benchmarks.serving.load exported/7b --seconds 600 -- --device cuda

Every answer is compared with the answer to the same request alone, which is asked for first. All
requests are greedy or have a seed, so they must be equal. A third of the clients read slowly, or
leave while they send, wait or read. The queue is shorter than the number of clients, so that the
server has to refuse some requests (429). The program watches the server's memory, and looks at the
end whether nothing runs any more, whether the server still answers, and whether it stops when asked
to. What follows ``--`` goes to ``chameleon serve``.

The exit code is 1 if anything went wrong.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.raw_http import Address, Connection, Response, ask
from benchmarks.serving.wishes import Wish, wishes

MOST_GROWTH = 0.05
"""Share by which the server's memory may grow from the first third of the load to the last."""
SMALL_BUFFER = 4096


@dataclass
class Outcome:
    """What all clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)
    """Answers that were compared, by kind of client."""
    faults: list[str] = field(default_factory=list)
    left: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of whole answers, by name of the wish; clients that read slowly are not in it."""
    first_byte_seconds: list[float] = field(default_factory=list)
    tokens: int = 0


def answer_of(response: Response) -> dict[str, Any]:
    """Token ids, text and number of images of an answer, whether it came as a stream or not."""
    ids: list[int] = []
    texts: list[str] = []
    images = 0
    for chunk in response.events() if response.is_stream else [response.json()]:
        if "error" in chunk:
            raise ValueError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            ids += choice.get("token_ids") or []
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            content = said.get("content")
            parts = content if isinstance(content, list) else [{"text": content or ""}]
            texts += [part["text"] for part in parts if "text" in part]
            images += sum("image_url" in part for part in parts) + len(said.get("images") or [])
    return {"token_ids": ids, "text": "".join(texts), "images": images}


class Load:
    """Clients that send requests until the time is over.

    Args:
        address: The server's.
        expected: The answer to each wish alone.
        seed: Of all choices.
    """

    def __init__(self, address: Address, expected: list[tuple[Wish, dict[str, Any]]], seed: int):
        self.address, self.expected = address, expected
        self.outcome = Outcome()
        self._seed = seed

    async def run(self, clients: int, seconds: float) -> Outcome:
        """Let clients ask for some seconds; those that wait for an answer then still get it."""
        end = time.monotonic() + seconds
        third = clients // 3
        kinds = ["slow"] * (third // 2) + ["leaver"] * (third - third // 2)
        kinds += ["plain"] * (clients - third)
        jobs = (self._client(kind, number, end) for number, kind in enumerate(kinds))
        await asyncio.gather(*jobs)
        return self.outcome

    async def _client(self, kind: str, number: int, end: float) -> None:
        draw = random.Random(f"{self._seed}-{number}")
        await asyncio.sleep(draw.random())
        while time.monotonic() < end:
            wish, expected = draw.choice(self.expected)
            pause = draw.uniform(0, 0.2)
            try:
                if kind == "leaver":
                    await self._leave(wish, draw)
                else:
                    pause += await self._ask(kind, wish, expected, draw)
            except (OSError, EOFError, ValueError, KeyError) as error:
                self._fault(f"{kind}, {wish.name}: {type(error).__name__}: {error}")
            await asyncio.sleep(min(pause, max(0.0, end - time.monotonic())))

    async def _ask(
        self, kind: str, wish: Wish, expected: dict[str, Any], draw: random.Random
    ) -> float:
        """Ask, and compare the answer; returns seconds to wait before the next request."""
        is_slow = kind == "slow"
        body = {**wish.body, "stream": is_slow or draw.random() < 0.5}
        started = time.monotonic()
        async with Connection(self.address, SMALL_BUFFER if is_slow else None) as connection:
            await connection.send("POST", wish.path, json.dumps(body).encode())
            response = await connection.head()
            first = time.monotonic() - started
            if is_slow:
                await connection.read(response, piece=512, pause=draw.uniform(0.02, 0.2))
            else:
                await connection.read(response)
        self.outcome.statuses[response.status] += 1
        if response.status == 429:
            return self._told_to_wait(response, draw)
        if response.status != 200:
            self._fault(f"{kind}, {wish.name}: {response.status} {bytes(response.body[:300])!r}")
            return 1.0
        self._compare(kind, wish, response, expected)
        if not is_slow:
            self.outcome.seconds[wish.name].append(time.monotonic() - started)
            self.outcome.first_byte_seconds.append(first)
        return 0.0

    async def _leave(self, wish: Wish, draw: random.Random) -> None:
        """Begin a request and go: while it is sent, while it waits, or while its answer comes."""
        body = json.dumps({**wish.body, "stream": True}).encode()
        async with Connection(self.address) as connection:
            share = draw.choice((draw.random(), 1.0, 1.0, 1.0))
            await connection.send("POST", wish.path, body, share)
            if share == 1.0 and draw.random() < 0.5:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(draw.uniform(0, 3)):
                        response = await connection.head()
                        await connection.read_some(response, draw.randrange(1, 2000))
            else:
                await asyncio.sleep(draw.uniform(0, 1))
        self.outcome.left += 1

    def _told_to_wait(self, response: Response, draw: random.Random) -> float:
        seconds = response.headers.get("retry-after", "")
        if not seconds.isdigit():
            self._fault(f"429 with Retry-After {seconds!r}")
            return 1.0
        return min(3.0, float(seconds)) * draw.uniform(0.5, 1)

    def _compare(self, kind: str, wish: Wish, response: Response, expected: dict[str, Any]) -> None:
        if not response.is_whole:
            self._fault(f"{kind}, {wish.name}: the answer is not whole")
            return
        found = answer_of(response)
        if found != expected:
            self._fault(f"{kind}, {wish.name}: {found} is not {expected}")
        self.outcome.checked[kind] += 1
        self.outcome.tokens += len(found["token_ids"])

    def _fault(self, what: str) -> None:
        self.outcome.faults.append(what)
        if len(self.outcome.faults) <= 20:
            print(f"fault: {what}", file=sys.stderr, flush=True)


class Server:
    """A running ``chameleon serve``."""

    def __init__(self, process: "subprocess.Popen[str]", address: Address) -> None:
        self.process, self.address = process, address
        self.memory: list[tuple[float, int]] = []
        """Seconds of the clock, and bytes."""

    def memory_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    async def watch(self) -> None:
        """Note the memory, until cancelled."""
        while True:
            self.memory.append((time.monotonic(), self.memory_bytes()))
            await asyncio.sleep(0.5)

    def stop(self) -> int:
        """Stop it as an administrator does; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def served(model: str, options: list[str]) -> Iterator[Server]:
    """Start the server on a free port."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_chameleon", "serve", model]
    process = subprocess.Popen(
        [*command, "--port", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            name, _, url = line.strip().partition(": ")
            if name == "page":
                host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
                key = os.environ.get("CHAMELEON_API_KEY")
                yield Server(process, Address(host, int(port), key))
                return
        sys.exit(f"the server ended with exit code {process.wait()}")
    finally:
        process.kill()
        process.wait()


async def alone(address: Address) -> list[tuple[Wish, dict[str, Any]]]:
    """Every wish with its answer while nothing else runs."""
    about = (await ask(address, "/v1/models")).json()["data"][0]["chameleon"]
    found = []
    for wish in wishes(about["images_out"], about["images_in"]):
        response = await ask(address, wish.path, wish.body)
        if response.status != 200:
            sys.exit(f"{wish.name}: {response.status} {bytes(response.body)!r}")
        found.append((wish, answer_of(response)))
    return found


async def measure(server: Server, args: argparse.Namespace) -> tuple[Outcome, dict[str, Any]]:
    """Load the server, and see that it is idle and well afterwards."""
    expected = await alone(server.address)
    print(f"{len(expected)} requests answered alone", file=sys.stderr, flush=True)
    load = Load(server.address, expected, args.seed)
    watching = asyncio.create_task(server.watch())
    started = time.monotonic()
    outcome = await load.run(args.clients, args.seconds)
    seconds = time.monotonic() - started
    watching.cancel()
    await asyncio.sleep(2)  # leavers' answers end at the next step
    health = (await ask(server.address, "/health")).json()
    if health["running"] or health["waiting"]:
        outcome.faults.append(f"something runs although all clients have gone: {health}")
    for wish, answer in expected:
        if answer_of(await ask(server.address, wish.path, wish.body)) != answer:
            outcome.faults.append(f"{wish.name}: another answer after the load")
    return outcome, figures(outcome, server, seconds)


def figures(outcome: Outcome, server: Server, seconds: float) -> dict[str, Any]:
    """What is reported."""
    whole = [s for group in outcome.seconds.values() for s in group]
    sizes = np.array([size for _, size in server.memory], dtype=float) / 2**20
    third = max(1, len(sizes) // 3)
    return {
        "seconds": round(seconds, 1),
        "answers compared": dict(outcome.checked),
        "faults": len(outcome.faults),
        "statuses": {str(status): n for status, n in sorted(outcome.statuses.items())},
        "clients that left": outcome.left,
        "tokens per second": round(outcome.tokens / seconds, 1),
        "answer seconds p50, p95, max": _percentiles(whole),
        "first byte seconds p50, p95, max": _percentiles(outcome.first_byte_seconds),
        "memory MiB, first and last third": [
            round(float(part.mean()), 1) for part in (sizes[:third], sizes[-third:])
        ],
        "memory MiB, largest": round(float(sizes.max()), 1),
    }


def _percentiles(values: list[float]) -> list[float]:
    return [round(float(v), 2) for v in np.percentile(values or [0.0], (50, 95, 100))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a run folder, a checkpoint or an exported folder")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--queue", type=int, default=64, help="answers that may wait")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("serve", nargs="*", help="options of chameleon serve, after --")
    args = parser.parse_args()
    with served(args.model, ["--max-queue", str(args.queue), *args.serve]) as server:
        outcome, found = asyncio.run(measure(server, args))
        code = server.stop()
    if code not in (0, 143):
        outcome.faults.append(f"after SIGTERM the server ended with exit code {code}")
    first, last = found["memory MiB, first and last third"]
    if args.seconds >= 60 and last > first * (1 + MOST_GROWTH):
        outcome.faults.append(f"the server's memory grew from {first} to {last} MiB")
    found["faults"] = len(outcome.faults)
    for name, value in found.items():
        print(f"{name:36} {value}")
    for fault in outcome.faults[:20]:
        print(f"fault: {fault}")
    if args.json:
        args.json.write_text(json.dumps({**found, "list": outcome.faults}, indent=1) + "\n")
    sys.exit(1 if outcome.faults else 0)


if __name__ == "__main__":
    main()
