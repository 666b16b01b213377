"""Chooses the sizes that fit a user's files and machine.

Each choice is a rule of a few lines, and ``train.yaml`` says why a value is what it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.data.preprocess.holdout import fraction_of
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.starter.looking.look import Looked, Source
from megatron_chameleon.starter.writing.image_yaml import ImageShape
from megatron_chameleon.tokenizer.text.training import VocabularyTooSmall, fixed_ids, try_vocabulary

TINY, SMALL, SEVEN, THIRTY_FOUR = "tiny", "small", "7b", "34b"
SIZES = (TINY, SMALL, SEVEN, THIRTY_FOUR)
PRESETS = {SEVEN: "chameleon_7b", THIRTY_FOUR: "chameleon_34b"}
FALLBACK_TEXT = "a picture"
"""What the text tokenizer is trained on where the pictures have no text at all."""
CODES_WITHOUT_PICTURES = 1
"""A vocabulary needs one; nothing uses it."""


@dataclass(frozen=True)
class TextVocabulary:
    """Size of the vocabulary, and how far it shortens text."""

    size: int
    """All ids, image codes included."""
    characters_per_token: float
    is_filled: bool
    """Whether the texts gave as many pieces as were wanted."""


@dataclass(frozen=True)
class Holdout:
    """Which share of the documents is held out."""

    share: float | None
    """None: there are too few documents."""
    sources: list[str] = field(default_factory=list)
    """Those in which documents are held out for certain."""
    documents: int = 0
    undivided: list[str] = field(default_factory=list)
    """Sources of which the share would hold out everything, so that nothing is held out."""


def side_of(looked: Looked) -> int:
    """The median of the shorter sides of the pictures, in pixels; 0 without pictures."""
    sides = sorted(min(size) for source in looked.sources for size in source.tally.sizes)
    return sides[len(sides) // 2] if sides else 0


def image_shape(size: str, side: int, pictures: int) -> ImageShape:
    """The picture size and codes for pictures of this side.

    Args:
        size: One of ``SIZES``.
        side: From ``side_of``.
        pictures: How many there are.
    """
    if size == TINY:
        codes = 64 if pictures < 2_000 else 128
        if side <= 20:
            return ImageShape(16, (1, 1, 1), codes)
        return ImageShape(32, (1, 1, 1), codes)
    if size == SMALL:
        codes = 512 if pictures < 20_000 else 2048
        wide = {"base_channels": 64, "channels": 64, "res_blocks": 2}
        if side <= 40:
            return ImageShape(32, (1, 1, 1), codes, **wide)
        if side <= 96:
            return ImageShape(64, (1, 1, 2, 2), codes, **wide)
        if side <= 200:
            return ImageShape(128, (1, 1, 2, 2), codes, **wide)
        return ImageShape(256, (1, 1, 2, 2, 4), codes, **wide)
    return ImageShape(512, (1, 1, 2, 2, 4), 8192, 128, 256, 2, 8)


def text_vocabulary(looked: Looked, size: str, image_codes: int) -> TextVocabulary:
    """A vocabulary that the texts can fill, found by training one on those that were read.

    Raises:
        DataError: The texts give no vocabulary at all.
    """
    texts = [text for source in looked.sources for text in source.tally.sample if text.strip()]
    characters = sum(source.characters for source in looked.sources)
    is_complete = all(source.is_complete for source in looked.sources)
    fixed = fixed_ids(image_codes)
    wanted = fixed + _pieces(size, characters)
    if size in PRESETS:
        wanted = 65536
    wanted = max(_round(wanted, 64), fixed + 1)
    for _ in range(2):
        try:
            tokenizer, _ = try_vocabulary(texts or [FALLBACK_TEXT], wanted, image_codes)
            break
        except VocabularyTooSmall as error:  # a script with thousands of letters
            wanted = _round(error.needed * 5 // 4, 64)
    else:
        raise DataError("the texts", "give no vocabulary", "Check that they hold text")
    found = min(tokenizer.size, wanted)
    if found < wanted and not is_complete:
        found = wanted  # what was read is a small part; the rest fills it
    elif found < wanted:
        found = _fitting(texts or [FALLBACK_TEXT], found, image_codes)
    sample = "\n".join(texts)[:200_000] or FALLBACK_TEXT
    tokens = len(tokenizer.encode(sample))
    return TextVocabulary(found, len(sample) / max(tokens, 1), found >= wanted)


def _fitting(texts: Sequence[str], most: int, image_codes: int) -> int:
    """The largest size that the texts fill, even if it can be."""
    even = most - most % 2  # two tensor-parallel ranks can share it
    try:
        tokenizer, _ = try_vocabulary(texts, even, image_codes)
    except ConfigError:
        return most
    return even if tokenizer.size >= even else most


def _pieces(size: str, characters: int) -> int:
    """Learned pieces: about one for 200 characters of the corpus."""
    most = {TINY: 1_700, SMALL: 15_000}.get(size, 60_000)
    return max(min(characters // 200, most), 160)


def _round(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def holdout(sources: Sequence[Source]) -> Holdout:
    """A share that holds out about a tenth of few documents, and fewer of many.

    A hash decides which documents those are. Where all documents were read, the share is set so
    that as many are held out as wanted; otherwise there are so many that the average will do.
    """
    documents = sum(source.documents for source in sources)
    share = 0.1 if documents < 20_000 else 0.02 if documents < 1_000_000 else 0.002
    known = [
        [None if entry.digest is None else fraction_of(entry.digest) for entry in source.tally.seen]
        for source in sources
    ]
    exact = all(
        source.is_complete and source.tally.documents == len(places) and None not in places
        for source, places in zip(sources, known, strict=True)
    )
    if not exact:
        return Holdout(share, [s.name for s in sources if s.documents * share >= 20])
    places = sorted({place for found in known for place in found if place is not None})
    if len(places) < 2:
        return Holdout(None)
    wanted = max(round(share * len(places)), 1)
    share = _between(places[wanted - 1], places[wanted])
    held = [sum(1 for p in found if p is not None and p < share) for found in known]
    counts = {source.name: count for source, count in zip(sources, held, strict=True)}
    whole = [s.name for s in sources if counts[s.name] == s.tally.documents]
    names = [name for name, count in counts.items() if count and name not in whole]
    total = sum(counts[name] for name in names)
    return Holdout(share, names, total, whole) if names else Holdout(None)


def _between(low: float, high: float) -> float:
    """A number between two others with as few digits as possible."""
    for digits in range(2, 17):
        value = round((low + high) / 2, digits)
        if low < value < high:
            return value
    return (low + high) / 2


def model_config(size: str, longest_tokens: int) -> ModelConfig:
    """The model of ``tiny`` and ``small``.

    Args:
        size: One of the two.
        longest_tokens: Of the documents that must not be cut.
    """
    if size == TINY:
        length = min(max(256, 2 ** math.ceil(math.log2(max(longest_tokens, 2)))), 1024)
        return ModelConfig(
            num_layers=3,
            hidden_size=128,
            ffn_hidden_size=320,
            num_attention_heads=4,
            seq_length=length,
            init_method_std=0.06,
        )
    length = min(max(1024, 2 ** math.ceil(math.log2(max(longest_tokens, 2)))), 4096)
    return ModelConfig(
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=2048,
        num_attention_heads=12,
        seq_length=length,
    )
