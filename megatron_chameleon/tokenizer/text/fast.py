"""Text to token ids in bulk, by the fastest library whose ids are sentencepiece's.

    encoder = choose_text_encoder(tokenizer.text, texts)   # compares on these texts first
    token_ids, offsets = encoder.encode(texts)

gigatoken is several times as fast as sentencepiece and gives the same ids, but for texts that spell
a control piece: it makes that piece of them. So it gets a model whose control pieces have names
that begin with U+FFFE, which is no character, and texts that contain U+FFFE go to sentencepiece.
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
        """Token ids of texts, one after the other, never a control or image token.

        Returns:
            Unsigned [tokens], and int64 [texts + 1]: where each text begins, and the end.
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
        ImportError: When it is not installed.
        ValueError: When it does not read the model.
    """

    name = FAST

    def __init__(self, tokenizer: TextTokenizer) -> None:
        import gigatoken

        self._exact = ExactTextEncoder(tokenizer)
        model = rename_control_pieces(tokenizer.model, _NO_CHARACTER)
        try:
            self._tokenizer: Any = gigatoken.Tokenizer.from_sentencepiece(model)
        except Exception as error:  # its Rust half raises several types
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
    """Which library encodes, and why it is not the fast one."""

    name: str
    why: str = ""


def choose_text_encoder(tokenizer: TextTokenizer, texts: Sequence[str]) -> TextEncoderChoice:
    """Compare the fast library with sentencepiece on texts, and on some that are hard.

    Args:
        tokenizer: The text tokenizer.
        texts: The texts at hand.
    """
    controls = [name for i, name in enumerate(tokenizer.tokens) if not tokenizer.is_text(i)]
    hard = [*HARD_TEXTS, " ".join(controls[:: max(1, len(controls) // 100)]), "a\u2581b", ""]
    tried = [*texts, *hard]
    try:
        fast, offsets = FastTextEncoder(tokenizer).encode(tried)
    except ImportError:
        return TextEncoderChoice(EXACT, "gigatoken is not installed")
    except ValueError as error:
        return TextEncoderChoice(EXACT, f"gigatoken does not read the model ({error})")
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
    """The encoder that ``choose_text_encoder`` chose."""
    return FastTextEncoder(tokenizer) if name == FAST else ExactTextEncoder(tokenizer)
