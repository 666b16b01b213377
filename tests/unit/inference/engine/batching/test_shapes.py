"""Images of any shape through the decoder: whatever the logits are, each is the grid it says."""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.engine.interface import TokenRequest
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import Execution, GenerationOptions
from megatron_chameleon.tokenizer.common.grids import Grid
from random_model import SHAPED, SHAPED_FORM, ShapedModel
from tiny_decoder import answer_all

EXECUTIONS = {
    "each step read": Execution(),
    "windows": Execution(sync_every_tokens=7, width_step=16, buckets=True),
}
SIZES = (None, None, "1:1", "2:1", "1:3", "9:16")


def grids_of(token_ids: Sequence[int]) -> list[Grid]:
    """The grids of an answer's images, of which each must be whole, and nothing stands outside."""
    found, at = list[Grid](), 0
    while at < len(token_ids):
        if token_ids[at] == SHAPED.begin_image:
            end = token_ids.index(SHAPED.end_image, at)
            found.append(SHAPED.read_image(token_ids[at + 1 : end])[0])
            at = end
        else:
            assert ShapedModel.classes.text_V[token_ids[at]] or token_ids[at] == SHAPED.eos
        at += 1
    return found


def random_requests(seed: int, count: int) -> list[TokenRequest]:
    rng = random.Random(seed)
    requests = []
    while len(requests) < count:
        guidance, image = rng.choice([(1.0, None), (3.0, None), (3.0, 1.2)])
        options = GenerationOptions(
            temperature=rng.choice([0, 0.7, 5.0]),
            top_p=rng.choice([1.0, 0.8]),
            top_k=rng.choice([0, 0, 3]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            guidance=guidance,
            guidance_image=image,
            force=rng.choice([None, None, Force.IMAGE]),
            size=rng.choice(SIZES),
            seed=rng.randrange(1000),
        )
        codes = SHAPED.image_tokens(np.zeros(9, np.int64), Grid(3, 3))
        image_ids = [SHAPED.begin_image, *codes.tolist()]
        prompt = [SHAPED.bos, *rng.choice([[], [*image_ids, SHAPED.end_image]])]
        needed = SHAPED_FORM.tokens_needed(options.size) if options.force else 1
        room = ShapedModel.context_tokens - len(prompt)
        requests.append(TokenRequest(tuple(prompt), rng.randint(needed, room), options))
    return requests


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
def test_no_logits_break_an_image(execution: Execution) -> None:
    seen: Counter[Grid] = Counter()
    for seed in range(6):
        requests = random_requests(seed, 24)
        # so little room that answers give way, and are read again in the middle of an image
        model = ShapedModel(seed, endless=seed % 2 == 0)
        decoder = model.decoder(execution=execution, cache_tokens=700, max_rows=24)
        for request, answer in zip(requests, answer_all(decoder, requests, 5), strict=True):
            grids, options = grids_of(answer), request.options
            assert len(answer) <= request.max_new_tokens
            if (asked := SHAPED_FORM.grid_of_size(options.size)) is not None:
                assert set(grids) <= {asked}
            if options.force is Force.IMAGE:
                assert len(grids) == 1 and answer[-1] == SHAPED.end_image
            seen.update(grids)
    assert set(seen) == set(SHAPED.grids) and seen.total() > 100


def test_the_room_of_a_forced_image_is_that_of_its_grid() -> None:
    decoder = ShapedModel().decoder()
    for size, needed in ((None, SHAPED_FORM.lengths[0]), ("1:1", SHAPED.image_length(Grid(3, 3)))):
        options = GenerationOptions(force=Force.IMAGE, size=size)
        decoder.check(TokenRequest((SHAPED.bos,), needed, options))
        with pytest.raises(DataError, match=rf"is too few for an image, which has {needed} tokens"):
            decoder.check(TokenRequest((SHAPED.bos,), needed - 1, options))
