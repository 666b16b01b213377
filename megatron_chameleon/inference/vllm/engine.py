"""``VllmEngine``: the ``TokenEngine`` that hands its requests to vLLM's own engine.

An answer is one request of vLLM, or several behind each other if its images are guided: a plain one
stops where an image begins, the passes of ``Guidance`` draw the image as requests of their own
(``rules.py``), and a plain one goes on.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import ChameleonError, ConfigError, DataError, one_line
from megatron_chameleon.inference.engine.guidance import Guidance
from megatron_chameleon.inference.engine.interface import (
    EngineError,
    EngineUsage,
    TokenChunk,
    TokenRequest,
    finish_reason,
    stopping,
)
from megatron_chameleon.inference.engine.modality import Force, TokenClasses
from megatron_chameleon.inference.vllm.launch import Launched, launch
from megatron_chameleon.inference.vllm.plugins.row_request import RowRequest
from megatron_chameleon.inference.vllm.slots import Slots
from megatron_chameleon.tokenizer.common.image_form import ImageForm

TRIES = 50
"""How often the passes of a guided image are submitted again without having drawn a code."""
LONGEST_PAUSE_SECONDS = 1.0
SHUTDOWN_SECONDS = 20.0
"""How long vLLM's processes may take to end before they are killed."""


