"""Places in vLLM's batch: first come, first served, all rows of a request at once."""

import asyncio
import random

import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.vllm.slots import Slots


def test_requests_enter_in_their_order_and_never_more_than_fit() -> None:
    async def test() -> None:
        slots, luck = Slots(4), random.Random(2)
        entered: list[int] = []
        cancelled: set[int] = set()
        inside = 0

        async def request(number: int, rows: int) -> None:
            nonlocal inside
            async with slots.take(rows):
                entered.append(number)
                inside += rows
                assert inside <= 4
                for _ in range(luck.randrange(4)):
                    await asyncio.sleep(0)
                inside -= rows

        tasks = [asyncio.create_task(request(n, luck.randint(1, 4))) for n in range(200)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            number = luck.randrange(200)
            if luck.random() < 0.2 and number not in entered and not tasks[number].done():
                cancelled.add(number)
                tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert entered == sorted(entered)
        assert set(range(200)) - cancelled <= set(entered)
        assert len(cancelled) > 5
        assert (slots.running, slots.waiting) == (0, 0)
        async with slots.take(4):  # none was lost
            assert slots.running == 1

    asyncio.run(test())


def test_who_waits_is_told_of_the_end() -> None:
    async def test() -> None:
        slots = Slots(1)
        error = DataError("engine", "stops", "Ask again")
        async with slots.take(1):
            waiting = asyncio.create_task(_enter(slots))
            await asyncio.sleep(0)
            assert slots.waiting == 1
            slots.close(error)
            for _ in range(2):
                with pytest.raises(DataError, match=r"engine: stops\. Ask again"):
                    await waiting
                waiting = asyncio.create_task(_enter(slots))

    asyncio.run(test())


def test_who_is_cancelled_at_the_door_leaves_the_places() -> None:
    async def test() -> None:
        slots = Slots(2)
        async with slots.take(2):
            waiting = [asyncio.create_task(_enter(slots, rows)) for rows in (2, 1)]
            await asyncio.sleep(0)
        waiting[0].cancel()  # it has places, and does not know it yet
        await asyncio.gather(*waiting, return_exceptions=True)
        assert waiting[0].cancelled() and not waiting[1].cancelled()
        async with asyncio.timeout(1), slots.take(2):
            assert slots.running == 1

    asyncio.run(test())


async def _enter(slots: Slots, rows: int = 1) -> None:
    async with slots.take(rows):
        pass
