"""The one table of what each token id means: text pieces, image codes and sentinels.

An image code is an index into the image tokenizer's codebook, in [0, image_codes). A token id is an
index into the model's embedding, in [0, size). Only ``Vocabulary`` converts one into the other. It
reads the mapping from the token names: code 17 is the token named ``IMGIMGBHZ``, whatever its id.

    python -c "
    from megatron_chameleon.tokenizer import Vocabulary
    print(Vocabulary.load('runs/digits/tokenizer'))"
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import write_bytes
from megatron_chameleon.tokenizer.common.files import read_checked_json

VOCABULARY_FILE = "vocabulary.json"
FORMAT = "megatron_chameleon.vocabulary/1"

BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
END_IMAGE, BEGIN_IMAGE, SEPARATOR = "<eoss>", "<racm3:break>", "<reserved08706>"
IMAGE_PLACEHOLDER = "<image>"
RELEASED_IMAGE_PLACEHOLDER = "<reserved08707>"
"""The released vocabulary's name for the token that Hugging Face calls ``<image>``."""

_SPECIAL_NAMES = {
    "bos": BOS,
    "pad": PAD,
    "eos": EOS,
    "unk": UNK,
    "begin_image": BEGIN_IMAGE,
    "end_image": END_IMAGE,
    "separator": SEPARATOR,
}
"""Field of ``Vocabulary`` -> token name, where the name is always the same."""

_DIGITS_TO_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
_LETTERS_TO_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")
_IMAGE_CODE_NAME = re.compile(r"IMGIMG([A-J]+)Z")


def image_code_name(code: int) -> str:
    """The token name of an image code: 17 -> ``IMGIMGBHZ``. Source: the released vocabulary."""
    return f"IMGIMG{str(code).translate(_DIGITS_TO_LETTERS)}Z"


