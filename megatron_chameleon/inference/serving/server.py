"""Runs a service on a socket until a signal ends it."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from megatron_chameleon.inference.serving.app import ChameleonApp, Service
from megatron_chameleon.inference.serving.network.protocol import protocol_of
from megatron_chameleon.inference.serving.network.sockets import listen

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_PRESS_SECONDS = 0.5
"""A launcher passes on a signal that the terminal has sent to its processes too."""
_LAST_WORDS_SECONDS = 2.0
"""For what has been cancelled to tell its client."""
_FORCED_SECONDS = 3.0


def serve(service: Service, sock: socket.socket, ready: Callable[[], object]) -> None:
    """Serve until SIGINT or SIGTERM.

    The first signal refuses new requests and lets running ones finish, for ``grace_seconds``. The
    second one ends them at once.

    Args:
        service: What to serve; its engine is started and stopped here.
        sock: It listens already.
        ready: Called when requests are answered.
    """
    asyncio.run(_Serving(service, sock, ready).run())


class _Serving:
    """The life of a server."""

    def __init__(self, service: Service, sock: socket.socket, ready: Callable[[], object]) -> None:
        self._service, self._sock, self._ready = service, sock, ready
        self._app = ChameleonApp(service)
        limits = service.limits
        config = uvicorn.Config(
            self._app,
            loop="asyncio",
            http=protocol_of(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level=logging.CRITICAL,  # errors are logged where they become responses
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=limits.header_bytes,
        )
        self._server = _Server(config)
        self._first_signal: float | None = None
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        stopping = asyncio.create_task(self._stop_when_told())
        with _handled(lambda number: loop.call_soon_threadsafe(self._on_signal)):
            try:
                await self._service.engine.start()
                if self._first_signal is None:
                    listen(self._sock)
                    self._ready()
                    await self._server.serve(sockets=[self._sock])
            finally:
                stopping.cancel()
                self._app.close()
                await self._service.engine.stop(0)

    def _on_signal(self) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            self._app.answerer.is_draining = True
            self._stopped.set()
        elif now - self._first_signal > _SAME_PRESS_SECONDS:
            self._first_signal = now  # a third one changes nothing
            self._app.answerer.cancel_all()
            self._server.should_exit = self._server.force_exit = True
            _end_process_after(_FORCED_SECONDS)

    async def _stop_when_told(self) -> None:
        await self._stopped.wait()
        answerer, grace = self._app.answerer, self._service.limits.grace_seconds
        if answerer.requests:
            logger.info(
                "stopping: %d requests have %g seconds to finish; a second signal ends them",
                answerer.requests,
                grace,
            )
        await self._wait_for_requests(grace)
        if answerer.requests:
            logger.warning("%d requests did not finish and are cancelled", answerer.requests)
            answerer.cancel_all()
            await self._wait_for_requests(_LAST_WORDS_SECONDS)
        self._server.should_exit = True

    async def _wait_for_requests(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._app.answerer.requests and time.monotonic() < end:
            await asyncio.sleep(0.05)


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _handled(on_signal: Any) -> Iterator[None]:
    """Take the signals while the block runs, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        on_signal(number)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_process_after(seconds: float) -> None:
    """End the process, even if a step of the model holds the event loop."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()
