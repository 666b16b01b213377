"""Requests that arrive at random: continuous batching against fixed batches, with our engine.

A batch of fixed rows takes what waits, at most ``rows`` requests, and ends with its longest answer.
Continuous batching has the same number of rows, but lets a request join as soon as a row is free.
Time is simulated: work takes as long as it is measured, and waiting for a request takes none.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.serving.contestants import GREEDY, Ours
from benchmarks.serving.subjects import Subject
from megatron_chameleon.inference.engine.interface import TokenRequest
from megatron_chameleon.inference.engine.modality import Force

SHORTEST_PROMPT, LONGEST_PROMPT = 4, 16


@dataclass(frozen=True)
class Arrival:
    seconds: float
    request: TokenRequest


@dataclass(frozen=True)
class Load:
    """What came of serving all requests."""

    seconds: float
    tokens: int
    waits: list[float]
    """From the arrival of each request to the end of its answer."""


def random_arrivals(
    subject: Subject, count: int, mean_tokens: int, most_tokens: int, per_second: float
) -> list[Arrival]:
    """A Poisson process of short prompts, with answers of random lengths.

    Lengths are exponential, so most answers are short and a few are long. An eighth are images.
    """
    rng = random.Random(3)
    seconds, arrivals = 0.0, []
    for number, prompt in enumerate(subject.prompts(count, LONGEST_PROMPT)):
        tokens = min(1 + int(rng.expovariate(1 / mean_tokens)), most_tokens)
        options = replace(GREEDY, force=Force.TEXT)
        if number % 8 == 7:
            tokens, options = subject.codes_per_image + 2, replace(GREEDY, force=Force.IMAGE)
        prompt = prompt[: rng.randint(SHORTEST_PROMPT, LONGEST_PROMPT)]
        arrivals.append(Arrival(seconds, TokenRequest(tuple(prompt), tokens, options)))
        seconds += rng.expovariate(per_second)
    return arrivals


def serve_continuously(ours: Ours, arrivals: list[Arrival], clock: Callable[[], float]) -> Load:
    """Each request joins as soon as there is a row for it."""
    decoder, coming = ours.decoder, list(arrivals)
    now, tokens, ends, arrived = 0.0, 0, {}, {}
    while coming or decoder.usage().running or decoder.usage().waiting:
        if not (decoder.usage().running or decoder.usage().waiting):
            now = max(now, coming[0].seconds)
        begin = clock()
        while coming and coming[0].seconds <= now:
            arrival = coming.pop(0)
            arrived[decoder.add(arrival.request)] = arrival.seconds
        events = decoder.step()
        now += clock() - begin
        for number, chunk in events:
            tokens += len(chunk.token_ids)
            ends[number] = now
    return Load(now, tokens, [ends[number] - arrived[number] for number in arrived])


def serve_in_batches(
    ours: Ours, arrivals: list[Arrival], rows: int, clock: Callable[[], float]
) -> Load:
    """Each batch ends before the next one begins."""
    coming, now, tokens, waits = list(arrivals), 0.0, 0, []
    while coming:
        now = max(now, coming[0].seconds)
        batch = [arrival for arrival in coming[:rows] if arrival.seconds <= now]
        del coming[: len(batch)]
        longest = max(arrival.request.max_new_tokens for arrival in batch)
        begin = clock()
        # rows that have ended go on with nobody reading them, as a batch of fixed shape does
        answers = ours.answer_all([_padded(arrival, longest) for arrival in batch])
        now += clock() - begin
        for arrival, answer in zip(batch, answers, strict=True):
            tokens += min(len(answer), arrival.request.max_new_tokens)
            waits.append(now - arrival.seconds)
    return Load(now, tokens, waits)


def _padded(arrival: Arrival, longest: int) -> TokenRequest:
    if arrival.request.options.force is Force.IMAGE:
        return arrival.request
    return replace(arrival.request, max_new_tokens=longest)
