"""Stop strings: found at the first token that completes one, however the tokens arrive."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.answers.stop_strings import StopStrings, cut_at_stop
from megatron_chameleon.inference.engine.options import Execution, GenerationOptions
from megatron_chameleon.inference.session import Session

IMAGE_IDS = frozenset({1, 2, 3})
TEXT = "a handwritten digit\nzero é 漢字 👩‍👩‍👧 Q: number 7 "
"""Some of it is pieces of several letters for the tiny tokenizer, the rest single bytes."""


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Path) -> Session:
    return Session.load(tiny_checkpoint)


def test_cut_stops_at_the_first_stop_string() -> None:
    assert cut_at_stop("so 4\nQ: next", ["Q:", "\n\n"]) == "so 4\n"
    assert cut_at_stop("a\n\nQ:", ["Q:", "\n\n"]) == "a"
    assert cut_at_stop("abc", "") == "abc" and cut_at_stop("abc", []) == "abc"


def test_the_first_token_that_completes_a_stop_string_is_the_last(session: Session) -> None:
    """Against decoding every prefix, for random texts, strings and sizes of the parts."""
    tokenizer = session.tokenizer.text
    rng = random.Random(3)
    found = 0
    for _ in range(400):
        text = "".join(rng.choices(TEXT, k=rng.randrange(1, 60)))
        begin = rng.randrange(len(text))
        stops = [text[begin : begin + rng.randrange(1, 9)], "nowhere in it"]
        ids = tokenizer.encode(text)
        ends = (i for i in range(1, len(ids) + 1) if stops[0] in tokenizer.decode(ids[:i]))
        end = next(ends, None)
        watch, kept, stopped = StopStrings(stops, tokenizer, IMAGE_IDS, 2), [], []
        while not stopped and len(kept) < len(ids):
            part = ids[len(kept) :][: rng.randrange(1, 20)]
            (_, new), stopped = watch.take([[], part])
            kept += new
        assert (kept, stopped) == ((ids, []) if end is None else (ids[:end], [1]))
        found += end is not None
    assert found > 350, "the strings were mostly there to be found"


def test_a_stop_string_is_not_found_across_an_image(session: Session) -> None:
    tokenizer = session.tokenizer.text
    before, after = tokenizer.encode("so a"), tokenizer.encode("b c")
    ids = [*before, 1, 3, 3, 2, *after]
    for stops, expected in ((["ab"], (ids, [])), (["b"], (ids[: len(before) + 5], [0]))):
        watch = StopStrings(stops, tokenizer, IMAGE_IDS, 1)
        (kept,), stopped = watch.take([ids])
        assert (kept, stopped) == expected


def test_stopped_answers_are_the_beginnings_of_unstopped_ones(session: Session) -> None:
    """Whatever the execution; and an answer that does not stop is not changed by others."""
    prompts = [["a handwritten"], ["a digit"], ["number"], []]
    options = GenerationOptions(seed=4, temperature=1.5, max_tokens=40, images=False)
    whole = session.generate(prompts, options)
    texts = ["".join(str(part) for part in answer.content) for answer in whole]
    stop = texts[0][9:12]
    assert stop and texts[0].find(stop) < len(texts[0]) - 3
    options = replace(options, stop=(stop, texts[1][6:8]))
    try:
        for execution in (Execution(), Execution(sync_every_tokens=7, width_step=16)):
            session.execution, session._decoder = execution, None
            for answer, unstopped, text in zip(
                session.generate(prompts, options), whole, texts, strict=True
            ):
                assert "".join(map(str, answer.content)) == cut_at_stop(text, options.stop)
                assert answer.token_ids == unstopped.token_ids[: len(answer.token_ids)]
                assert len(answer.token_ids) < 40 or cut_at_stop(text, options.stop) == text
    finally:
        session.execution, session._decoder = Execution.on("cpu"), None


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stop: a stop string is empty\. Give at least one"):
        GenerationOptions(stop=("",)).check()
