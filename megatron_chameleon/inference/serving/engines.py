"""Opens a model and its engine.

This is the one place that knows which engines there are: ``open_served`` gives an engine and the
tokenizer, and all else is the same for every engine.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.inference.chat import PromptFormat, prompt_format
from megatron_chameleon.inference.engine.decode import BatchDecoder
from megatron_chameleon.inference.engine.interface import (
    EngineUsage,
    FinishReason,
    TokenChunk,
    TokenEngine,
    TokenRequest,
)
from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.inference.session import Session
from megatron_chameleon.inference.vllm.opening import open_exported
from megatron_chameleon.tokenizer.folder import Tokenizer

DECODER, VLLM = "decoder", "vllm"
ENGINES = (DECODER, VLLM)


@dataclass(frozen=True)
class OpenOptions:
    """How a model is opened."""

    path: str
    engine: str = DECODER
    device: str = "cpu"
    tokenizer: str | None = None
    ema: bool = False
    engine_options: tuple[str, ...] = ()
    """``NAME=VALUE`` texts for vLLM."""


@dataclass(frozen=True)
class Opened:
    """A model that can be served; its engine is not started yet."""

    engine: TokenEngine
    tokenizer: Tokenizer
    name: str
    format: PromptFormat
    summary: str
    """Of the engine, for the user."""


def open_served(options: OpenOptions) -> Opened:
    """Open a model with its engine.

    Raises:
        ChameleonError: The model cannot be opened, or the engine cannot run here.
    """
    if options.engine == VLLM:
        return _open_vllm(options)
    if options.engine_options:
        what = "these options are vLLM's, and the engine is our own"
        raise ConfigError("--engine-option", what, "Add --engine vllm, or leave them out")
    session = Session.load(options.path, options.device, options.tokenizer, ema=options.ema)
    engine = OneByOneEngine(session)
    summary = f"decoder on {options.device}, one answer after the other"
    return Opened(
        engine, session.tokenizer, Path(options.path).resolve().name, session.prompt_format, summary
    )


def _open_vllm(options: OpenOptions) -> Opened:
    for given, option in ((options.tokenizer, "--tokenizer"), (options.ema, "--ema")):
        if given:
            what = "vLLM serves an exported folder, whose weights and tokenizer are fixed"
            raise ConfigError(option, what, "Give it to `chameleon convert`, and serve the result")
    exported = open_exported(options.path, options.device, options.engine_options)
    name = exported.reader.folder.resolve().name
    form = prompt_format(exported.reader)
    return Opened(exported.engine, exported.tokenizer, name, form, f"vLLM {exported.version}")


class OneByOneEngine:
    """Answers one request after the other with the decoder of ``Session``."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.context_tokens = session.context_tokens
        self._classes = TokenClasses(session.tokenizer.vocabulary, session.device)
        self._thread = ThreadPoolExecutor(1, "engine")
        self._lock = asyncio.Lock()
        self._running = self._waiting = 0

    async def start(self) -> None:
        pass

    def check(self, request: TokenRequest) -> None:
        request.options.check()

    async def generate(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        self._waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self._waiting -= 1
        loop = asyncio.get_running_loop()
        self._running = 1
        stream: Any = None
        try:
            stream = await loop.run_in_executor(self._thread, self._stream, request)
            for drawn in itertools.count():
                new = await loop.run_in_executor(self._thread, next, stream, None)
                if new is None:
                    break
                yield TokenChunk(new[0])
                del drawn
            yield TokenChunk([], FinishReason.LENGTH)
        finally:
            if stream is not None:
                self._thread.submit(stream.close)
            self._running = 0
            self._lock.release()

    def usage(self) -> EngineUsage:
        return EngineUsage(self._running, self._waiting, 0, self.context_tokens)

    async def stop(self, seconds: float) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _stream(self, request: TokenRequest) -> Any:
        session, options = self._session, request.options
        if session.device.type == "meta":
            raise DataError("model", "it has no weights", "Open another one")
        decoder = BatchDecoder(
            session.model, self._classes, session.codes_per_image, 1, options, session.execution
        )
        generator = torch.Generator(device=session.device).manual_seed(options.seed)
        return decoder.stream([list(request.prompt)], [request.max_new_tokens], generator)
