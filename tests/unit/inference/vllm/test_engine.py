"""``VllmEngine`` with a stand-in of vLLM's batch: it draws by ``Rules``, a step at a time."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.inference.engine.interface import (
    EngineError,
    FinishReason,
    TokenChunk,
    TokenRequest,
)
from megatron_chameleon.inference.engine.modality import Force, TokenClasses
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.vllm import engine as engine_module
from megatron_chameleon.inference.vllm.engine import VllmEngine
from megatron_chameleon.inference.vllm.plugins.row_request import RowRequest
from megatron_chameleon.inference.vllm.plugins.rules import Rules
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

CODES, CONTEXT = 4, 40


class Launched:
    """As ``launch.Launched``: a step admits some of those who wait, in any order, and may preempt.

    The logits of a row depend on its tokens alone.
    """

    log_place = "the log"
    context_tokens, cache_tokens, cache_tokens_used = CONTEXT, 100, 12
    dead = False

    def __init__(self, vocabulary: Vocabulary, places: int, luck: random.Random) -> None:
        self.places, self.luck = places, luck
        self.classes = TokenClasses(vocabulary)
        self.weights = torch.randn(64, vocabulary.size, generator=torch.Generator().manual_seed(3))
        self.live: list[SimpleNamespace] = []
        self.most = 0
        self.drawn: dict[tuple[str, int], int] = {}
        self.submitted: list[tuple[str, int]] = []
        self.fault: Exception | None = None
        self.stopped: float | None = None

    @property
    def idle(self) -> bool:
        return not self.live

    async def run(
        self, prompt: list[int], row: RowRequest, room: int, stops: list[int]
    ) -> AsyncGenerator[list[int]]:
        self.submitted.append((row.group, room))
        request = SimpleNamespace(prompt=prompt, row=row, room=room, stops=stops, answer=[])
        request.extra_args, request.max_tokens = row.extra_args(), room
        self.live.append(request)
        # without those that only wake it
        self.most = max(self.most, sum(r.room > 1 or bool(r.row.group) for r in self.live))
        try:
            while True:
                await asyncio.sleep(0)
                if self.fault is not None:
                    raise self.fault
                token = self.step(request)
                if token is None:
                    continue
                request.answer.append(token)
                yield [token]
                if token in stops or len(request.answer) == room:
                    return
        finally:
            self.live.remove(request)

    def step(self, request: SimpleNamespace) -> int | None:
        """The next token; None if its turn has not come."""
        count, name = len(request.answer), request.row.group
        if not name:
            return self.draw([request])[0]
        if (name, count) not in self.drawn:
            rows = [row for row in self.live if row.row.group == name]
            if any(len(row.answer) != count for row in rows):
                return None  # they draw in the same step
            if self.luck.random() < 0.1:
                rows = [request]  # the others were not admitted, or preempted
            self.drawn[name, count] = self.draw(rows)[0]
        return self.drawn[name, count]

    def draw(self, rows: list[SimpleNamespace]) -> list[int]:
        rules = Rules(
            self.classes, ImageForm(self.classes.form.vocabulary, CODES), CONTEXT, len(rows)
        )
        added = [(n, row, row.prompt, row.answer) for n, row in enumerate(rows)]
        rules.update_rows(SimpleNamespace(removed=[], added=added, moved=[]))
        logits = [self.logits(row.prompt + row.answer) for row in rows]
        return rules.apply_v1(torch.stack(logits)).argmax(1).tolist()

    def logits(self, tokens: list[int]) -> torch.Tensor:
        logits_V = self.weights[sum(n * t for n, t in enumerate(tokens, 1)) % 64].clone()
        logits_V[self.classes.begin_image] += 4
        logits_V[self.classes.eos] += 1
        return logits_V

    async def abort(self) -> None:
        self.fault = EngineError("engine", "vLLM ended an answer with 'abort'", "Ask again")

    def shutdown(self, seconds: float) -> None:
        self.stopped = seconds


class World:
    """An engine that has started."""

    def __init__(self, tokenizer: Path, patch: pytest.MonkeyPatch, places: int, luck: int) -> None:
        vocabulary = self.vocabulary = Vocabulary.load(tokenizer)
        self.classes = TokenClasses(vocabulary)
        self.launched = Launched(vocabulary, places, random.Random(luck))
        patch.setattr(engine_module, "launch", lambda folder, options: self.launched)
        self.engine = VllmEngine(tokenizer, ImageForm(vocabulary, CODES), 4096, {})

    def request(self, most: int = 30, prompt: int = 2, **options: Any) -> TokenRequest:
        text = int(self.classes.text_V.nonzero()[0])
        ids = (self.classes.bos, *[text] * (prompt - 1))
        return TokenRequest(ids, most, GenerationOptions(**options))

    async def answer(self, request: TokenRequest) -> tuple[list[int], FinishReason | None]:
        chunks = [chunk async for chunk in self.engine.generate(request)]
        assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].finish

    def run(self, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            await self.engine.start()
            await test()
            await self.engine.stop(1)

        asyncio.run(whole())


@pytest.fixture
def open_world(tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    return lambda places=4, luck=1: World(tiny_tokenizer, monkeypatch, places, luck)


def test_answers_keep_the_rules_alone_and_beside_others(open_world: Callable[..., World]) -> None:
    world = open_world(places=5)
    requests = [
        world.request(seed=seed, temperature=1.0, **options)
        for seed, options in enumerate(
            (
                {},
                {"guidance": 2.0},
                {"force": Force.IMAGE},
                {"force": Force.IMAGE, "guidance": 3.0, "guidance_image": 1.2},
                {"force": Force.TEXT, "guidance": 2.0},
                {"images": False, "repetition_penalty": 1.0},
                {"guidance": 1.5, "guidance_image": 1.0},
            )
            * 2
        )
    ]

    async def test() -> None:
        together = await asyncio.gather(*map(world.answer, requests))
        assert world.launched.most == 5
        alone = [await world.answer(request) for request in requests]
        assert together == alone
        images = 0
        for (tokens, finish), request in zip(together, requests, strict=True):
            begins = [n for n, t in enumerate(tokens) if t == world.classes.begin_image]
            images += len(begins)
            for begin in begins:
                assert all(world.classes.code_V[tokens[begin + 1 : begin + 1 + CODES]])
                assert tokens[begin + 1 + CODES] == world.classes.end_image
            if request.options.force is Force.IMAGE:
                assert begins == [0] and len(tokens) == CODES + 2
            assert not begins or request.options.force is not Force.TEXT
            ended = tokens[-1] == world.classes.eos or request.options.force is Force.IMAGE
            assert finish is (FinishReason.STOP if ended else FinishReason.LENGTH)
            assert len(tokens) == 30 or ended
        assert images > 8
        usage = world.engine.usage()
        assert (usage.running, usage.waiting, usage.cache_tokens_used) == (0, 0, 0)
        assert usage.cache_tokens_total == 100

    world.run(test)


def test_without_an_image_tokenizer_no_image_begins(open_world: Callable[..., World]) -> None:
    world = open_world()
    world.engine = VllmEngine(Path(), ImageForm(world.vocabulary, 0), CONTEXT, {})

    async def test() -> None:
        tokens, _ = await world.answer(world.request(temperature=1.0, guidance=2.0))
        assert world.classes.begin_image not in tokens

    world.run(test)


def test_closing_an_answer_ends_its_requests_and_frees_its_places(
    open_world: Callable[..., World],
) -> None:
    world = open_world(places=3)

    async def test() -> None:
        guided = world.request(force=Force.IMAGE, guidance=3.0, guidance_image=1.2)
        stream = world.engine.generate(guided)
        first = [await anext(stream) for _ in range(2)]
        assert first[0] == TokenChunk([world.classes.begin_image])
        assert world.engine.usage().running == 1 and len(world.launched.live) >= 3
        waiting = asyncio.create_task(world.answer(world.request()))
        late = asyncio.create_task(world.answer(world.request()))
        await asyncio.sleep(0.01)
        assert world.engine.usage().waiting == 2
        late.cancel()
        await asyncio.sleep(0)
        assert world.engine.usage().waiting == 1
        await stream.aclose()
        await waiting
        assert world.engine.usage().running == 0 and world.launched.live == []

    world.run(test)


def test_stopping_finishes_what_runs_and_then_cancels(open_world: Callable[..., World]) -> None:
    world = open_world(places=1)

    async def test() -> None:
        running = asyncio.create_task(world.answer(world.request()))
        await asyncio.sleep(0)
        await asyncio.gather(world.engine.stop(5), running)
        assert running.result()[1] is not None and world.launched.stopped == 20
        with pytest.raises(EngineError, match=r"engine: it is stopping\. Ask again when"):
            await world.answer(world.request())

    world.run(test)
    world = open_world(places=1)
    never = AsyncNever()

    async def test_cancelled() -> None:
        world.launched.step = never.step  # type: ignore[method-assign]
        tasks = [asyncio.create_task(world.answer(world.request())) for _ in range(2)]
        await asyncio.sleep(0.01)
        await world.engine.stop(0.01)
        with pytest.raises(EngineError, match="vLLM ended an answer with 'abort'"):
            await tasks[0]
        with pytest.raises(EngineError, match="it is stopping"):
            await tasks[1]

    world.run(test_cancelled)


class AsyncNever:
    """A row whose turn never comes."""

    def step(self, request: SimpleNamespace) -> int | None:
        return None


def test_passes_that_never_meet_end_with_an_error(
    open_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = open_world()
    monkeypatch.setattr(engine_module, "LONGEST_PAUSE_SECONDS", 0.0)
    world.launched.luck = SimpleNamespace(random=lambda: 0.0)  # type: ignore[assignment]

    async def test() -> None:
        message = "guidance: the passes of an image did not enter one step of vLLM in 50 attempts"
        with pytest.raises(EngineError, match=message):
            await world.answer(world.request(force=Force.IMAGE, guidance=2.0))

    world.run(test)


def test_an_idle_vllm_is_woken_before_the_passes_come(open_world: Callable[..., World]) -> None:
    world = open_world()

    async def test() -> None:
        await world.answer(world.request(force=Force.IMAGE, guidance=2.0))
        first, *passes = world.launched.submitted[:3]
        assert first == ("", 1)
        assert passes == [(passes[0][0], CODES + 1)] * 2 and passes[0][0]

    world.run(test)


def test_a_dead_vllm_is_told(open_world: Callable[..., World]) -> None:
    world = open_world()

    async def test() -> None:
        world.launched.fault, world.launched.dead = RuntimeError("out of\nmemory"), True
        message = r"engine: vLLM failed: out of memory\. See the log\."
        with pytest.raises(EngineError, match=message):
            await world.answer(world.request())
        assert world.engine.failure is world.launched.fault

    world.run(test)


def test_what_can_never_fit_is_refused(open_world: Callable[..., World]) -> None:
    world = open_world(places=2)

    async def test() -> None:
        assert world.engine.context_tokens == CONTEXT
        with pytest.raises(DataError) as large:
            world.engine.check(world.request(most=99, prompt=2))
        assert "2 tokens and 99 of the answer, in 1 passes, need keys and values of 101" in str(
            large.value
        )
        with pytest.raises(ConfigError, match="guidance: needs 3 rows of a batch that has 2"):
            world.engine.check(world.request(guidance=3.0, guidance_image=1.2))
        with pytest.raises(ConfigError, match="temperature"):
            world.engine.check(world.request(temperature=-1.0))
        world.engine.check(world.request(most=98))

    world.run(test)
