"""A small HTTP client whose connections can be slow, or break off anywhere.

Ordinary clients read as fast as they can and close in order. This one works on sockets, one
connection for each request.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str
    port: int
    key: str | None = None


@dataclass
class Response:
    """What came back, as far as it was read."""

    status: int
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)
    is_complete: bool = False

    def json(self) -> dict[str, Any]:
        value = json.loads(bytes(self.body))
        assert isinstance(value, dict)
        return value

    def events(self) -> list[dict[str, Any]]:
        """The objects of a stream, without comments and without its end."""
        lines = bytes(self.body).decode("utf-8").split("\n")
        data = (line.removeprefix("data: ") for line in lines if line.startswith("data: "))
        return [json.loads(text) for text in data if text != "[DONE]"]

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing at its end."""
        return self.is_complete and (not self.is_stream or b"data: [DONE]" in self.body)


class Connection:
    """One connection for one request.

    Args:
        address: Where to connect to.
        receive_buffer: Bytes that the kernel holds for this side; None is its own choice. A small
            one makes the server notice that its client reads slowly.
    """

    def __init__(self, address: Address, receive_buffer: int | None = None) -> None:
        self._address, self._receive_buffer = address, receive_buffer
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> "Connection":
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if self._receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        sock.setblocking(False)
        try:
            place = (self._address.host, self._address.port)
            await asyncio.get_running_loop().sock_connect(sock, place)
            limit = self._receive_buffer or 1 << 16
            self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=limit)
        except BaseException:
            sock.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close without waiting for what is still under way."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def send(self, method: str, path: str, body: bytes = b"", share: float = 1.0) -> None:
        """Send a request, or only the first ``share`` of its bytes."""
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self._address.host}:{self._address.port}",
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        if self._address.key:
            lines.append(f"Authorization: Bearer {self._address.key}")
        data = "\r\n".join([*lines, "", ""]).encode() + body
        assert self._writer is not None
        self._writer.write(data[: round(len(data) * share)])
        await self._writer.drain()

    async def head(self) -> Response:
        """The status and headers of the response."""
        assert self._reader is not None
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        return Response(int(first.split()[1]), headers)

    async def read(self, response: Response, piece: int = 1 << 16, pause: float = 0.0) -> None:
        """Read the body to its end.

        Args:
            response: Gets what is read.
            piece: The most bytes at a time.
            pause: Seconds between two of them.
        """
        async for data in self._pieces(response, piece):
            response.body += data
            if pause:
                await asyncio.sleep(pause)
        response.is_complete = True

    async def read_some(self, response: Response, size: int) -> None:
        """Read at least ``size`` bytes of the body, or all if it has fewer."""
        async for data in self._pieces(response, size):
            response.body += data
            if len(response.body) >= size:
                return

    async def _pieces(self, response: Response, piece: int) -> AsyncIterator[bytes]:
        reader = self._reader
        assert reader is not None
        if response.headers.get("transfer-encoding") != "chunked":
            left = int(response.headers.get("content-length", "0"))
            while left:
                data = await reader.read(min(piece, left))
                if not data:
                    raise EOFError(f"{left} bytes of the body are missing")
                left -= len(data)
                yield data
            return
        while size := int(await reader.readuntil(b"\r\n"), 16):
            while size:
                data = await reader.read(min(piece, size))
                if not data:
                    raise EOFError("a chunk is missing")
                size -= len(data)
                yield data
            await reader.readexactly(2)
        await reader.readexactly(2)


async def ask(address: Address, path: str, body: dict[str, Any] | None = None) -> Response:
    """Send a request and read the whole response."""
    async with Connection(address) as connection:
        data = b"" if body is None else json.dumps(body).encode()
        await connection.send("GET" if body is None else "POST", path, data)
        response = await connection.head()
        await connection.read(response)
        return response
