"""Turns text into token ids in bulk, with the fastest library that gives sentencepiece's ids.

    encoder = choose_text_encoder(tokenizer.text, texts)   # compares both on these texts
    token_ids, offsets = encoder.encode(texts)

gigatoken is several times as fast as sentencepiece and gives the same ids, except for texts that
spell a control piece: these become that piece. So gigatoken gets a model in which the names of all
control pieces begin with U+FFFE, which is not a character, and texts that contain U+FFFE are
encoded with sentencepiece.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_chameleon.tokenizer.text.model_file import HARD_TEXTS, rename_control_pieces
from megatron_chameleon.tokenizer.text.tokenizer import TextTokenizer, without_surrogates

FAST, EXACT = "gigatoken", "sentencepiece"
_NO_CHARACTER = "\ufffe"


class TextEncoder(Protocol):
    """Encodes many texts at once, on one thread."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts, one after the other; no text gives a control or image token.

        Returns:
            The token ids, unsigned [tokens], and where each text begins, and the end: int64
            [texts + 1].
        """
        ...


class ExactTextEncoder:
    """sentencepiece itself."""

    name = EXACT

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lists = self._tokenizer.encode_batch(texts)
        offsets = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(token_ids) for token_ids in lists], out=offsets[1:])
        joined = itertools.chain.from_iterable(lists)
        return np.fromiter(joined, dtype=np.uint32, count=int(offsets[-1])), offsets


class FastTextEncoder:
    """gigatoken.

    Raises:
        ImportError: If it is not installed.
        ValueError: If it cannot read the model.
    """

    name = FAST

    def __init__(self, tokenizer: TextTokenizer) -> None:
        import gigatoken

        self._exact = ExactTextEncoder(tokenizer)
        model = rename_control_pieces(tokenizer.model, _NO_CHARACTER)
        try:
            self._tokenizer: Any = gigatoken.Tokenizer.from_sentencepiece(model)
        except Exception as error:  # its Rust code raises several types
            raise ValueError(" ".join(str(error).split())) from error

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            data = [text.encode() for text in texts]
        except UnicodeEncodeError:
            data = [without_surrogates(text).encode() for text in texts]
        if any(_NO_CHARACTER in text for text in texts):
            return self._exact.encode(texts)
        if not data:
            return np.empty(0, dtype=np.uint32), np.zeros(1, dtype=np.int64)
        layout = self._tokenizer.encode_batch(data, parallel=False).layout
        return layout.content.data, layout.offsets.data


@dataclass(frozen=True)
class TextEncoderChoice:
    """Which library encodes, and why it is not the fast one (empty if it is)."""

    name: str
    why: str = ""


def choose_text_encoder(tokenizer: TextTokenizer, texts: Sequence[str]) -> TextEncoderChoice:
    """Choose the fast library if it agrees with sentencepiece on these and on difficult texts.

    Args:
        tokenizer: The text tokenizer.
        texts: Texts to compare on, taken from the input.
    """
    controls = [name for i, name in enumerate(tokenizer.tokens) if not tokenizer.is_text(i)]
    hard = [*HARD_TEXTS, " ".join(controls[:: max(1, len(controls) // 100)]), "a\u2581b", ""]
    tried = [*texts, *hard]
    try:
        fast, offsets = FastTextEncoder(tokenizer).encode(tried)
    except ImportError:
        return TextEncoderChoice(EXACT, "gigatoken is not installed")
    except ValueError as error:
        return TextEncoderChoice(EXACT, f"gigatoken cannot read the model ({error})")
    exact, expected = ExactTextEncoder(tokenizer).encode(tried)
    if np.array_equal(fast, exact) and np.array_equal(offsets, expected):
        return TextEncoderChoice(FAST)
    different = (
        text
        for i, text in enumerate(tried)
        if not np.array_equal(
            fast[offsets[i] : offsets[i + 1]], exact[expected[i] : expected[i + 1]]
        )
    )
    return TextEncoderChoice(EXACT, f"gigatoken gives other ids for {next(different)[:40]!r}")


def make_text_encoder(tokenizer: TextTokenizer, name: str) -> TextEncoder:
    """Create the encoder that ``choose_text_encoder`` chose."""
    return FastTextEncoder(tokenizer) if name == FAST else ExactTextEncoder(tokenizer)
