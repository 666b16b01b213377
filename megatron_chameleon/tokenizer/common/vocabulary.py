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
from megatron_chameleon.tokenizer.common.grids import (
    END_ROW,
    Grid,
    Shapes,
    grid_of_name,
    square_grid,
)

VOCABULARY_FILE = "vocabulary.json"
FORMAT = "megatron_chameleon.vocabulary/1"
SHAPED_FORMAT = "megatron_chameleon.vocabulary/2"
"""Of a vocabulary with grids, which programs that know only squares must not read."""

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

_WHOLE_PICTURE = "Pass the ids between the begin and the end of one whole picture"
_DIGITS_TO_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
_LETTERS_TO_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")
_IMAGE_CODE_NAME = re.compile(r"IMGIMG([A-J]+)Z")


def image_code_name(code: int) -> str:
    """The token name of an image code: 17 -> ``IMGIMGBHZ``. Source: the released vocabulary."""
    return f"IMGIMG{str(code).translate(_DIGITS_TO_LETTERS)}Z"


def control_names(image_codes: int, shapes: Shapes | None = None) -> list[str]:
    """The names that follow ``<unk>`` (id 3) in our vocabularies, in id order.

    Args:
        image_codes: Size of the image tokenizer's codebook.
        shapes: The grids that pictures may have; None: one square.
    """
    codes = [image_code_name(code) for code in range(image_codes)]
    grids = [*(grid.name for grid in shapes.grids), END_ROW] if shapes else []
    return [*codes, END_IMAGE, BEGIN_IMAGE, SEPARATOR, IMAGE_PLACEHOLDER, *grids]


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
    grids: tuple[Grid, ...] = ()
    """The grids that it has tokens for, in the order of their ids; empty if all pictures have the
    one square grid of the image tokenizer."""
    end_row: int | None = None
    """Ends each row of codes; None without grids."""

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

    @cached_property
    def grid_token_ids(self) -> np.ndarray:
        """Token id of each of ``grids``: int64 [grids]."""
        ids = {name: token_id for token_id, name in enumerate(self.tokens)} if self.grids else {}
        table = np.array([ids[grid.name] for grid in self.grids], dtype=np.int64)
        table.setflags(write=False)
        return table

    @cached_property
    def _grid_of_token(self) -> dict[int, Grid]:
        return dict(zip(self.grid_token_ids.tolist(), self.grids, strict=True))

    def grid_of_token(self, token_id: int) -> Grid | None:
        """The grid that a token announces; None if it announces none."""
        return self._grid_of_token.get(int(token_id))

    def grid_token(self, grid: Grid) -> int:
        """The token that announces a grid.

        Raises:
            DataError: The vocabulary does not have it.
        """
        if grid not in self.grids:
            raise DataError(
                "image codes",
                f"a picture of {Grid(*grid)} codes has none of the {len(self.grids)} grids of the "
                "vocabulary",
                "Use a grid of the vocabulary: `shapes.grid_of(width, height)`",
            )
        return int(self.grid_token_ids[self.grids.index(grid)])

    @cached_property
    def shapes(self) -> Shapes | None:
        """The grids that pictures may have; None if all have the image tokenizer's square."""
        return Shapes.of(self.grids) if self.grids else None

    def image_length(self, grid: Grid) -> int:
        """The tokens of a picture, from begin-image to end-image, both included."""
        return 2 + grid.codes + (1 + grid.rows if self.grids else 0)

    @cached_property
    def tokens_beside_codes(self) -> np.ndarray:
        """What stands between begin-image and end-image apart from codes: int64 [grids + 1], the
        grids and the end of a row; empty without grids."""
        end = [] if self.end_row is None else [self.end_row]
        return np.append(self.grid_token_ids, np.array(end, dtype=np.int64))

    @cached_property
    def _stands_in_image(self) -> np.ndarray:
        """For each token id whether it is an image code, a grid or the end of a row: bool."""
        table = self._code_of_token_id >= 0
        table[self.tokens_beside_codes] = True
        return table

    def is_inside_image(self, token_ids: np.ndarray) -> np.ndarray:
        """Which token ids stand between begin-image and end-image: image codes, and with grids
        their tokens and ends of rows. bool, same shape; False for ids outside [0, size)."""
        token_ids = _as_integers(token_ids, "token ids")
        inside = (token_ids >= 0) & (token_ids < self.size)
        return inside & self._stands_in_image[np.where(inside, token_ids, 0)]

    def image_tokens(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        """The tokens of a picture between begin-image and end-image.

        With grids they are the grid's token, then each row of codes and the end of the row; without
        grids, the codes alone.

        Args:
            codes: Integers [grid.codes] in [0, image_codes), row-major.
            grid: Rows and columns of the codes.

        Returns:
            int64 [image_length(grid) - 2].

        Raises:
            DataError: The codes do not fill the grid, one is no image code, or the vocabulary has
                no such grid.
        """
        grid = Grid(*grid)
        codes = np.asarray(codes).reshape(-1)
        if len(codes) != grid.codes:
            raise DataError(
                "image codes",
                f"{len(codes)} codes for a grid of {grid}, which has {grid.codes}",
                "Pass the codes of one whole picture",
            )
        ids = self.codes_to_token_ids(codes)
        if not self.grids:
            if grid.rows != grid.columns:
                raise self.no_grids(f"a picture of {grid} codes")
            return ids
        rows = np.full((grid.rows, grid.columns + 1), self.end_row, dtype=np.int64)
        rows[:, :-1] = ids.reshape(grid)
        return np.append(self.grid_token(grid), rows)

    def read_image(self, token_ids: np.ndarray) -> tuple[Grid, np.ndarray]:
        """The inverse of ``image_tokens``.

        Args:
            token_ids: Those between begin-image and end-image, one-dimensional.

        Returns:
            The grid, and its codes: int64 [grid.codes], row-major.

        Raises:
            DataError: The tokens are not those of one whole picture.
        """
        ids = _as_integers(token_ids, "token ids").reshape(-1)
        if not self.grids:
            return square_grid(len(ids)), self.token_ids_to_codes(ids)
        grid = self.grid_of_token(ids[0]) if len(ids) else None
        if grid is None:
            first = f"begins with the token {ids[0]}, not a grid" if len(ids) else "has no tokens"
            raise DataError("token ids", f"a picture {first}", _WHOLE_PICTURE)
        if len(ids) != self.image_length(grid) - 2:
            what = f"a picture of {grid} codes has {len(ids) - 1} tokens after its grid, not "
            what += f"{self.image_length(grid) - 3}"
            raise DataError("token ids", what, _WHOLE_PICTURE)
        rows = ids[1:].reshape(grid.rows, grid.columns + 1)
        wrong = np.flatnonzero(rows[:, -1] != self.end_row)
        if len(wrong):
            what = f"row {wrong[0] + 1} of a picture of {grid} codes does not end after its "
            what += f"{grid.columns} codes"
            raise DataError("token ids", what, _WHOLE_PICTURE)
        return grid, self.token_ids_to_codes(rows[:, :-1]).reshape(-1)

    def no_grids(self, asked: str) -> DataError:
        """The error for a picture of another shape, where the vocabulary has no grids.

        Args:
            asked: What was asked for.
        """
        return DataError(
            "vocabulary",
            f"has no token for {asked}: it has no grids, so all pictures are squares",
            "Use a vocabulary of `chameleon tokenizer text --image-grids BUDGET`; released "
            "vocabularies have none",
        )

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
        grids = tuple(grid for name in tokens if (grid := grid_of_name(name)) is not None)
        end_row = ids.get(END_ROW)
        if bool(grids) != (end_row is not None):
            has, lacks = (f"{len(grids)} grids", END_ROW) if grids else (END_ROW, Grid(4, 4).name)
            raise DataError(
                where,
                f"has {has}, but no token such as {lacks}",
                "Use a vocabulary made by `chameleon tokenizer text --image-grids BUDGET`",
            )
        return cls(
            tuple(tokens), image_codes=len(codes), grids=grids, end_row=end_row, **special_ids
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Vocabulary":
        """Read FOLDER/vocabulary.json.

        Raises:
            DataError: If the file is missing, unreadable or not a vocabulary.
        """
        path = Path(folder) / VOCABULARY_FILE
        formats = (FORMAT, SHAPED_FORMAT)
        content = read_checked_json(path, formats, made_by="chameleon tokenizer text")
        tokens = content.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(name, str) for name in tokens):
            raise DataError(
                str(path), "`tokens` is not a list of names", "Run `chameleon tokenizer text` again"
            )
        vocabulary = cls.from_tokens(tokens, where=str(path))
        if bool(vocabulary.grids) != (content["format"] == SHAPED_FORMAT):
            what = f"`format` is {content['format']!r}, which does not fit its "
            what += f"{len(vocabulary.grids)} grids"
            raise DataError(str(path), what, "Run `chameleon tokenizer text` again")
        return vocabulary

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
        values["grids"] = len(self.grids)
        if not self.grids:
            del values["grids"], values["end_row"]
        name = SHAPED_FORMAT if self.grids else FORMAT
        content = {"format": name, "size": self.size, **values, "tokens": tokens}
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
