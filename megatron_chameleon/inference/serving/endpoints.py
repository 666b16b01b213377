"""The endpoints that answer: they read a request, watch its client, and respond."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Receive, Scope
from starlette.types import Send as RawSend

from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.inference.serving.answering import Answerer, Ask, Place
from megatron_chameleon.inference.serving.formats import (
    ChatFormat,
    CompletionFormat,
    Envelope,
)
from megatron_chameleon.inference.serving.metrics import Metrics
from megatron_chameleon.inference.serving.model import PromptEncoder, ServedModel, Workers
from megatron_chameleon.inference.serving.requests.bodies import read_chat, read_completion
from megatron_chameleon.inference.serving.requests.json_body import BodyReader, parse_object
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.pictures import Picture
from megatron_chameleon.inference.serving.requests.refusal import Refusal, bad, refusal_of
from megatron_chameleon.inference.serving.requests.sampling import Wishes
from megatron_chameleon.inference.serving.requests.token_ids import check_token_ids
from megatron_chameleon.inference.serving.responses import (
    Job,
    Responder,
    StreamBroken,
    stopping,
)
from megatron_chameleon.inference.serving.surroundings import STATUS
from megatron_chameleon.wording import shown

_LONG_BODY = 1 << 16
"""Bytes above which JSON is parsed in a thread."""

Reader = Callable[[dict[str, Any]], Awaitable[Job]]


class JobReader:
    """Turns the JSON of a request into a job."""

    def __init__(
        self,
        model: ServedModel,
        answerer: Answerer,
        encoder: PromptEncoder,
        limits: Limits,
        metrics: Metrics,
        remote_images: bool = False,
    ) -> None:
        self._model, self._answerer, self._encoder = model, answerer, encoder
        self._limits, self._metrics, self._remote = limits, metrics, remote_images

    async def chat(self, values: dict[str, Any]) -> Job:
        """Read a request of ``/v1/chat/completions``.

        Raises:
            Refusal: It cannot be served.
        """
        body = read_chat(values, self._model.defaults, self._limits, self._remote)
        self._check_model(body.wishes)
        prompt = await self._encoder.of_pieces(body.pieces, body.format or self._model.format)
        images = sum(isinstance(piece.content, Picture) for piece in body.pieces)
        self._metrics.images.labels("in").inc(images)
        return self._job(body.wishes, [prompt], ChatFormat)

    async def completion(self, values: dict[str, Any]) -> Job:
        """Read a request of ``/v1/completions``.

        Raises:
            Refusal: It cannot be served.
        """
        body = read_completion(values, self._model.defaults, self._limits)
        self._check_model(body.wishes)
        form = self._model.tokenizer.image_form
        prompts = []
        for number, prompt in enumerate(body.prompts):
            if isinstance(prompt, str):
                prompts.append(await self._encoder.of_text(prompt))
            else:
                where = "prompt" if len(body.prompts) == 1 else f"prompt[{number}]"
                if len(prompt) > (context := self._model.context_tokens):
                    what = f"it has {len(prompt):,} tokens, more than the context of {context:,}"
                    raise bad(where, what, "Shorten it", "context_length_exceeded")
                prompts.append(check_token_ids(prompt, form, where))
        return self._job(body.wishes, prompts, CompletionFormat)

    def _check_model(self, wishes: Wishes) -> None:
        name = self._model.name
        if wishes.model is not None and wishes.model != name:
            what = f"the model {shown(wishes.model)} is not served here"
            raise Refusal(404, "model", what, f"Use {name}", code="model_not_found")

    def _job(
        self,
        wishes: Wishes,
        prompts: list[list[int]],
        form: type[ChatFormat] | type[CompletionFormat],
    ) -> Job:
        requests = []
        for number, prompt in enumerate(prompts):
            first = number * wishes.answers
            options = [wishes.options_of(first + index) for index in range(wishes.answers)]
            requests += self._answerer.check(Ask(prompt, options, wishes.max_tokens))
        envelope = Envelope(self._model.name, prompts, wishes.answers, wishes.token_ids)
        return Job(wishes, requests, prompts, form(envelope))


class AnswerEndpoint:
    """An ASGI application that answers POST requests of one kind.

    Whatever happens, the client gets a response, or is gone.
    """

    def __init__(
        self,
        read: Reader,
        answerer: Answerer,
        responder: Responder,
        bodies: BodyReader,
        workers: Workers,
        metrics: Metrics,
    ) -> None:
        self._read, self._answerer, self._responder = read, answerer, responder
        self._bodies, self._workers, self._metrics = bodies, workers, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: RawSend) -> None:
        started = time.monotonic()
        watch = _Watch()
        try:
            await self._answer(scope, receive, send, watch)
        except ChameleonError as error:
            raise refusal_of(error) from error
        except StreamBroken as end:
            scope[STATUS] = end.status
        except asyncio.CancelledError:
            if watch.is_gone:
                scope[STATUS] = 499  # nginx's word for a client that has gone
                self._metrics.cancelled.labels("client").inc()
            elif self._answerer.is_draining:
                self._metrics.cancelled.labels("stop").inc()
                raise stopping() from None
            else:
                raise
        finally:
            self._metrics.duration.observe(time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: RawSend, watch: "_Watch") -> None:
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        async with self._answerer.admitted() as place:
            data = await self._bodies.read(headers, watch.noticing(receive))
            async with watch.cancels(receive):
                await self._respond(data, place, send)

    async def _respond(self, data: bytes, place: Place, send: RawSend) -> None:
        if len(data) > _LONG_BODY:
            values = await self._workers.run(parse_object, data)
        else:
            values = parse_object(data)
        await self._responder.respond(await self._read(values), place, send)


class _Watch:
    """Cancels a request whose client has gone."""

    def __init__(self) -> None:
        self.is_gone = False

    def noticing(self, receive: Receive) -> Receive:
        """``receive`` that remembers a client that goes while it sends its body."""

        async def noticed() -> Any:
            message = await receive()
            self.is_gone |= message["type"] == "http.disconnect"
            return message

        return noticed

    @asynccontextmanager
    async def cancels(self, receive: Receive) -> AsyncIterator[None]:
        """Cancel the current task when the client goes, as long as the block runs."""
        task = asyncio.current_task()
        assert task is not None

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.is_gone = True
            task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
