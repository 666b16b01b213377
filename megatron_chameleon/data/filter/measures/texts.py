"""What is measured of texts: length, language, and what is compared to find similar ones."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_chameleon.data.documents.schema import ASSISTANT, SYSTEM, Document, TextPart
from megatron_chameleon.data.filter.measures.blocklist import normalized
from megatron_chameleon.data.filter.measures.packages import needed
from megatron_chameleon.errors import ConfigError

PERMUTATIONS = 128
"""Values of a MinHash signature; an estimated similarity of 0.8 is wrong by 0.035 on average."""
SHINGLE_WORDS = 5
MOST_SHINGLES = 200_000
"""Of one text; the rest of a longer one is not compared."""
LANGUAGE_CHARACTERS = 10_000
"""The language of a text is that of its beginning."""
_SEED = 1
_SCHEME = "affine32"
"""How datasketch permutes: named, so that its next version finds the same documents."""

# Scripts that are written without spaces: each of their characters counts as a word.
_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WITHOUT_SPACES += "\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_WITHOUT_SPACES}]|[^\W{_WITHOUT_SPACES}]+")


def count_words(texts: Iterable[str]) -> int:
    """Words of texts; in scripts without spaces, each character is one.

    >>> count_words(["It's 7 o'clock.", "你好"])
    7
    """
    return sum(1 for text in texts for _ in _WORD.finditer(text))


def document_hash(parts: Sequence[object], pixels: Sequence[int]) -> int:
    """A hash of 64 bits of texts and pictures in their order, whoever says them.

    Where one text ends and the next begins does not count, so a conversation and the same words as
    one text are equal.

    Args:
        parts: Text and image parts.
        pixels: The hash of each picture's pixels.
    """
    digest, numbers = hashlib.sha256(), iter(pixels)
    for part in parts:
        if isinstance(part, TextPart):
            digest.update(part.text.encode("utf-8", "surrogatepass"))
        else:
            digest.update(b"\xff" + next(numbers).to_bytes(8, "little"))  # no byte of UTF-8
    return int.from_bytes(digest.digest()[:8], "little")


def asked(document: Document) -> tuple[int, int]:
    """Where the first question of a conversation begins and ends among its parts; all parts of
    another document.

    Questions are compared with those of evaluations, which have the same question with another
    answer or with none.
    """
    if document.roles is None:
        return 0, len(document.content)
    first = sum(1 for role in document.roles if role == SYSTEM)
    stop = next((i for i, role in enumerate(document.roles) if role == ASSISTANT), None)
    return first, len(document.roles) if stop is None else stop


class MinHasher:
    """Signatures whose share of equal values estimates how many word sequences two texts share.

    Raises:
        ConfigError: The package datasketch is missing.
    """

    def __init__(self) -> None:
        self._datasketch = needed("datasketch", "--near-duplicates")
        self._first = self._datasketch.MinHash(PERMUTATIONS, seed=_SEED, scheme=_SCHEME)

    def signature(self, texts: Iterable[str]) -> np.ndarray | None:
        """The signature of texts, uint32 [permutations]; None if they have no word."""
        words = [m[0] for text in texts for m in _WORD.finditer(normalized(text))]
        if not words:
            return None
        stop = min(max(len(words) - SHINGLE_WORDS + 1, 1), MOST_SHINGLES)
        shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(stop)}
        found = self._first.copy()
        found.update_batch([s.encode("utf-8", "surrogatepass") for s in shingles])
        return np.asarray(found.hashvalues, dtype=np.uint32)


def bands_for(threshold: float) -> tuple[int, int]:
    """Into how many bands of how many values a signature is cut to find what is so similar."""
    lsh = needed("datasketch", "--near-duplicates").MinHashLSH(threshold, PERMUTATIONS)
    return int(lsh.b), int(lsh.r)


class LanguageDetector:
    """Tells the language of texts, with the model in the package py3langid.

    Raises:
        ConfigError: The package is missing, or does not know a language.
    """

    def __init__(self, languages: Sequence[str]) -> None:
        package = needed("py3langid.langid", "--language")
        self._model: Any = package.LanguageIdentifier.from_model_file(
            package.MODEL_FILE, norm_probs=True
        )
        self.labels: list[str] = list(self._model.labels)
        for language in languages:
            if language not in self.labels:
                what = f"the language {language!r} is not known"
                raise ConfigError(
                    "--language", what, f"Use one of {', '.join(sorted(self.labels))}"
                )

    def detect(self, texts: Iterable[str]) -> tuple[int, float]:
        """The number of the label and its probability; -1 for a text without a letter."""
        text = " ".join(texts)[:LANGUAGE_CHARACTERS]
        if not any(map(str.isalpha, text)):
            return -1, 0.0
        label, probability = self._model.classify(text)
        return self.labels.index(label), float(probability)
