"""An engine without a model, whose answers a test can foresee, for the tests of what serves it."""

import asyncio
import random
from collections.abc import AsyncIterator

from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.engine.interface import (
    EngineError,
    EngineUsage,
    FinishReason,
    TokenChunk,
    TokenRequest,
)
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.tokenizer.folder import Tokenizer


class StandInEngine:
    """Answers ``a handwritten three`` and, if it may, one image; the seed chooses the codes.

    Args:
        tokenizer: Of the answers.
        context_tokens: Of prompt and answer together.

    Attributes:
        gate: While it is cleared, no answer gets a token.
        step_seconds: Between two tokens.
        text: Of the answers.
        fault: Raised in place of the next token.
        failure: What the engine says it has died of.
        prompts: Of all requests so far.
        running: Requests that are answered now.
    """

    def __init__(self, tokenizer: Tokenizer, context_tokens: int = 256) -> None:
        self.context_tokens = context_tokens
        self.gate = asyncio.Event()
        self.gate.set()
        self.step_seconds = 0.0
        self.text = "a handwritten three"
        self.fault: Exception | None = None
        self.failure: EngineError | None = None
        self.requests: list[TokenRequest] = []
        self.running = 0
        self.is_stopped = False
        self._tokenizer = tokenizer

    async def start(self) -> None:
        pass

    def check(self, request: TokenRequest) -> None:
        if self.failure is not None:
            raise self.failure
        request.options.check()
        if request.options.guidance == 999:  # stands for what needs too much memory
            raise DataError("guidance", "3 passes need 600 tokens of 512", "Use less")

    async def generate(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        self.requests.append(request)
        self.running += 1
        try:
            for token_id in self._answer(request)[: request.max_new_tokens]:
                await self.gate.wait()
                if self.step_seconds:
                    await asyncio.sleep(self.step_seconds)
                if self.fault is not None:
                    raise self.fault
                yield TokenChunk([token_id])
            yield TokenChunk([], FinishReason.LENGTH)
        finally:
            self.running -= 1

    def usage(self) -> EngineUsage:
        return EngineUsage(self.running, 0, 10 * self.running, 1000)

    async def stop(self, seconds: float) -> None:
        self.is_stopped = True

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [request.prompt for request in self.requests]

    def _answer(self, request: TokenRequest) -> list[int]:
        vocabulary, options = self._tokenizer.vocabulary, request.options
        text = self._tokenizer.text.encode(self.text)
        if options.force is Force.TEXT or self._tokenizer.image is None or not options.images:
            return [*text, vocabulary.eos]
        drawn = random.Random(options.seed)
        count = self._tokenizer.image.codes_per_image
        codes = [drawn.choice(vocabulary.code_token_ids.tolist()) for _ in range(count)]
        image = [vocabulary.begin_image, *codes, vocabulary.end_image]
        return image if options.force is Force.IMAGE else [*text, *image, vocabulary.eos]
