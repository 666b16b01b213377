"""CIDEr of captions, by pycocoevalcap's scorer.

Captions become tokens as in the COCO caption challenge: Stanford's Penn Treebank tokenizer, lower
case, punctuation removed. It is a Java program; where there is no Java, NLTK's Treebank tokenizer
stands in, and the results say so.
"""

import importlib.util
import re
import shutil
from collections.abc import Mapping, Sequence

from megatron_chameleon.errors import ConfigError

PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""What the challenge removes. It means to remove brackets too, but the tokenizer writes their names
in lower case and it looks for capitals: they stay."""
_BRACKETS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
}
_SENTENCE_END = re.compile(r"(?<![.\s]\w)(?<!\bmr)(?<!\bmrs)(?<!\bdr)(?<!\bst)\.(?=\s)")


def check_cider(where: str) -> None:
    """Refuse to start without the scorer.

    Raises:
        ConfigError: It is not installed.
    """
    missing = [name for name in ("pycocoevalcap", "nltk") if not importlib.util.find_spec(name)]
    if missing:
        remedy = "Install it with `pip install 'megatron-chameleon[eval]'`"
        raise ConfigError(where, f"needs {missing[0]}, which is not installed", remedy)


def tokenizer_name() -> str:
    """``stanford`` where there is Java, else ``nltk``."""
    return "stanford" if shutil.which("java") else "nltk"


def tokenize(captions: Sequence[str], tokenizer: str) -> list[str]:
    """Captions as tokens with a space between them.

    Args:
        captions: Each of one line or more.
        tokenizer: ``stanford`` or ``nltk``.
    """
    lines = [" ".join(caption.split()) for caption in captions]
    if tokenizer == "stanford":
        return _stanford(lines)
    from nltk.tokenize import TreebankWordTokenizer

    treebank = TreebankWordTokenizer()  # it splits off the last period only
    return [
        " ".join(_kept(treebank.tokenize(_SENTENCE_END.sub(" .", line.lower())))) for line in lines
    ]


def _kept(tokens: Sequence[str]) -> list[str]:
    names = [_BRACKETS.get(token, token) for token in tokens]
    return [name for name in names if name not in PUNCTUATION]


def _stanford(lines: Sequence[str]) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The program keeps lines apart, but loses empty ones at the end: they wait outside.
    filled = {str(index): [{"caption": line}] for index, line in enumerate(lines) if line}
    found = PTBTokenizer().tokenize(filled) if filled else {}
    return [found[str(index)][0] if line else "" for index, line in enumerate(lines)]


def cider_scores(
    answers: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: str
) -> dict[str, float]:
    """CIDEr-D of every image, 0 to 10; the set's score is their mean.

    The weights of the words come from all references together, so an image's score depends on the
    other images, and a single image has 0.

    Args:
        answers: Caption by image.
        references: Captions by image, at least one each.
        tokenizer: ``stanford`` or ``nltk``.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    names = list(answers)
    texts = [answers[name] for name in names]
    texts += [caption for name in names for caption in references[name]]
    tokens = iter(tokenize(texts, tokenizer))
    hypotheses = [next(tokens) for _ in names]
    scorer = CiderScorer(n=4, sigma=6.0)
    for name, hypothesis in zip(names, hypotheses, strict=True):
        scorer += (hypothesis, [next(tokens) for _ in references[name]])
    _, scores = scorer.compute_score()
    return dict(zip(names, map(float, scores), strict=True))
