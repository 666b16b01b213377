"""The engine's thread: tokens come in order, and faults end only the answers that they touch."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest
import torch

from megatron_chameleon.errors import ChameleonError, ConfigError, DataError
from megatron_chameleon.inference.engine.batching.service import DecoderEngine
from megatron_chameleon.inference.engine.interface import EngineError, FinishReason, TokenRequest
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from random_model import CODES_PER_IMAGE, RandomModel
from tiny_decoder import Tiny, answer_all

LONG = TokenRequest((0, 2), 38, GenerationOptions(force=Force.TEXT, temperature=0))


def serving(work: Callable[[DecoderEngine, RandomModel], Awaitable[None]], **settings) -> None:
    """Run a test with an engine over a random model, and stop the engine."""

    async def run() -> None:
        model = RandomModel(endless=True)
        model.seconds = 0.01
        engine = DecoderEngine(model.decoder(**settings))
        await engine.start()
        await work(engine, model)
        await engine.stop(5)
        assert engine.usage().running == engine.usage().cache_tokens_used == 0

    asyncio.run(asyncio.wait_for(run(), 20))


async def read(engine: DecoderEngine, request: TokenRequest) -> tuple[list[int], FinishReason]:
    token_ids: list[int] = []
    finish = None
    async for chunk in engine.generate(request):
        assert finish is None
        token_ids, finish = token_ids + chunk.token_ids, chunk.finish
    assert finish is not None
    return token_ids, finish


def test_many_at_once_get_what_each_gets_alone(tiny: Tiny) -> None:
    requests = [
        TokenRequest((0, 40 + n), 10 + n, GenerationOptions(seed=n, temperature=1.0))
        for n in range(12)
    ]
    expected = [answer_all(tiny.decoder(), [request])[0] for request in requests]

    async def run() -> None:
        engine = DecoderEngine(tiny.decoder(max_rows=5))
        await engine.start()
        found = await asyncio.gather(*(read(engine, request) for request in requests))
        assert [token_ids for token_ids, _ in found] == expected
        await engine.stop(5)

    asyncio.run(run())


def test_a_reader_that_leaves_frees_its_rows() -> None:
    async def work(engine: DecoderEngine, model: RandomModel) -> None:
        for _ in range(3):
            async with aclosing(engine.generate(LONG)) as chunks:
                async for _ in chunks:
                    break
        await asyncio.sleep(0.2)
        usage = engine.usage()
        assert (usage.running, usage.waiting, usage.cache_tokens_used) == (0, 0, 0)

    serving(work)


def test_a_slow_reader_holds_nobody_up_and_loses_nothing() -> None:
    async def work(engine: DecoderEngine, model: RandomModel) -> None:
        slow = engine.generate(LONG)
        first = await anext(slow)
        image = TokenRequest((0,), CODES_PER_IMAGE + 2, GenerationOptions(force=Force.IMAGE))
        for _ in range(20):
            await read(engine, image)
        rest = [chunk async for chunk in slow]
        chunks = [first, *rest]
        assert len(chunks) <= 2, "all that came meanwhile is one chunk"
        assert chunks[-1].finish is FinishReason.LENGTH
        assert sum(len(chunk.token_ids) for chunk in chunks) == LONG.max_new_tokens

    serving(work)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_one_answer(value: float) -> None:
    async def work(engine: DecoderEngine, model: RandomModel) -> None:
        other = asyncio.create_task(read(engine, LONG))
        while not engine.usage().running:
            await asyncio.sleep(0)
        broken = engine.generate(LONG)
        await anext(broken)
        model.broken = value  # of the last row
        with pytest.raises(EngineError, match=r"model: its logits for token \d+ .* not finite"):
            async for _ in broken:
                pass
        token_ids, _ = await other
        assert token_ids
        # nothing is left in the second slot, behind the length of the row that gets it
        longer = engine.generate(TokenRequest((0, *[2] * 12), 25, LONG.options))
        await anext(longer)
        await read(engine, TokenRequest((0,), 8, LONG.options))
        await longer.aclose()

    serving(work)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("out of memory"),
            "OutOfMemoryError: out of memory, with 2 answers",
        ),
        (ValueError("bad\nshape"), r"engine: a step failed: ValueError: bad\. Ask again"),
        (RuntimeError(), r"engine: a step failed: RuntimeError\. "),
    ],
)
def test_an_error_in_a_step_ends_the_answers_that_grow_and_no_others(
    error: Exception, message: str
) -> None:
    async def work(engine: DecoderEngine, model: RandomModel) -> None:
        growing = [engine.generate(LONG) for _ in range(2)]
        for chunks in growing:
            await anext(chunks)
        waiting = asyncio.create_task(read(engine, LONG))
        while not engine.usage().waiting:
            await asyncio.sleep(0)
        model.error = error
        for chunks in growing:
            with pytest.raises(EngineError, match=message):
                async for _ in chunks:
                    pass
        token_ids, _ = await waiting
        assert token_ids

    serving(work, max_rows=2)


def test_a_stop_finishes_what_runs_and_then_cancels() -> None:
    async def run(seconds: float, steps: float) -> list[object]:
        model = RandomModel(endless=True)
        model.seconds = steps
        engine = DecoderEngine(model.decoder(max_rows=1))
        await engine.start()
        readers = [asyncio.create_task(read(engine, LONG)) for _ in range(2)]
        await asyncio.sleep(0.1)
        await engine.stop(seconds)
        with pytest.raises(EngineError, match="engine: it is stopping"):
            await read(engine, LONG)
        return await asyncio.gather(*readers, return_exceptions=True)

    finished = asyncio.run(run(30, 0))
    assert not any(isinstance(found, Exception) for found in finished)
    cancelled = asyncio.run(run(0, 0.05))
    assert [str(found).split(".")[0] for found in cancelled] == ["engine: it was stopped"] * 2


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        (TokenRequest((), 3, GenerationOptions()), DataError, "prompt: it does not begin with <s>"),
        (TokenRequest((5,), 3, GenerationOptions()), DataError, "does not begin with <s>"),
        (TokenRequest((0, 999), 3, GenerationOptions()), DataError, "token id 999 is outside"),
        (TokenRequest((0, -1), 3, GenerationOptions()), DataError, "token id -1 is outside"),
        (TokenRequest((0,), 0, GenerationOptions()), DataError, "max_tokens: 0 is not above 0"),
        (TokenRequest((0,), 40, GenerationOptions()), DataError, "1 tokens .* 40 .* context of 40"),
        (TokenRequest((0,), 4, GenerationOptions(force=Force.IMAGE)), DataError, "4 is too few"),
        (TokenRequest((0,), 4, GenerationOptions(top_p=2)), ConfigError, "top_p: 2"),
        (
            TokenRequest((0,), 9, GenerationOptions(guidance=2, guidance_image=3)),
            DataError,
            r"max_tokens: .* room for 144 tokens in 3 rows of guidance \(.*, 64 bytes each\), and "
            r"the engine keeps at most 100 ",
        ),
    ],
)
def test_what_can_never_be_answered_is_refused(
    request_: TokenRequest, kind: type[ChameleonError], message: str
) -> None:
    engine = DecoderEngine(RandomModel().decoder(cache_tokens=100))
    with pytest.raises(kind, match=message):
        engine.check(request_)