class VllmEngine:
    """Answers with a model in an exported folder.

    Args:
        folder: A folder that ``chameleon convert --to hf`` wrote.
        form: The form of its images, with its vocabulary; it draws none without a tokenizer of
            images.
        context_tokens: The model's largest number of positions.
        options: Names and values of vLLM's ``AsyncEngineArgs``.
    """

    def __init__(
        self,
        folder: Path,
        form: ImageForm,
        context_tokens: int,
        options: dict[str, Any],
    ) -> None:
        most = options.get("max_model_len")  # vLLM refuses what is no number
        self.context_tokens = min(context_tokens, most) if isinstance(most, int) else context_tokens
        self._folder, self._options = folder, options
        self._classes, self._form = TokenClasses(form.vocabulary), form
        self._launched: Launched | None = None
        self._stopping = False
        self._answering = 0
        self._idle = asyncio.Event()
        self._slots = Slots(1)
        self.failure: Exception | None = None
        """Why it answers nothing any more."""

    async def start(self) -> None:
        """Start vLLM's processes, which takes from 20 seconds to minutes.

        Raises:
            ConfigError: vLLM cannot run the model on this machine; it names the cause.
        """
        opening = asyncio.ensure_future(asyncio.to_thread(launch, self._folder, self._options))
        try:
            self._launched = await asyncio.shield(opening)
        except asyncio.CancelledError:
            with suppress(ChameleonError):
                (await opening).shutdown(0)
            raise
        self.context_tokens = self._launched.context_tokens
        self._slots = Slots(self._launched.places)

    def check(self, request: TokenRequest) -> None:
        """As ``TokenEngine.check``."""
        request.options.check()
        self._form.grid_of_size(request.options.size)
        tokens = len(request.prompt) + request.max_new_tokens
        rows = self._rows(request)
        assert self._launched is not None
        if rows > self._slots.places:
            raise ConfigError(
                "guidance",
                f"needs {rows} rows of a batch that has {self._slots.places}",
                f"Start the server with --engine-option max_num_seqs={rows} or more",
            )
        if rows * tokens > self._launched.cache_tokens:
            raise DataError(
                "prompt",
                f"{len(request.prompt):,} tokens and {request.max_new_tokens:,} of the answer, "
                f"in {rows} passes, need keys and values of {rows * tokens:,} tokens, and the "
                f"server has memory for {self._launched.cache_tokens:,}",
                "Ask for fewer tokens, or give the server more memory",
            )

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenChunk]:
        """As ``TokenEngine.generate``."""
        if self._stopping or self._launched is None:
            raise stopping()
        self._answering += 1
        self._idle.clear()
        try:
            async with self._slots.take(self._rows(request)):
                answer: list[int] = []
                only_image = request.options.force is Force.IMAGE
                async with aclosing(self._parts(request, answer)) as parts:
                    async for token_ids in parts:
                        left = request.max_new_tokens - len(answer)
                        finish = finish_reason(answer[-1], left, only_image, self._classes)
                        yield TokenChunk(token_ids, finish)
                        if finish is not None:
                            return
        finally:
            self._answering -= 1
            if not self._answering:
                self._idle.set()

    def usage(self) -> EngineUsage:
        """The load at this moment; of the cache, as vLLM last reported it."""
        running, waiting = self._slots.running, self._slots.waiting
        if self._launched is None:
            return EngineUsage(running, waiting, 0, 0)
        used = self._launched.cache_tokens_used if running else 0
        return EngineUsage(running, waiting, used, self._launched.cache_tokens)

    async def stop(self, seconds: float) -> None:
        """As ``TokenEngine.stop``."""
        self._stopping = True
        if self._answering:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), max(0.0, seconds))
        self._slots.close(stopping())
        if self._launched is not None:
            await self._launched.abort()
            launched, self._launched = self._launched, None
            await asyncio.to_thread(launched.shutdown, SHUTDOWN_SECONDS)

    def _guided(self, request: TokenRequest) -> Guidance | None:
        """The guidance of the request's images; None if there is none to apply."""
        guidance = Guidance.of(request.options)
        return guidance if self._form.draws and len(guidance.passes) > 1 else None

    def _rows(self, request: TokenRequest) -> int:
        guidance = self._guided(request)
        return 1 if guidance is None else len(guidance.passes)

    async def _parts(self, request: TokenRequest, answer: list[int]) -> AsyncGenerator[list[int]]:
        """The next tokens, again and again; ``answer`` grows by them."""
        classes, options = self._classes, request.options
        if not self._form.draws:
            options = replace(options, images=False)
        guidance = self._guided(request)
        stops = [classes.eos]
        if options.force is Force.IMAGE:
            stops = [classes.end_image]
        elif guidance is not None:
            stops.append(classes.begin_image)
        if guidance is not None and options.force is Force.IMAGE:
            answer.append(classes.begin_image)
            yield [classes.begin_image]
        while True:
            if guidance is not None and answer[-1:] == [classes.begin_image]:
                parts = self._guided_image(request, guidance, answer)
            else:
                room = request.max_new_tokens - len(answer)
                row = RowRequest(options, len(answer))
                parts = self._run([*request.prompt, *answer], row, room, stops)
            async with aclosing(parts):
                async for token_ids in parts:
                    answer += token_ids
                    yield token_ids

    async def _guided_image(
        self, request: TokenRequest, guidance: Guidance, answer: list[int]
    ) -> AsyncGenerator[list[int]]:
        """The codes of an image and its end; the caller extends ``answer`` by them."""
        classes, idle = self._classes, 0
        begun = len(answer)
        most = min(self._form.longest - 1, request.max_new_tokens - begun)
        seen = [*request.prompt, *answer[:-1]]
        starts = [
            [*guidance.prompt(kind, seen, classes), classes.begin_image] for kind in guidance.passes
        ]
        while idle <= TRIES:
            codes, before = answer[begun:], len(answer)
            room = most - len(codes)
            group = uuid.uuid4().hex
            runs = [
                self._run(
                    [*start, *codes],
                    RowRequest(request.options, before, group, part),
                    room,
                    [classes.end_image, classes.pad],
                )
                for part, start in enumerate(starts)
            ]
            companions = runs[1:]
            if self._launched is not None and self._launched.idle:
                companions.insert(0, self._wake(request))
            others = [asyncio.create_task(_drain(run)) for run in companions]
            try:
                await asyncio.sleep(0)  # they go first
                async with aclosing(runs[0]):
                    async for token_ids in runs[0]:
                        drawn = [token for token in token_ids if token != classes.pad]
                        if drawn:
                            yield drawn
            finally:
                for other in others:
                    other.cancel()
                await asyncio.gather(*others, return_exceptions=True)
            if answer[-1] == classes.end_image:
                return
            idle = idle + 1 if len(answer) == before else 0
            await asyncio.sleep(min(0.005 * idle**2, LONGEST_PAUSE_SECONDS))
        raise EngineError(
            "guidance",
            f"the passes of an image did not enter one step of vLLM in {TRIES} attempts",
            "Send the request again when the server has less to do",
        )

    def _wake(self, request: TokenRequest) -> AsyncGenerator[list[int]]:
        """A request of one token.

        An idle vLLM starts a step with the first request that it gets. The passes of an image come
        while that step runs, so the next one has all of them.
        """
        options = replace(request.options, force=Force.TEXT)
        return self._run([self._classes.bos], RowRequest(options), 1, [])

    async def _run(
        self, prompt: list[int], row: RowRequest, room: int, stops: list[int]
    ) -> AsyncGenerator[list[int]]:
        """One request of vLLM."""
        if self._launched is None:
            raise stopping()
        try:
            async with aclosing(self._launched.run(prompt, row, room, stops)) as run:
                async for token_ids in run:
                    yield token_ids
        except (asyncio.CancelledError, GeneratorExit, ChameleonError):
            raise
        except Exception as error:
            if self._launched.dead:
                self.failure = error
            what = f"vLLM failed: {one_line(error)}"
            raise EngineError("engine", what, f"See {self._launched.log_place}") from error


async def _drain(run: AsyncGenerator[list[int]]) -> None:
    async with aclosing(run):
        async for _ in run:
            pass
