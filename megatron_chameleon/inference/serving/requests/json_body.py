"""Reads the JSON body of a request, within limits of bytes, time and depth."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_chameleon.inference.serving.requests.limits import MIB, Limits
from megatron_chameleon.inference.serving.requests.refusal import Refusal, bad
from megatron_chameleon.json_text import TooDeepError, load_json
from megatron_chameleon.wording import shown

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

DEEPEST = 16
"""Levels of JSON; a message with an image has six."""
_DRAINED_BODIES = 4
_DRAIN_SECONDS = 2.0
"""A body that is too large is read on and dropped for so long, because a client that is still
sending would see a broken connection in place of the answer."""


class BodyReader:
    """Reads bodies; all requests together hold a bounded amount of memory."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held_bytes = 0

    async def read(self, headers: MutableMapping[str, str], receive: Receive) -> bytes:
        """The body of a request.

        Args:
            headers: Of the request, with names in lower case.
            receive: Of ASGI.

        Raises:
            Refusal: It is not JSON by its headers, too large or too slow.
        """
        _check_type(headers)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._limits.body_bytes:
            if "expect" not in headers:  # such a client sends nothing before it is told to
                await self._drain(receive)
            raise self._too_large(f"{int(announced[:20]):,}")
        taken = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                chunks: list[bytes] = []
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise asyncio.CancelledError
                    chunk = message.get("body", b"")
                    taken += len(chunk)
                    self._held_bytes += len(chunk)
                    if taken > self._limits.body_bytes:
                        chunks.clear()
                        if message.get("more_body"):
                            await self._drain(receive)
                        raise self._too_large(f"more than {self._limits.body_bytes:,}")
                    self._check_memory()
                    chunks.append(chunk)
                    more = message.get("more_body", False)
                return b"".join(chunks)
        except TimeoutError as error:
            what = f"it did not arrive within {self._limits.body_seconds:g} seconds"
            close = {"connection": "close"}
            raise Refusal(408, "body", what, "Send it faster", headers=close) from error
        finally:
            self._held_bytes -= taken

    def _check_memory(self) -> None:
        if self._held_bytes > self._limits.bodies_bytes:
            what = f"the bodies that arrive now have more than {self._limits.bodies_bytes:,} bytes"
            again = {"retry-after": "1", "connection": "close"}
            raise Refusal(429, "server", what, "Send it again later", headers=again)

    def _too_large(self, size: str) -> Refusal:
        limit = self._limits.body_bytes
        return Refusal(
            413,
            "body",
            f"it has {size} bytes, and the limit is {limit:,} ({limit // MIB:,} MiB)",
            "Send smaller or fewer images, or start the server with a larger --max-body-mib",
            code="request_too_large",
            headers={"connection": "close"},
        )

    async def _drain(self, receive: Receive) -> None:
        left = _DRAINED_BODIES * self._limits.body_bytes
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while left > 0:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return
                    left -= len(message.get("body", b""))
        except TimeoutError:
            return


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a body that must be one JSON object.

    Raises:
        Refusal: It is not, an object has a key twice, a number is NaN or infinite, or the nesting
            is deeper than ``DEEPEST``.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"it is not UTF-8 (at byte {error.start:,})"
        raise bad("body", what, "Encode it as UTF-8") from error
    try:
        value = load_json(text, DEEPEST, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except TooDeepError as error:
        raise bad("body", f"its JSON is {error}", "Send flatter JSON") from error
    except ValueError as error:
        what = f"it is not valid JSON ({str(error).splitlines()[0][:200]})"
        raise bad("body", what, "Send one JSON object") from error
    if not isinstance(value, dict):
        raise bad("body", "it is not a JSON object", "Send an object, such as {...}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise bad("body", f"an object has the key {shown(name[:100])} twice", "Send each key once")
    return fields


def _refuse_constant(name: str) -> Any:
    raise bad("body", f"{name} is not a number of JSON", "Send a finite number")


def _check_type(headers: MutableMapping[str, str]) -> None:
    """Refuse what is not JSON: a page of another site can send a form, but no JSON, unasked."""
    remedy = "Send JSON with the header Content-Type: application/json"
    kind, *parameters = (
        word.strip() for word in headers.get("content-type", "").lower().split(";")
    )
    if kind != "application/json":
        what = f"{shown(kind[:100])} is not application/json" if kind else "it is missing"
        raise Refusal(415, "Content-Type", what, remedy)
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "charset" and value.strip("\"' ") not in ("utf-8", "utf8", "us-ascii"):
            raise Refusal(415, "Content-Type", f"{shown(value[:100])} is not UTF-8", remedy)
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        what = f"{shown(encoding[:100])} is not supported"
        raise Refusal(415, "Content-Encoding", what, "Send the body uncompressed")
