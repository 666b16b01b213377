"""Which parameters ``model.train`` and ``model.freeze`` choose, before any model exists.

Patterns are globs on the tensor names of the exported Hugging Face model, since these are the names
that users see. A pattern also matches if it names a module that holds the tensor. The two tensors
with a row per token take a suffix for rows: ``lm_head[image]``.

    select_trained(config, vocabulary.size, vocabulary.code_token_ids).rows(name)
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from megatron_chameleon.checkpoint.names.mappings import VOCABULARY, Dimensions
from megatron_chameleon.checkpoint.names.partial_state import layer_key
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.config.parameters import qk_norm_groups, query_groups
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.model.tuning.wrong_patterns import matches_nothing
from megatron_chameleon.wording import cut

_ROWS = re.compile(r"(?P<name>.*)\[(?P<rows>image|text|\d*:\d*)\]")
_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+\.")
Range = tuple[int, int]


@dataclass(frozen=True)
class Selection:
    """What of a model is trained.

    Attributes:
        trained: For each parameter, by its name in the whole model (megatron-core's, with the
            number of its layer): the rows that are trained as ranges [first, last), in order. No
            ranges: the parameter is frozen.
        shapes: The whole shape of each parameter, by the same names.
        text: The patterns, in words; empty: everything is trained.
    """

    trained: Mapping[str, tuple[Range, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    text: str

    def rows(self, name: str) -> tuple[Range, ...] | None:
        """The trained rows of a parameter; None: all of it, which is so for unknown names too."""
        ranges = self.trained.get(name)
        return None if ranges is None or ranges == ((0, self.shapes[name][0]),) else ranges

    def is_trained(self, name: str, layer: int | None) -> bool:
        """Whether any row of a parameter is trained.

        Args:
            name: In a checkpoint, where the layers are stacked.
            layer: None: it is outside the layers.
        """
        return bool(self.trained[name if layer is None else layer_key(name, layer)])

    def count(self, name: str) -> int:
        """The trained elements of a parameter."""
        width = math.prod(self.shapes[name][1:])
        return width * sum(last - first for first, last in self.trained[name])

    @property
    def with_gradient(self) -> dict[str, int] | None:
        """The elements of each parameter that has a gradient and optimizer state, for the planner;
        None: all have, or beside an adapter none. If some rows are trained, all rows have them."""
        if self.is_everything or not self.trained_count:
            return None
        return {name: math.prod(self.shapes[name]) for name, rows in self.trained.items() if rows}

    @property
    def trained_count(self) -> int:
        """The trained elements of the whole model."""
        return sum(map(self.count, self.trained))

    @property
    def total_count(self) -> int:
        """All elements of the whole model."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def is_everything(self) -> bool:
        return self.trained_count == self.total_count

    @property
    def split_stacks(self) -> frozenset[str]:
        """The stacked weights of which only some layers are trained, by their stacked names."""
        layers: dict[str, set[bool]] = {}
        for name, ranges in self.trained.items():
            layers.setdefault(_LAYER.sub("", name), set()).add(bool(ranges))
        return frozenset(name for name, states in layers.items() if len(states) > 1)


def select_trained(
    config: Config, vocab_size: int, image_ids: Sequence[int] | np.ndarray = ()
) -> Selection:
    """Find what is trained of the model's own parameters.

    These are all of them where ``model.train`` is empty. Beside adapters they are none.

    Args:
        config: Its patterns, and the shape of the model that they are about.
        vocab_size: Number of tokens in the vocabulary.
        image_ids: The token ids of the image codes, for patterns with ``[image]`` or ``[text]``.

    Raises:
        ConfigError: A pattern matches nothing, or only a part of a parameter; or nothing is
            trained.
    """
    model, base_is_trained = config.model, not config.adapter.rank
    rows = _parameters(model, vocab_size)
    hf_rows = {name: row.shape[0] for row in rows.values() for name in row.hf_names}
    vocabulary_names = {
        name for row in rows.values() if row.mapping is VOCABULARY for name in row.hf_names
    }
    masks = {
        name: np.full(
            # The rows of other tensors are all alike.
            count if name in vocabulary_names else 1,
            base_is_trained and not model.train,
        )
        for name, count in hf_rows.items()
    }
    for key, value in (("train", True), ("freeze", False)):
        for i, pattern in enumerate(getattr(model, key)):
            where = f"model.{key}[{i}]"
            name, wanted = _parse(pattern, where, vocab_size, image_ids)
            matched = [hf_name for hf_name in hf_rows if _matches(hf_name, name)]
            if not matched:
                raise matches_nothing(where, pattern, name, rows.values())
            if wanted is not None and (wrong := set(matched) - vocabulary_names):
                first = next(n for n in matched if n in wrong)
                what = f"{cut(pattern)!r} asks for rows of {first}, which has no row per token"
                remedy = "Only lm_head and model.embed_tokens have; name the others without [...]"
                raise ConfigError(where, what, remedy)
            for hf_name in matched:
                masks[hf_name][slice(None) if wanted is None else wanted] = value
    trained = {name: _of_parameter(row, masks, model) for name, row in rows.items()}
    selection = Selection(
        trained, {name: row.shape for name, row in rows.items()}, _in_words(model, base_is_trained)
    )
    if base_is_trained and not selection.trained_count:
        key, what = ("freeze", "freezes") if model.freeze else ("train", "leaves")
        left = "all that model.train names" if model.train else "the whole model"
        what = f"{what} {left}, so nothing would be trained"
        raise ConfigError(f"model.{key}", what, "Remove a pattern, or name more in model.train")
    return selection