def control_names(image_codes: int) -> list[str]:
    """The names that follow ``<unk>`` (id 3) in our vocabularies, in id order.

    Args:
        image_codes: Size of the image tokenizer's codebook.
    """
    codes = [image_code_name(code) for code in range(image_codes)]
    return [*codes, END_IMAGE, BEGIN_IMAGE, SEPARATOR, IMAGE_PLACEHOLDER]


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a model by id, and the ids with a special meaning.

    Create one with ``from_tokens`` or ``load``, which find the special ids by name.
    """

    tokens: tuple[str, ...] = field(repr=False)
    """Token names; the index is the token id."""
    bos: int
    pad: int
    eos: int
    unk: int
    begin_image: int
    end_image: int
    separator: int
    """Ends a prompt, so it stands between prompt and answer."""
    image_placeholder: int
    """Stands for an image code in Hugging Face's inputs; it never occurs in a training sequence."""
    image_codes: int
    """Size of the image tokenizer's codebook."""

    @property
    def size(self) -> int:
        """Number of token ids."""
        return len(self.tokens)

    @cached_property
    def code_token_ids(self) -> np.ndarray:
        """Token id of each image code: int64 [image_codes]."""
        table = np.full(self.image_codes, -1, dtype=np.int64)
        for token_id, code in _codes_by_token_id(self.tokens).items():
            table[code] = token_id
        table.setflags(write=False)
        return table

    @cached_property
    def _code_of_token_id(self) -> np.ndarray:
        """Image code of each token id, -1 for other tokens: int64 [size]."""
        table = np.full(self.size, -1, dtype=np.int64)
        table[self.code_token_ids] = np.arange(self.image_codes)
        return table

    def codes_to_token_ids(self, codes: np.ndarray) -> np.ndarray:
        """Turn image codes into token ids.

        Args:
            codes: Integers in [0, image_codes), any shape.

        Returns:
            Token ids, int64, the same shape.

        Raises:
            DataError: If a value is not an image code.
        """
        codes = _as_integers(codes, "image codes")
        wrong = (codes < 0) | (codes >= self.image_codes)
        if wrong.any():
            raise DataError(
                "image codes",
                f"{int(wrong.sum())} of {codes.size} values are outside [0, {self.image_codes}), "
                f"the first is {int(codes[wrong][0])}",
                "Use the image tokenizer that belongs to this vocabulary",
            )
        return self.code_token_ids[codes]

    def token_ids_to_codes(self, token_ids: np.ndarray) -> np.ndarray:
        """Turn token ids into image codes.

        Args:
            token_ids: Ids of image-code tokens, any shape.

        Returns:
            Image codes, int64 in [0, image_codes), the same shape.

        Raises:
            DataError: If an id is not that of an image code.
        """
        token_ids = _as_integers(token_ids, "token ids")
        wrong = ~self.is_image_code(token_ids)
        if wrong.any():
            first = int(token_ids[wrong][0])
            name = f" ({self.tokens[first]})" if 0 <= first < self.size else ""
            raise DataError(
                "token ids",
                f"{int(wrong.sum())} of {token_ids.size} ids are not image codes, "
                f"the first is {first}{name}",
                "Pass the ids between the begin and the end of an image, without the two sentinels",
            )
        return self._code_of_token_id[token_ids]

    def is_image_code(self, token_ids: np.ndarray) -> np.ndarray:
        """Which token ids are image codes: bool, same shape; False for ids outside [0, size)."""
        token_ids = _as_integers(token_ids, "token ids")
        inside = (token_ids >= 0) & (token_ids < self.size)
        return inside & (self._code_of_token_id[np.where(inside, token_ids, 0)] >= 0)

    @classmethod
    def from_tokens(cls, tokens: Sequence[str], where: str = "vocabulary") -> "Vocabulary":
        """Find every special token by name.

        Args:
            tokens: Token names; the index is the token id.
            where: The file that an error names.

        Raises:
            DataError: If a special token is missing, a name occurs twice, or the image codes have
                gaps.
        """
        ids = {name: token_id for token_id, name in enumerate(tokens)}
        if len(ids) != len(tokens):
            twice = next(name for token_id, name in enumerate(tokens) if ids[name] != token_id)
            raise DataError(
                where, f"the token {twice!r} occurs twice", "Give each token id a name of its own"
            )
        placeholder = IMAGE_PLACEHOLDER if IMAGE_PLACEHOLDER in ids else RELEASED_IMAGE_PLACEHOLDER
        special = {**_SPECIAL_NAMES, "image_placeholder": placeholder}
        missing = [name for name in special.values() if name not in ids]
        if missing:
            raise DataError(
                where,
                f"none of the {len(tokens)} tokens is called {', '.join(missing)}",
                "Use a vocabulary made by `chameleon tokenizer text`, or the released one",
            )
        codes = sorted(_codes_by_token_id(tokens).values())
        if not codes or codes != list(range(len(codes))):
            gap = next((i for i, code in enumerate(codes) if i != code), len(codes))
            raise DataError(
                where,
                f"has {len(codes)} image codes, but {image_code_name(gap)} (code {gap}) is missing",
                "Name the image codes IMGIMGAZ (0), IMGIMGBZ (1), ... without gaps",
            )
        special_ids = {role: ids[name] for role, name in special.items()}
        return cls(tuple(tokens), image_codes=len(codes), **special_ids)

    @classmethod
    def load(cls, folder: str | Path) -> "Vocabulary":
        """Read FOLDER/vocabulary.json.

        Raises:
            DataError: If the file is missing, unreadable or not a vocabulary.
        """
        path = Path(folder) / VOCABULARY_FILE
        content = read_checked_json(path, FORMAT, made_by="chameleon tokenizer text")
        tokens = content.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(name, str) for name in tokens):
            raise DataError(
                str(path), "`tokens` is not a list of names", "Run `chameleon tokenizer text` again"
            )
        return cls.from_tokens(tokens, where=str(path))

    def save(self, folder: str | Path) -> None:
        """Write FOLDER/vocabulary.json.

        Raises:
            DataError: If the file system refuses it.
        """
        write_bytes(Path(folder) / VOCABULARY_FILE, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of vocabulary.json: the special ids, for people, then all tokens by id."""
        values = asdict(self)
        tokens = values.pop("tokens")
        content = {"format": FORMAT, "size": self.size, **values, "tokens": tokens}
        return (json.dumps(content, ensure_ascii=False, indent=0) + "\n").encode()


def _codes_by_token_id(tokens: Sequence[str]) -> dict[int, int]:
    """Image code of each token id whose name spells one."""
    matches = ((token_id, _IMAGE_CODE_NAME.fullmatch(name)) for token_id, name in enumerate(tokens))
    return {
        token_id: int(match[1].translate(_LETTERS_TO_DIGITS))
        for token_id, match in matches
        if match
    }


def _as_integers(values: np.ndarray, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            what, f"values of type {array.dtype} are not integers", "Pass an integer array"
        )
    return array.astype(np.int64)
