"""CIDEr and its tokenization."""

import shutil

import pytest

from megatron_chameleon.evaluation.tasks import cider

CAPTIONS = [
    "A man riding a wave on top of a surfboard.",
    "Two dogs don't play; they're sleeping (on a couch).",
    'A sign reads "STOP" -- it\'s red.',
    "A close-up of a 3-year-old's birthday cake, with candles!",
    "A man/woman standing near 5,000 people. Another looks on.",
    "The U.S. flag flying. Mr. Smith can't eat...",
    "",
    "A black & white photo of 1/2 a pizza [blue] {red}",
    "It's 5:30 pm, a $5 bill, 10% off @ home",
    "",
]


def test_tokens() -> None:
    assert cider.tokenize(["A man, and his dog.", "It's (red)!"], "nltk") == [
        "a man and his dog",
        "it 's -lrb- red -rrb-",
    ]


@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer is in Java")
def test_tokens_without_java_are_those_of_the_challenge() -> None:
    assert cider.tokenize(CAPTIONS, "nltk") == cider.tokenize(CAPTIONS, "stanford")


def test_cider_prefers_what_people_say_of_this_image() -> None:
    references = {
        "1": ["a dog runs on the beach", "a dog running near the sea"],
        "2": ["a red bus in the street", "a red double decker bus"],
        "3": ["two cats on a couch", "a pair of cats sleeping"],
    }
    right = {name: captions[0] for name, captions in references.items()}
    wrong = {"1": right["2"], "2": right["3"], "3": right["1"]}
    best = cider.cider_scores(right, references, "nltk")
    assert all(2 < score <= 10 for score in best.values())
    assert all(score < 0.5 for score in cider.cider_scores(wrong, references, "nltk").values())
    assert cider.cider_scores({**right, "2": ""}, references, "nltk")["2"] == 0


def test_the_same_caption_as_the_only_reference_has_ten() -> None:
    captions = {
        "1": "a dog runs on the beach",
        "2": "a red bus in the street",
        "3": "two old cats sit",
    }
    scores = cider.cider_scores(captions, {name: [text] for name, text in captions.items()}, "nltk")
    assert list(scores.values()) == pytest.approx([10, 10, 10])