def _parameters(model: ModelConfig, vocab_size: int) -> dict[str, TensorRow]:
    """The rows of the name table by the parameters' names in the whole model."""
    groups = qk_norm_groups(model)
    dimensions = Dimensions.of(
        model,
        vocab_size=vocab_size,
        q_norm_groups=groups,
        k_norm_groups=min(groups, query_groups(model)),
    )
    return {
        (row.megatron_name if row.layer is None else layer_key(row.megatron_name, row.layer)): row
        for row in tensor_rows(dimensions)
    }


def _parse(
    pattern: str, where: str, vocab_size: int, image_ids: Sequence[int] | np.ndarray
) -> tuple[str, np.ndarray | slice | None]:
    """A pattern's glob, and the rows that its suffix names; None: it has no suffix."""
    found = _ROWS.fullmatch(pattern)
    if found is None:
        return pattern, None
    name, rows = found["name"], found["rows"]
    if rows in ("image", "text"):
        if not len(image_ids):
            what = f"{cut(pattern)!r} needs the ids of the image codes, and no tokenizer is known"
            raise ConfigError(where, what, "Give the rows as numbers, such as lm_head[4:8196]")
        mask = np.zeros(vocab_size, dtype=bool)
        mask[np.asarray(image_ids)] = True
        return name, mask if rows == "image" else ~mask
    first, last = (
        int(text) if text else end
        for text, end in zip(rows.split(":"), (0, vocab_size), strict=True)
    )
    if not 0 <= first < last <= vocab_size:
        what = f"{cut(pattern)!r} asks for the rows {first:,} to {last:,} of {vocab_size:,} tokens"
        raise ConfigError(where, what, f"Use rows from 0 to {vocab_size:,}, the last one excluded")
    return name, slice(first, last)


def _matches(hf_name: str, pattern: str) -> bool:
    """Whether a glob matches a tensor, or a module that holds it."""
    words = hf_name.split(".")
    return any(fnmatchcase(".".join(words[:n]), pattern) for n in range(1, len(words) + 1))


def _of_parameter(
    row: TensorRow, masks: Mapping[str, np.ndarray], model: ModelConfig
) -> tuple[Range, ...]:
    """The trained rows of one parameter, which may hold several tensors.

    Raises:
        ConfigError: Only some of them are trained.
    """
    states = {name: masks[name] for name in row.hf_names}
    if len(states) > 1 and len({bool(mask[0]) for mask in states.values()}) > 1:
        trained = [name for name, mask in states.items() if mask[0]]
        frozen = [name for name, mask in states.items() if not mask[0]]
        names = [name.removesuffix(".weight").rsplit(".", 1)[-1] for name in states]
        what = (
            f"{', '.join(trained)} would be trained and {', '.join(frozen)} would not, but they "
            "are one tensor in training"
        )
        together = ", ".join(f'"*.{name}"' for name in names)
        key = "train" if model.train else "freeze"
        raise ConfigError(f"model.{key}", what, f"Name them together: [{together}]")
    if row.mapping is not VOCABULARY:
        return ((0, row.shape[0]),) if next(iter(states.values()))[0] else ()
    return tuple(_ranges(next(iter(states.values()))))


def _ranges(mask: np.ndarray) -> Iterator[Range]:
    """The ranges [first, last) of a mask's true elements."""
    edges = np.flatnonzero(np.diff(np.r_[False, mask, False].astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _in_words(model: ModelConfig, base_is_trained: bool) -> str:
    if not model.train and not model.freeze:
        return "" if base_is_trained else "nothing"
    text = ", ".join(model.train) or ("everything" if base_is_trained else "nothing")
    return f"{text} except {', '.join(model.freeze)}" if model.freeze else text
