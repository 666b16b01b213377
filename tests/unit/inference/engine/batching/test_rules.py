"""The rules of an answer hold for 10,000 random decodes of all kinds, which grow side by side."""

import random

import pytest

from megatron_chameleon.inference.engine.interface import FinishReason, TokenRequest
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import Execution, GenerationOptions
from random_model import CLASSES, CODES_PER_IMAGE, RandomModel

IMAGE_TOKENS = CODES_PER_IMAGE + 2
EXECUTIONS = (Execution(), Execution(sync_every_tokens=4, width_step=8, buckets=True))


def random_request(rng: random.Random) -> TokenRequest:
    force = rng.choice([None, None, Force.TEXT, Force.IMAGE])
    options = GenerationOptions(
        temperature=rng.choice([0.0, 0.5, 1.0, 5.0]),
        top_p=rng.choice([1.0, 0.9, 0.01]),
        top_k=rng.choice([0, 0, 1, 3]),
        repetition_penalty=rng.choice([1.0, 1.5, 0.5]),
        guidance=rng.choice([1.0, 1.0, 1.0, 3.0, 0.0]),
        guidance_image=rng.choice([None, None, 1.0, 2.0]),
        images=rng.random() < 0.8,
        force=force,
        seed=rng.randrange(2**64),
    )
    prompt = (CLASSES.bos, *(rng.randrange(len(CLASSES.code_V)) for _ in range(rng.randrange(9))))
    shortest = IMAGE_TOKENS if force is Force.IMAGE else 1
    return TokenRequest(prompt, rng.randint(shortest, 14), options)


def check_answer(request: TokenRequest, answer: list[int], finish: FinishReason | None) -> None:
    """Read the answer by the definition of the rules."""
    options, place, images = request.options, 0, 0
    assert 1 <= len(answer) <= request.max_new_tokens
    while place < len(answer):
        token = answer[place]
        if token != CLASSES.begin_image:
            assert CLASSES.text_V[token] or token == CLASSES.eos
            assert options.force is not Force.IMAGE
            assert token != CLASSES.eos or place == len(answer) - 1, "nothing follows </s>"
            place += 1
            continue
        assert options.force is Force.IMAGE or (options.images and options.force is None)
        image = answer[place : place + IMAGE_TOKENS]
        assert len(image) == IMAGE_TOKENS, "an image that is begun is complete"
        assert all(bool(CLASSES.code_V[code]) for code in image[1:-1])
        assert image[-1] == CLASSES.end_image
        place, images = place + IMAGE_TOKENS, images + 1
    assert options.force is not Force.IMAGE or images == 1
    stopped = answer[-1] == CLASSES.eos or options.force is Force.IMAGE
    assert finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)


@pytest.mark.parametrize("execution", EXECUTIONS, ids=["by token", "in windows"])
def test_the_rules_hold_whatever_the_model_prefers(execution: Execution) -> None:
    rng = random.Random(1)
    requests = [random_request(rng) for _ in range(5000)]
    decoder = RandomModel().decoder(execution=execution, max_rows=400, cache_tokens=400 * 48)
    numbers = [decoder.add(request) for request in requests]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    finish: dict[int, FinishReason] = {}
    while len(finish) < len(requests):
        for number, chunk in decoder.step():
            assert not isinstance(chunk, Exception)
            assert number not in finish
            assert chunk.token_ids
            answers[number] += chunk.token_ids
            if chunk.finish is not None:
                finish[number] = chunk.finish
    for number, request in zip(numbers, requests, strict=True):
        check_answer(request, answers[number], finish[number])
    text = [answer for answer in answers.values() if CLASSES.begin_image not in answer]
    assert 1000 < len(text) < 4000, "both kinds should be common"
