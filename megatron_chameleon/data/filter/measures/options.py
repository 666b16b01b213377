"""The filters, each of them off unless it is asked for, and the preset with the paper's values.

Every filter looks at a whole document: of several pictures the worst one counts.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated

from megatron_chameleon.config.constraints import (
    Above,
    Between,
    OneOf,
    PathText,
    Text,
    find_violations,
)
from megatron_chameleon.errors import ConfigError, ConfigErrors

_SIZE = re.compile(r"[1-9]\d{0,5}[x×][1-9]\d{0,5}")
COUNT_LIMIT = 10**9
SIDE_LIMIT = 1 << 20
PAPER = "paper"
FIRST, BEST = "first", "best"
_Size = Annotated[int, Between(1, SIDE_LIMIT)]
_Count = Annotated[int, Between(0, COUNT_LIMIT)]
_Score = Annotated[float, Between(-1e9, 1e9)]

SCORE_KEYS = ("aesthetic_score", "aesthetic", "aesthetics", "score_aesthetic")
"""The keys of a score that are looked for, in upper or lower case, if none is named."""


@dataclass
class FilterOptions:
    """What ``--config`` may say; each key is also an option, ``--min-words`` for ``min_words``."""

    check_images: bool = True
    """Open every picture, and drop documents with one that cannot be read."""

    blocklists: list[PathText] = field(default_factory=list)
    """Files of words, phrases, expressions and hashes of pictures (``blocklist.py``)."""
    blocklist_parts_of_words: bool = False
    """Whether an entry also counts inside of a longer word."""
    blocklist_case: bool = False
    """Whether upper and lower case differ."""

    min_characters: _Count | None = None
    """Characters that the texts of a document together have at least."""
    max_characters: _Count | None = None
    """Characters that they have at most."""
    min_words: _Count | None = None
    """Words that the texts of a document together have at least."""
    max_words: _Count | None = None
    """Words that they have at most."""
    min_tokens: _Count | None = None
    """Tokens of text, by ``tokenizer``, that a document has at least."""
    max_tokens: _Count | None = None
    """Tokens of text that it has at most."""
    tokenizer: PathText | None = None
    """The tokenizer folder that counts tokens of text."""
    languages: list[Annotated[str, Text(8)]] = field(default_factory=list)
    """The codes of ISO 639 that are kept, such as en."""
    min_language_probability: Annotated[float, Between(0, 1)] = 0.0
    """How sure the language must be, from 0 to 1."""

    min_width: _Size | None = None
    """Smallest width of a picture in pixels."""
    max_width: _Size | None = None
    """Largest width of a picture in pixels."""
    min_height: _Size | None = None
    """Smallest height of a picture in pixels."""
    max_height: _Size | None = None
    """Largest height of a picture in pixels."""
    max_aspect_ratio: Annotated[float, Between(1, 1e6)] | None = None
    """The longer side divided by the shorter one."""

    min_score: _Score | None = None
    """Smallest score of a picture."""
    max_score: _Score | None = None
    """Largest score of a picture."""
    score_key: Annotated[str, Text(200)] | None = None
    """The key of the score, with dots for keys inside of objects; None: one of ``SCORE_KEYS``."""
    scorer: Annotated[str, Text(400)] | None = None
    """``module:function`` that takes a picture and returns its score; it replaces the key."""
    missing_score: Annotated[str, OneOf("drop", "keep")] = "drop"
    """What becomes of a document with pictures and without a score."""

    duplicates: bool = False
    """Drop documents with the texts and pictures of another one."""
    duplicate_images: bool = False
    """Drop documents with a picture that another one has."""
    near_duplicates: Annotated[float, Between(0.3, 0.95)] | None = None
    """Drop documents whose words are so similar to those of another one (Jaccard)."""
    near_images: Annotated[int, Between(0, 16)] | None = None
    """Drop documents with a picture whose perceptual hash differs in at most so many of 64 bits."""
    keep: Annotated[str, OneOf(FIRST, BEST)] = FIRST
    """Which of several duplicates stays: the first, or the one with the best score."""
    against: list[PathText] = field(default_factory=list)
    """Documents that must not be trained, such as those of evaluations: files, globs or URLs."""

    nearest: Annotated[str, Text(20)] | None = None
    """WIDTHxHEIGHT, such as 512x512."""
    nearest_factor: Annotated[float, Above(1, at_most=1e6)] | None = None
    """Drop documents with a side that is longer or shorter than that by more than this factor."""
    keep_nearest: Annotated[int, Between(1, COUNT_LIMIT)] | None = None
    """Keep so many documents with pictures, those nearest to that size."""

    def check(self) -> None:
        """Refuse values and combinations that cannot work.

        Raises:
            ConfigErrors: All problems at once.
        """
        problems = [
            *(ConfigError(_option(p.where), p.what, p.remedy) for p in find_violations(self)),
            *self._conflicts(),
        ]
        if problems:
            raise ConfigErrors(problems)

    def _conflicts(self) -> list[ConfigError]:
        found = []
        for name in ("characters", "words", "tokens", "width", "height", "score"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                what = f"{low:g} is more than the {high:g} of --max-{name}, so nothing is kept"
                found.append(ConfigError(f"--min-{name}", what, "Exchange the two"))
        if self.counts_tokens and not self.tokenizer:
            option = "--min-tokens" if self.min_tokens is not None else "--max-tokens"
            what = "counts tokens, and no tokenizer is named"
            found.append(ConfigError(option, what, "Add --tokenizer DIR"))
        if self.nearest is not None and not _SIZE.fullmatch(self.nearest):
            what = f"{self.nearest!r} is not a size"
            found.append(ConfigError("--nearest", what, "Write it as 512x512"))
        if self.nearest is None and (self.keep_nearest or self.nearest_factor):
            option = "--keep-nearest" if self.keep_nearest else "--nearest-factor"
            found.append(ConfigError(option, "needs a size", "Add --nearest 512x512"))
        if self.nearest is not None and not (self.keep_nearest or self.nearest_factor):
            remedy = "Add --keep-nearest N, --nearest-factor X, or both"
            found.append(ConfigError("--nearest", "does not say how near is near enough", remedy))
        if self.scorer is not None and not re.fullmatch(r"[\w.]+:[\w.]+", self.scorer):
            what = f"{self.scorer!r} is not of the form module:function"
            found.append(ConfigError("--scorer", what, "Write it as my_package.scores:score"))
        if self.scorer is not None and self.score_key is not None:
            what = "names a key, and --scorer computes the score"
            found.append(ConfigError("--score-key", what, "Leave one of the two out"))
        if self.keep == BEST and not self._has_duplicate_filter:
            what = "best chooses among duplicates, and no filter looks for them"
            found.append(ConfigError("--keep", what, "Add --duplicates or --near-duplicates 0.8"))
        return found

    @property
    def counts_tokens(self) -> bool:
        return self.min_tokens is not None or self.max_tokens is not None

    @property
    def needs_score(self) -> bool:
        """Whether a document's score decides anything."""
        return self.min_score is not None or self.max_score is not None or self.keep == BEST

    @property
    def _has_duplicate_filter(self) -> bool:
        near = self.near_duplicates is not None or self.near_images is not None
        return self.duplicates or self.duplicate_images or near

    @property
    def needs_pixels(self) -> bool:
        """Whether the hash of each picture's pixels is needed, to compare documents."""
        return self._has_duplicate_filter or bool(self.against)

    @property
    def opens_images(self) -> bool:
        sizes = (self.min_width, self.max_width, self.min_height, self.max_height)
        measures = any(size is not None for size in sizes) or self.max_aspect_ratio is not None
        return (
            self.check_images
            or measures
            or self.needs_pixels
            or self.scorer is not None
            or self.nearest is not None
        )

    @property
    def nearest_size(self) -> tuple[int, int] | None:
        """Width and height of ``nearest``."""
        if self.nearest is None:
            return None
        width, height = re.split("[x×]", self.nearest)
        return int(width), int(height)


def paper_options() -> FilterOptions:
    """The paper's values for the pictures that drawing is aligned on (section 3.1): an aesthetic
    score of at least 6, and of these the 64 thousand nearest to 512 x 512."""
    return FilterOptions(min_score=6.0, nearest="512x512", keep_nearest=64_000)


def _option(key: str) -> str:
    return f"--{key.split('[')[0].replace('_', '-')}"
