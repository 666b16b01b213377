"""Requests of all kinds that come and go while others grow, for decoders that must agree."""

from typing import Any

from megatron_chameleon.inference.engine.interface import TokenRequest
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

JOINS_AFTER_STEPS, CANCELS_AFTER_STEPS = 4, 9


def requests(vocabulary: Vocabulary) -> list[TokenRequest]:
    """Text, images, both, with and without guidance; the last one joins later."""
    codes = vocabulary.code_token_ids[:16].tolist()
    image = [vocabulary.begin_image, *codes, vocabulary.end_image]
    start = [vocabulary.bos]
    penalty = {"repetition_penalty": 1.3}
    asked: list[tuple[list[int], int, dict[str, Any]]] = [
        ([*start, 40, 50, 60], 30, {"force": Force.TEXT, "seed": 2, **penalty}),
        ([*start, *image, 44], 12, {"force": Force.TEXT, "temperature": 0}),
        ([*start, 70, 71], 18, {"force": Force.IMAGE, "guidance": 3.0, "seed": 5}),
        (start, 40, {"temperature": 1.0, "top_p": 1.0, "seed": 7}),
        ([*start, *image], 20, {"guidance": 3.0, "guidance_image": 1.2, "force": Force.IMAGE}),
        ([*start, 90], 25, {"top_k": 5, "seed": 11}),
    ]
    return [TokenRequest(tuple(ids), new, GenerationOptions(**o)) for ids, new, o in asked]


def answers(decoder: Any, vocabulary: Vocabulary) -> list[list[int]]:
    """The tokens of each request; the first one is cancelled on the way."""
    *first, late = requests(vocabulary)
    numbers = [decoder.add(request) for request in first]
    found: dict[int, list[int]] = {}
    for step in range(1000):
        if step == JOINS_AFTER_STEPS:
            numbers.append(decoder.add(late))
        if step == CANCELS_AFTER_STEPS:
            decoder.cancel(numbers[0])
        for number, chunk in decoder.step():
            found.setdefault(number, []).extend(chunk.token_ids)
        usage = decoder.usage()
        if step > CANCELS_AFTER_STEPS and not usage.running + usage.waiting:
            break
    return [found[number] for number in numbers]
