"""Deliver one event: to a program, as JSON on its standard input, or to a webhook, as a POST.

No text of an event becomes part of a command line: the words of the command are the config's, no
shell reads them, and the event goes to standard input and into environment variables:

    CHAMELEON_EVENT       alarm
    CHAMELEON_EVENT_STEP  1200
    CHAMELEON_EVENT_TEXT  step 1200: the last layer's output norm grew 2.6-fold, ...
    CHAMELEON_EVENT_TIME  2026-11-28T21:40:07.123+00:00
    CHAMELEON_EVENT_HOST  node1
    CHAMELEON_EVENT_JSON  all of it, as on standard input
    CHAMELEON_RUN         the run folder
"""

import base64
import contextlib
import http.client
import json
import os
import select
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from megatron_chameleon import __version__
from megatron_chameleon.errors import one_line
from megatron_chameleon.masking import mask_address
from megatron_chameleon.terminal import escape_line

_TAIL_BYTES = 2000
"""How much of what a program prints is kept: the end of it may say why it failed."""
_POLL_SECONDS = 0.1
_SOCKET_SECONDS = 10.0


class DeliveryError(Exception):
    """An event could not be delivered; the text says why, in a line."""


class Cancelled(Exception):
    """The run ends and does not wait for a delivery any more."""


def run_program(
    command: str, event: Mapping[str, Any], limit_seconds: float, cancelled: threading.Event
) -> None:
    """Run a program with an event, in a process group of its own, which is ended at the limit.

    Args:
        command: Words as a shell would split them; no shell reads them.
        event: The object of ``events.jsonl``, with ``run``.
        limit_seconds: How long it may run.
        cancelled: Set when nobody waits for it any more.

    Raises:
        DeliveryError: It cannot be started, fails or takes too long.
        Cancelled: ``cancelled`` was set first.
    """
    words = shlex.split(command)
    text = json.dumps(event)
    with tempfile.TemporaryFile() as file:  # not a pipe, on which a write may wait for the program
        file.write(text.encode() + b"\n")
        file.seek(0)
        try:
            process = subprocess.Popen(
                words,
                stdin=file,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, **event_variables(event, text)},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise DeliveryError(f"{words[0]} cannot be started ({one_line(error)})") from error
    assert process.stderr is not None
    try:
        tail = _wait(process, process.stderr, time.monotonic() + limit_seconds, cancelled)
    finally:
        if process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stderr.close()
    if tail is None:
        raise DeliveryError(f"{words[0]} was ended after {limit_seconds:g} s")
    if process.returncode:
        end = f"exit code {process.returncode}"
        if process.returncode < 0:
            end = f"signal {-process.returncode}"
        raise DeliveryError(f"{words[0]} ended with {end}{_last_line(tail)}")


def event_variables(event: Mapping[str, Any], text: str) -> dict[str, str]:
    """The environment variables of an event, which is given as JSON too."""
    names = {"": "event", "_STEP": "step", "_TEXT": "text", "_TIME": "time", "_HOST": "host"}
    found = {f"CHAMELEON_EVENT{end}": escape_line(event.get(key, "")) for end, key in names.items()}
    run = str(event.get("run", "")).replace("\0", "")
    return {**found, "CHAMELEON_EVENT_JSON": text, "CHAMELEON_RUN": run}


def _wait(
    process: subprocess.Popen[bytes],
    errors: IO[bytes],
    deadline: float,
    cancelled: threading.Event,
) -> bytes | None:
    """Wait until a process ends, and read what it prints, so that it never waits for us.

    Returns:
        The end of what it printed; None if the time is over.
    """
    tail, is_open = b"", True
    waiting = select.poll()  # unlike select, it takes any number of open files
    waiting.register(errors, select.POLLIN)
    while True:
        has_ended = process.poll() is not None
        if is_open and waiting.poll(0 if has_ended else _POLL_SECONDS * 1000):
            more = os.read(errors.fileno(), 1 << 16)
            tail, is_open = (tail + more)[-_TAIL_BYTES:], bool(more)
        elif has_ended:
            return tail
        elif not is_open:
            time.sleep(_POLL_SECONDS)
        if cancelled.is_set():
            raise Cancelled
        if time.monotonic() > deadline:
            return tail if has_ended else None


def _last_line(tail: bytes) -> str:
    lines = tail.decode("utf-8", "replace").strip().splitlines()
    return f": {escape_line(lines[-1][-300:])}" if lines else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirected POST would arrive as a GET, without the event, or at another's server."""


def post_json(
    url: str, event: Mapping[str, Any], limit_seconds: float, cancelled: threading.Event
) -> None:
    """POST an event as JSON. Redirects are not followed. Any 2xx answer will do.

    Raises:
        DeliveryError: The server cannot be reached, does not answer in time, or refuses it.
    """
    host = mask_address(url)
    parts = urlsplit(url)
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "User-Agent": f"megatron_chameleon/{__version__}",
    }
    if parts.username is not None:  # urllib takes it for a part of the host's name
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    data = json.dumps(event).encode()
    request = urllib.request.Request(url, data, headers, method="POST")
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _NoRedirect(),
    ):
        opener.add_handler(handler)
    try:
        with opener.open(request, timeout=min(limit_seconds, _SOCKET_SECONDS)):
            return  # what the answer says does not matter, however long it is
    except urllib.error.HTTPError as error:
        place = error.headers.get("Location") if error.headers else None
        where = f" to {mask_address(place)}; give that address" if place else ""
        reason = escape_line(str(error.reason))[:200]
        raise DeliveryError(f"{host} answered {error.code} {reason}{where}") from None
    except TimeoutError:
        raise DeliveryError(f"{host} did not answer in time") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)
        text = one_line(cause if isinstance(cause, BaseException) else error)[:200]
        if parts.path.strip("/") and parts.path in text:  # some errors hold the whole address
            text = type(error).__name__
        raise DeliveryError(f"{host} cannot be reached ({text})") from None
