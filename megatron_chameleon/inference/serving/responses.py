"""Sends answers to a client: as one object, or as a stream of server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from megatron_chameleon.inference.answers.stream import ImageCodes, ImageDone, TextDelta
from megatron_chameleon.inference.engine.interface import TokenRequest
from megatron_chameleon.inference.serving.answering import Answerer, Finish, Piece, Ping, Place
from megatron_chameleon.inference.serving.formats import (
    Format,
    Part,
    Reply,
    Usage,
    image_part,
    text_part,
)
from megatron_chameleon.inference.serving.metrics import Metrics
from megatron_chameleon.inference.serving.model import PictureMaker
from megatron_chameleon.inference.serving.requests.refusal import Refusal
from megatron_chameleon.inference.serving.requests.sampling import Wishes

logger = logging.getLogger(__name__)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would hold back a stream
}


@dataclass(frozen=True)
class Job:
    """A request that has been read, and how it is answered."""

    wishes: Wishes
    requests: list[TokenRequest]
    """One for each answer."""
    prompts: list[list[int]]
    format: Format


@dataclass
class _Draft:
    """An answer while it grows."""

    parts: list[Part] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def end_text(self) -> None:
        if self.texts:
            self.parts.append(text_part("".join(self.texts)))
            self.texts = []


class Responder:
    """Answers jobs."""

    def __init__(self, answerer: Answerer, pictures: PictureMaker, metrics: Metrics) -> None:
        self._answerer, self._pictures, self._metrics = answerer, pictures, metrics

    async def respond(self, job: Job, place: Place, send: Send) -> None:
        """Send the whole response.

        Raises:
            Refusal: Nothing has been sent yet; the caller sends the refusal.
        """
        self._metrics.prompt_tokens.inc(sum(map(len, job.prompts)))
        if job.wishes.stream:
            await self._stream(job, place, send)
        else:
            await send_json(send, 200, await self._whole(job, place))

    async def _whole(self, job: Job, place: Place) -> dict[str, Any]:
        drafts = [_Draft() for _ in job.requests]
        ends: dict[int, Finish] = {}
        async with self._pieces(job, place) as pieces:
            async for index, piece in pieces:
                if isinstance(piece, TextDelta):
                    drafts[index].texts.append(piece.text)
                elif isinstance(piece, ImageDone):
                    drafts[index].end_text()
                    drafts[index].parts.append(image_part(await self._drawn(piece)))
                elif isinstance(piece, Finish):
                    drafts[index].end_text()
                    ends[index] = piece
        replies = [
            Reply(draft.parts, ends[index].reason, ends[index].token_ids)
            for index, draft in enumerate(drafts)
        ]
        return job.format.whole(replies, _usage(job, ends))

    async def _stream(self, job: Job, place: Place, send: Send) -> None:
        stream = _EventStream(send, job.wishes.usage_in_stream)
        ends: dict[int, Finish] = {}
        try:
            async with self._pieces(job, place) as pieces:
                async for index, piece in pieces:
                    if isinstance(piece, Ping):
                        await stream.ping()
                        continue
                    if isinstance(piece, Finish):
                        ends[index] = piece
                    await stream.open([job.format.opening(i) for i in range(len(job.requests))])
                    await stream.send(await self._chunk(job, index, piece))
        except Refusal as refusal:
            if not stream.is_open:
                raise
            await stream.end_with(refusal)
            raise StreamBroken(refusal.status) from refusal
        except asyncio.CancelledError:
            if not (stream.is_open and self._answerer.is_draining):
                raise
            await stream.end_with(stopping())
            raise StreamBroken(503) from None
        if job.wishes.usage_in_stream:
            await stream.send(job.format.usage(_usage(job, ends)))
        await stream.end()

    async def _chunk(self, job: Job, index: int, piece: Piece) -> dict[str, Any] | None:
        """What a stream says of an event; None if it says nothing."""
        if isinstance(piece, TextDelta):
            return job.format.text(index, piece.text)
        if isinstance(piece, ImageDone):
            url = await self._drawn(piece)
            part = {**image_part(url), "index": piece.index, "complete": True}
            return job.format.image(index, part)
        if isinstance(piece, ImageCodes):
            url = await self._pictures.growing(piece)
            progress = round(len(piece.codes) / piece.grid.codes, 4)
            part = {**image_part(url), "index": piece.index, "complete": False}
            return job.format.image(index, {**part, "progress": progress})
        if isinstance(piece, Finish):
            return job.format.closing(index, piece.reason, piece.token_ids)
        return None

    async def _drawn(self, image: ImageDone) -> str:
        self._metrics.images.labels("out").inc()
        return await self._pictures.whole(image.image)

    def _pieces(self, job: Job, place: Place) -> Any:
        growing = job.wishes.stream and job.wishes.growing_images
        pieces = self._answerer.answer(job.requests, place, growing)
        return aclosing(cast(AsyncGenerator[tuple[int, Piece]], pieces))


class StreamBroken(Exception):
    """A stream has ended with an error event, which the client has got.

    Args:
        status: What the response would have had.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _EventStream:
    """A response of server-sent events."""

    def __init__(self, send: Send, has_usage: bool) -> None:
        self._send, self._has_usage = send, has_usage
        self.is_open = self._has_begun = False

    async def open(self, openings: list[dict[str, Any] | None]) -> None:
        """Send what comes before everything else, once."""
        if self._has_begun:
            return
        self._has_begun = True
        for opening in openings:
            await self.send(opening)

    async def send(self, chunk: dict[str, Any] | None) -> None:
        if chunk is None:
            return
        if self._has_usage:
            chunk = {"usage": None, **chunk}
        await self._write(b"data: " + to_json(chunk) + b"\n\n")

    async def ping(self) -> None:
        await self._write(b": waiting\n\n")

    async def end(self) -> None:
        await self._write(b"data: [DONE]\n\n")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def end_with(self, refusal: Refusal) -> None:
        await self._write(b"data: " + to_json(refusal.body()) + b"\n\n")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, data: bytes) -> None:
        if not self.is_open:
            self.is_open = True
            await _start(self._send, 200, _STREAM_HEADERS)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


async def send_json(
    send: Send, status: int, value: Any, headers: Mapping[str, str] | None = None
) -> None:
    """Send a response whose body is JSON."""
    body = to_json(value)
    own = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "cache-control": "no-store",
    }
    await _start(send, status, {**own, **(headers or {})})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def send_refusal(send: Send, refusal: Refusal) -> Awaitable[None]:
    """Send a refusal; the caller awaits it."""
    return send_json(send, refusal.status, refusal.body(), refusal.headers)


def stopping() -> Refusal:
    """The refusal of a request that the end of the server cuts off."""
    return Refusal(503, "server", "it is stopping", "Send it again later", code="stopping")


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8; a lone surrogate, which a client's key may have, stays an escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


async def _start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


def _usage(job: Job, ends: Mapping[int, Finish]) -> Usage:
    drawn = sum(len(end.token_ids) for end in ends.values())
    return Usage(sum(map(len, job.prompts)), drawn)
