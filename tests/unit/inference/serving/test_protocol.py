"""Connections: clients that stall are cut off, and nothing of theirs is kept."""

import asyncio
import contextlib
import logging
import socket
import time
from typing import Any

import uvicorn

from megatron_chameleon.inference.serving.network.protocol import protocol_of
from megatron_chameleon.inference.serving.network.sockets import bind, is_loopback, listen, url_of
from megatron_chameleon.inference.serving.requests.limits import Limits

PART = b"x" * (64 << 10)


class Endless:
    """An application that sends without end, and says how its requests ended."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.ends: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        parts = 4 if scope["path"] == "/short" else 10**9
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(self._gone(receive))
        while parts and not gone.done():
            await send({"type": "http.response.body", "body": PART, "more_body": True})
            self.sent_bytes += len(PART)
            parts -= 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self.ends.append("gone" if gone.done() else "done")
        gone.cancel()

    async def _gone(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


async def talk(app: Endless, limits: Limits, path: str, client: Any) -> float:
    """Let a client talk to a server; the seconds until its request has ended."""
    sock = bind("127.0.0.1", 0)
    listen(sock)
    config = uvicorn.Config(
        app,
        http=protocol_of(limits),
        lifespan="off",
        log_config=None,
        log_level=logging.CRITICAL,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([sock]))
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", sock.getsockname()[1]))
    await loop.sock_sendall(connection, f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    started = time.monotonic()
    reading = asyncio.create_task(client(loop, connection))
    while not app.ends:
        await asyncio.sleep(0.01)
        assert time.monotonic() - started < 10
    while server.server_state.connections and path == "/endless":
        await asyncio.sleep(0.01)
        assert time.monotonic() - started < 10
    seconds = time.monotonic() - started
    reading.cancel()
    connection.close()
    server.should_exit = True
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    return seconds


async def silent(loop: Any, connection: Any) -> None:
    await asyncio.sleep(60)


async def trickling(loop: Any, connection: Any) -> None:
    while await loop.sock_recv(connection, 100):
        await asyncio.sleep(0.05)


async def quick(loop: Any, connection: Any) -> None:
    while await loop.sock_recv(connection, 1 << 16):
        pass


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    for client in (silent, trickling):
        app = Endless()
        seconds = asyncio.run(talk(app, Limits(stalled_seconds=0.2), "/endless", client))
        assert app.ends == ["gone"] and 0.2 <= seconds < 5
        assert app.sent_bytes < 16 << 20  # what the kernel's buffers take


def test_a_client_that_reads_gets_everything() -> None:
    app = Endless()
    asyncio.run(talk(app, Limits(stalled_seconds=0.2), "/short", quick))
    assert app.ends == ["done"]


def test_hosts() -> None:
    assert all(
        map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LocalHost"))
    )
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com", ""):
        assert not is_loopback(host)
    with bind("127.0.0.1", 0) as sock:
        assert url_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}/"
    with bind("0.0.0.0", 0) as sock:
        assert url_of(sock).startswith("http://127.0.0.1:")
