"""The text tokenizer: sentencepiece BPE with byte fallback.

    python -c "
    from megatron_chameleon.tokenizer import TextTokenizer
    print(TextTokenizer.load('runs/digits/tokenizer').encode('<s> is plain text'))"

Text can never spell a control piece: only code produces image codes and sentinels.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import read_bytes

TEXT_MODEL_FILE = "text.model"
SPACE = "\u2581"
"""How sentencepiece writes a space in a piece."""


class TextTokenizer:
    """Turns text into token ids and back.

    Every string survives encoding and decoding, with two exceptions: U+2581, sentencepiece's mark
    for a space, comes back as a space, and a lone surrogate, which UTF-8 cannot hold, as U+FFFD.

    Args:
        model: The bytes of a sentencepiece model.
        where: The file that errors name.

    Raises:
        DataError: If the bytes are not a sentencepiece model.
    """

    def __init__(self, model: bytes, where: str = "text tokenizer") -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
            size = self._processor.get_piece_size()
            self._tokens = [self._processor.id_to_piece(token_id) for token_id in range(size)]
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise DataError(
                where,
                f"is not a sentencepiece model ({len(model)} bytes)",
                "Make it with `chameleon tokenizer text`",
            ) from error
        self._is_text = np.array(
            [
                not (self._processor.is_control(i) or self._processor.is_unknown(i))
                for i in range(size)
            ]
        )

    @classmethod
    def load(cls, folder: str | Path) -> "TextTokenizer":
        """Read FOLDER/text.model.

        Raises:
            DataError: If the file is missing or is not a sentencepiece model.
        """
        path = Path(folder) / TEXT_MODEL_FILE
        try:
            model = read_bytes(path)
        except DataError as error:
            remedy = "Make it with `chameleon tokenizer text`"
            raise DataError(error.where, error.what, remedy) from error
        return cls(model, where=str(path))

    @property
    def size(self) -> int:
        """Number of token ids, including image codes and sentinels."""
        return len(self._is_text)

    @property
    def tokens(self) -> list[str]:
        """Token names by id."""
        return list(self._tokens)

    def is_text(self, token_id: int) -> bool:
        """Whether a token stands for text: neither a control piece nor ``<unk>``."""
        return bool(self._is_text[token_id])

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is one of the 256 bytes, such as ``<0x0A>``."""
        return self._processor.is_byte(token_id)

    def byte(self, token_id: int) -> bytes:
        """The byte of such a token."""
        return bytes([int(self._tokens[token_id][1:-1], 16)])

    def piece(self, token_id: int) -> str:
        """The text of a token that is not a byte, behind other text."""
        return self._tokens[token_id].replace(SPACE, " ")

    def score(self, token_id: int) -> float:
        """The score of a piece: the earlier it was learned, the higher."""
        return self._processor.get_score(token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without ``<s>`` and ``</s>``; never a control or image token."""
        return self._processor.encode(without_surrogates(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` for many texts, on one thread, because preprocessing runs many processes."""
        return self._processor.encode([without_surrogates(text) for text in texts], num_threads=1)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids. Control and image tokens are skipped; broken UTF-8 becomes U+FFFD.

        Args:
            token_ids: Ids in [0, size).

        Raises:
            DataError: If an id is outside the vocabulary.
        """
        ids = [int(token_id) for token_id in token_ids]
        wrong = [token_id for token_id in ids if not 0 <= token_id < self.size]
        if wrong:
            raise DataError(
                "token ids",
                f"{wrong[0]} is outside the vocabulary of {self.size}",
                "Use the tokenizer that the ids were made with",
            )
        return self._processor.decode([token_id for token_id in ids if self._is_text[token_id]])


def without_surrogates(text: str) -> str:
    """Replace lone surrogates by U+FFFD: JSON can spell them, but sentencepiece refuses them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
