"""Stop strings: found at the first character that completes one, however the text arrives."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.answers.stop_strings import StopStrings, cut_at_stop
from megatron_chameleon.inference.engine.options import Execution, GenerationOptions
from megatron_chameleon.inference.session import Session


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Path) -> Session:
    return Session.load(tiny_checkpoint)


def test_the_text_is_cut_before_the_stop_string_that_is_completed_first() -> None:
    assert cut_at_stop("so 4\nQ: next", ["Q:", "\n\n"]) == "so 4\n"
    assert cut_at_stop("a\n\nQ:", ["Q:", "\n\n"]) == "a"
    assert cut_at_stop("abcd", ["abcd", "bc"]) == "a"
    assert cut_at_stop("xabc", ["c", "bc", "abc"]) == "x", "the longest of those that end together"
    assert cut_at_stop("abc", "") == "abc" and cut_at_stop("abc", []) == "abc"


def plain_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The same by trying all places."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_any_texts_and_stop_strings_in_any_parts() -> None:
    """Letters of a small alphabet, so that beginnings of stop strings overlap all the time."""
    rng = random.Random(3)
    stopped = 0
    for _ in range(4000):
        text = "".join(rng.choices("ab\né", k=rng.randrange(30)))
        stops = ["".join(rng.choices("ab\né", k=rng.randrange(1, 7))) for _ in range(3)]
        stops = stops[: rng.randrange(4)]
        watch, given, place = StopStrings(stops), "", 0
        while place < len(text):
            part = text[place : place + rng.randrange(1, 5)]
            place += len(part)
            given += watch.feed(part)
            expected, stop = plain_cut(text[:place], stops)
            assert watch.found == stop
            held = 0 if stop else longest_beginning(expected, stops)
            assert given == expected[: len(expected) - held], "neither more nor less is held back"
        stopped += watch.found is not None
        expected, stop = plain_cut(text, stops)
        assert (given + watch.finish(), watch.found) == (expected, stop)
        assert cut_at_stop(text, stops) == expected
    assert 1000 < stopped < 3500


def longest_beginning(text: str, stops: list[str]) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    lengths = range(len(text), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stops)), 0)


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
