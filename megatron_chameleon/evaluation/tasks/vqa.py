"""VQA accuracy as the script of the VQA challenge computes it, with its answer normalisation.

Sources: Antol et al. 2015 (arXiv 1505.00468), section 3; the evaluation script of the challenge.
Its oddities are kept. Answers are normalised only if the annotators disagree, and the pattern that
removes periods removes at most 32 of them, and none before a digit.
"""

import re
from collections.abc import Sequence

PUNCTUATION = (*';/[]"{}()=+\\_-><@`,?!',)
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _spellings(word: str) -> list[str]:
    """A contraction with one of its apostrophes missing, in every possible way."""
    places = [index for index, letter in enumerate(word) if letter == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


CONTRACTIONS = {
    **{wrong: word for word in _CONTRACTED.split() for wrong in _spellings(word)},
    "somebody'd": "somebodyd",  # the script has this pair the wrong way round
}


def normalise(answer: str) -> str:
    """An answer without punctuation and articles, with digits and with complete contractions."""
    words = [DIGITS.get(word, word) for word in _without_punctuation(answer).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    has_number_with_comma = re.search(r"\d,\d", text) is not None
    stripped = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or has_number_with_comma else " ")
    return re.sub(r"\.(?!\d)", "", stripped, count=32)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of an answer, in [0, 1].

    Each annotator is left out in turn, and min(others who gave this answer / 3, 1) is averaged.

    Args:
        answer: The model's answer.
        references: The annotators' answers, ten in VQAv2.
    """
    said = [_one_line(reference) for reference in references]
    given = _one_line(answer)
    if len(set(said)) > 1:
        said = [normalise(reference) for reference in said]
        given = normalise(given)
    matches = sum(reference == given for reference in said)
    scores = [min((matches - (reference == given)) / 3, 1.0) for reference in said]
    return sum(scores) / len(scores)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
