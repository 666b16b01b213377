"""uvicorn's HTTP connection, with limits of time and number.

uvicorn waits without end for the headers of a request, and for a client that does not read. Here
each of the two has a deadline, and connections above a number are refused.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.refusal import Refusal, bad

_LEAST_BYTES_PER_SECOND = 1024
"""A client that reads more slowly than this for ``Limits.stalled_seconds`` counts as stalled."""


def protocol_of(limits: Limits) -> type[asyncio.Protocol]:
    """The class of the connections of a server with these limits."""

    class Connection(TimedProtocol):
        own_limits = limits

    return Connection


class TimedProtocol(H11Protocol):
    """One connection."""

    own_limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.own_limits.connections:
            what = f"it has {self.own_limits.connections:,} connections already"
            again = {"retry-after": "5"}
            self._refuse(Refusal(503, "server", what, "Send it again later", headers=again))
            return
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()
        elif self._header_timer is None:
            self._start_header_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_stall_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_closing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_closing()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch_closing()

    def send_400_response(self, msg: str) -> None:
        what = "it is not a valid HTTP request, or its headers are too large"
        remedy = f"Send HTTP/1.1 with at most {self.own_limits.header_bytes:,} bytes of headers"
        self._refuse(bad("request", what, remedy))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what never became a request, and close."""
        body = json.dumps(refusal.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **refusal.headers,
        }
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=refusal.status, headers=pairs),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._watch_closing()

    def _start_header_timer(self) -> None:
        seconds = self.own_limits.header_seconds
        self._header_timer = self.loop.call_later(seconds, self._headers_are_late)

    def _headers_are_late(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            what = f"its headers did not arrive within {self.own_limits.header_seconds:g} seconds"
            self._refuse(Refusal(408, "request", what, "Send it faster"))

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _start_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self._unread_bytes = self.transport.get_write_buffer_size()
        seconds = self.own_limits.stalled_seconds
        self._stall_timer = self.loop.call_later(seconds, self._check_stall)

    def _check_stall(self) -> None:
        """Nothing is written while the buffer is full, so that what it has lost has been read."""
        read = self._unread_bytes - self.transport.get_write_buffer_size()
        self._stall_timer = None
        if read < self.own_limits.stalled_seconds * _LEAST_BYTES_PER_SECOND:
            self.transport.abort()
        else:
            self._start_stall_timer()

    def _watch_closing(self) -> None:
        """A connection closes when its client has read everything, or when it stalls."""
        if self.transport.is_closing():
            self._stop_header_timer()
            if self.transport.get_write_buffer_size():
                self._start_stall_timer()

    def _stop_timers(self) -> None:
        self._stop_header_timer()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
