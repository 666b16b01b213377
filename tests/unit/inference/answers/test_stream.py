"""Tokens become texts and images in the same way, whatever the chunks they arrive in."""

import random
from pathlib import Path

import numpy as np
import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.answers.answer import GrowingAnswer, content_of
from megatron_chameleon.inference.answers.stop_strings import cut_at_stop
from megatron_chameleon.inference.answers.stream import (
    AnswerEnd,
    AnswerEvent,
    AnswerStream,
    ImageCodes,
    ImageDone,
    ImageIncomplete,
    ImageStarted,
    TextDelta,
)
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer

LETTERS = "a handwritten digit\nzero é 漢字 👩‍👩‍👧 Q: 数 ש 7 ك"
"""Some of it is pieces of several letters for the tiny tokenizer, the rest single bytes."""


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


def image_ids(tokenizer: Tokenizer, codes: list[int]) -> list[int]:
    vocabulary = tokenizer.vocabulary
    ids = vocabulary.codes_to_token_ids(np.array(codes)).tolist()
    return [vocabulary.begin_image, *ids, vocabulary.end_image]


def random_answer(
    tokenizer: Tokenizer, rng: random.Random
) -> tuple[list[int], list[str], str, list[str | list[int]]]:
    """Token ids, stop strings, why the answer ends, and its content by decoding whole texts."""
    stops = ["".join(rng.choices(LETTERS, k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
    ids: list[int] = []
    content: list[str | list[int]] = []
    for place in range(rng.randrange(1, 4)):
        if place or rng.random() < 0.2:
            codes = rng.choices(range(16), k=16)
            content.append(codes)
            ids += image_ids(tokenizer, codes)
        text = "".join(rng.choices(LETTERS, k=rng.randrange(25)))
        ids += tokenizer.text.encode(text)
        cut = cut_at_stop(text, stops)
        content += [cut] if cut else []
        if cut != text:
            return ids, stops, "stop", content
    if rng.random() < 0.5:
        return [*ids, tokenizer.vocabulary.eos], stops, "</s>", content
    return ids, stops, "length", content


def test_random_answers_in_random_chunks(tokenizer: Tokenizer) -> None:
    """Content, end and number of tokens are those of decoding each text at once and cutting it."""
    rng = random.Random(7)
    ends = {"</s>": 0, "stop": 0, "length": 0}
    for _ in range(1200):
        ids, stops, end, expected = random_answer(tokenizer, rng)
        ends[end] += 1
        stream, events, place = AnswerStream(tokenizer, stops), list[AnswerEvent](), 0
        while place < len(ids):
            chunk = ids[place : place + rng.randrange(6)]
            place += len(chunk)
            events += stream.feed(chunk)
        assert (stream.is_ended, stream.stopped_by in stops) == (end != "length", end == "stop")
        assert end == "stop" or stream.token_count == len(ids)
        rest = stream.finish()
        assert rest == [] or end == "length"
        content = content_of([*events, *rest])
        assert [p if isinstance(p, str) else p.codes.tolist() for p in content] == expected
        started = [event.index for event in events if isinstance(event, ImageStarted)]
        done = [event.index for event in events if isinstance(event, ImageDone)]
        assert started == done == list(range(len(done)))
    assert min(ends.values()) > 100, ends


def test_text_comes_as_early_as_it_is_certain(tokenizer: Tokenizer) -> None:
    stream = AnswerStream(tokenizer, ["\n\nQ"])
    ids = tokenizer.text.encode("a é\n\n漢\n\nQ: x")
    deltas = [
        "".join(event.text for event in stream.feed([token_id]) if isinstance(event, TextDelta))
        for token_id in ids[:11]
    ]
    assert deltas == ["a", " ", "", "é", "", "", "", "", "\n\n漢", "", ""]
    assert stream.feed(ids[11:]) == [] and stream.stopped_by == "\n\nQ"
    assert stream.token_count == 12, "what is drawn behind the stop string is not counted"


def test_an_image_grows_once_per_chunk(tokenizer: Tokenizer) -> None:
    stream = AnswerStream(tokenizer)
    codes = list(range(16))
    ids = [*tokenizer.text.encode("a"), *image_ids(tokenizer, codes), tokenizer.vocabulary.eos]
    first = stream.feed(ids[:5])
    assert first[:2] == [TextDelta("a"), ImageStarted(0)]
    assert isinstance(first[2], ImageCodes) and first[2].codes.tolist() == [0, 1, 2]
    (second,) = stream.feed(ids[5:9])
    assert isinstance(second, ImageCodes) and second.codes.tolist() == list(range(7))
    (third,) = stream.feed(ids[9:18])
    assert isinstance(third, ImageDone) and third.codes.tolist() == codes
    assert first[2].codes.tolist() == [0, 1, 2], "an event keeps its codes"
    assert stream.feed(ids[18:]) == [] and stream.is_ended


@pytest.mark.parametrize("drawn", [0, 1, 15])
def test_an_answer_that_is_cut_inside_an_image(tokenizer: Tokenizer, drawn: int) -> None:
    stream = AnswerStream(tokenizer)
    ids = image_ids(tokenizer, [5] * 16)
    events = stream.feed(ids[: 1 + drawn])
    (last,) = stream.finish()
    assert isinstance(last, ImageIncomplete) and (last.index, len(last.codes)) == (0, drawn)
    assert content_of([*events, last]) == [] and stream.finish() == []


def test_what_is_held_back_comes_before_an_image_and_at_the_end(tokenizer: Tokenizer) -> None:
    stream = AnswerStream(tokenizer, ["abc"])
    held = tokenizer.text.encode("xab")
    assert stream.feed(held) == [TextDelta("x")]
    assert stream.feed([tokenizer.vocabulary.begin_image]) == [TextDelta("ab"), ImageStarted(0)]
    codes = tokenizer.vocabulary.codes_to_token_ids(np.arange(16)).tolist()
    stream.feed([*codes, tokenizer.vocabulary.end_image])
    ids = tokenizer.text.encode("cab")
    assert stream.feed(ids) == [TextDelta("c")], "not found across an image"
    assert stream.feed(tokenizer.text.encode("é")[:1]) == [], "half a character"
    assert stream.finish() == [TextDelta("ab\ufffd")]


def test_a_token_that_breaks_the_rules_is_not_taken_for_a_code(tokenizer: Tokenizer) -> None:
    stream = AnswerStream(tokenizer)
    with pytest.raises(DataError, match=r"1 of 1 ids are not image codes, the first is 2 \(</s>"):
        stream.feed([tokenizer.vocabulary.begin_image, tokenizer.vocabulary.eos])


def test_an_answer_is_put_together_while_it_grows(tokenizer: Tokenizer) -> None:
    ids = [*image_ids(tokenizer, [3] * 16), *tokenizer.text.encode("xaby")]
    answer = GrowingAnswer(tokenizer, ["ab"])
    assert not any(
        isinstance(event, AnswerEnd)
        for event in answer.feed(ids[:9], is_last=False, is_complete=False)
    )
    events = answer.feed(ids[9:], is_last=False, is_complete=False)
    assert events[1:] == [TextDelta("x"), AnswerEnd(is_complete=False)] and answer.is_ended
    assert answer.answer().token_ids == ids[:-1], "up to the token that completes the stop string"
    assert tokenizer.image is not None
    image, text = answer.answer().content
    assert (image, text) == (tokenizer.image.decode(np.full((1, 16), 3))[0], "x")


def test_who_ended_an_answer(tokenizer: Tokenizer) -> None:
    eos, a = tokenizer.vocabulary.eos, tokenizer.text.encode("ab")[-1]
    for ids, finish, is_complete in (
        ([a, eos], True, True),
        ([a], False, False),
        ([a, a], True, False),  # a stop string, and the last token that there was room for
    ):
        answer = GrowingAnswer(tokenizer, ["bb"])
        events = answer.feed(ids, is_last=True, is_complete=finish)
        assert events[-1] == AnswerEnd(is_complete), ids


def test_the_cost_of_a_token_does_not_grow(tokenizer: Tokenizer) -> None:
    """Counted in characters that the stop strings look at, because clocks are not reliable."""
    stream = AnswerStream(tokenizer, ["aab"])
    looked = 0
    feed = stream._stops.feed

    def counting(text: str) -> str:
        nonlocal looked
        looked += len(text) + len(stream._stops._held)
        return feed(text)

    stream._stops.feed = counting  # type: ignore[method-assign]
    for token_id in tokenizer.text.encode("a" * 3000):
        stream.feed([token_id])
    assert looked < 10_000
