"""CIDEr of captions, computed by the scorer of pycocoevalcap.

Captions are tokenized as in the COCO caption challenge: with Stanford's Penn Treebank tokenizer, in
lower case and without punctuation. That tokenizer is a Java program. Without Java, NLTK's Treebank
tokenizer is used instead, and the results say so.
"""

import importlib.util
import re
import shutil
from collections.abc import Mapping, Sequence

from megatron_chameleon.errors import ConfigError

PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""What the challenge removes. It is meant to remove brackets too, but it looks for their names in
capitals, and the tokenizer writes them in lower case. So brackets stay."""
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
    """Check that the scorer is installed.

    Raises:
        ConfigError: It is not installed.
    """
    missing = [name for name in ("pycocoevalcap", "nltk") if not importlib.util.find_spec(name)]
    if missing:
        remedy = "Install it with `pip install 'megatron-chameleon[eval]'`"
        raise ConfigError(where, f"needs {missing[0]}, which is not installed", remedy)


def tokenizer_name() -> str:
    """``stanford`` if Java is installed, else ``nltk``."""
    return "stanford" if shutil.which("java") else "nltk"


def tokenize(captions: Sequence[str], tokenizer: str) -> list[str]:
    """The tokens of each caption, joined by spaces.

    Args:
        captions: Captions of one or more lines.
        tokenizer: ``stanford`` or ``nltk``.
    """
    lines = [" ".join(caption.split()) for caption in captions]
    if tokenizer == "stanford":
        return _stanford(lines)
    from nltk.tokenize import TreebankWordTokenizer

    treebank = TreebankWordTokenizer()  # it only splits off the last period
    return [
        " ".join(_kept(treebank.tokenize(_SENTENCE_END.sub(" .", line.lower())))) for line in lines
    ]


def _kept(tokens: Sequence[str]) -> list[str]:
    names = [_BRACKETS.get(token, token) for token in tokens]
    return [name for name in names if name not in PUNCTUATION]


def _stanford(lines: Sequence[str]) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The program loses empty lines at the end, so empty captions are not passed to it.
    filled = {str(index): [{"caption": line}] for index, line in enumerate(lines) if line}
    found = PTBTokenizer().tokenize(filled) if filled else {}
    return [found[str(index)][0] if line else "" for index, line in enumerate(lines)]


def cider_scores(
    answers: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: str
) -> dict[str, float]:
    """CIDEr-D of every image, from 0 to 10. The score of the whole set is their mean.

    The words are weighted by their frequency in all references. An image's score therefore depends
    on the other images, and a single image always scores 0.

    Args:
        answers: The caption of each image.
        references: The reference captions of each image, at least one.
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
