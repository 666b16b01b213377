"""What every format has: a ``Source`` that reads a checkpoint piece by piece, and a ``Sink`` that
writes one.

A format is a module of this folder with ``recognise(folder)``, a ``Source`` class and a ``Sink``
class; ``formats.FORMATS`` lists them, and ``convert.py`` joins any source to any sink. Between them
go pieces in megatron-core's layout (``names.py``), one at a time.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_chameleon.checkpoint.names import (
    MAIN_WEIGHT,
    Dimensions,
    Piece,
    common_norm_groups,
    optimizer_parts,
    pieces,
)
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.tokenizer.folder import Tokenizer

ORIGIN_FILE = "chameleon.json"
ORIGIN_FORMAT = "megatron_chameleon.export/1"
SHARD_BYTES = 5 * 10**9

Stream = Iterator[tuple[Piece, torch.Tensor]]


class Source(Protocol):
    """An opened checkpoint of one format.

    Attributes:
        format: Its name, as ``--to`` takes it.
        folder: Where it lies.
        model: What the files say about the model; fields that they don't have keep their defaults.
        dimensions: The same as the sizes of the tensors, with the QK-norm groups.
        step: Updates that the model has seen; 0 where the files don't say.
        fingerprint: Of the tokenizer that belongs to it; None where the files don't say.
        has_optimizer: Whether AdamW's moments and, of weights that are not fp32, main weights can
            be read too.
        config: What it was trained with; None where the files don't say.
        data: What the run has read, as ``state.json`` keeps it; None where the files don't say.
        skipped_steps: Steps of the run that have no update, likewise; none where they don't say.

    Raises (on opening):
        CheckpointError: A tensor is missing, left over or of the wrong shape, a file is damaged, or
            it is another architecture's checkpoint.
    """

    format: str
    folder: Path
    model: ModelConfig
    dimensions: Dimensions
    step: int
    fingerprint: str | None
    has_optimizer: bool
    config: Config | None
    data: dict[str, Any] | None
    skipped_steps: Sequence[int]

    def dtype(self, piece: Piece) -> torch.dtype:
        """Of a stored weight."""
        ...

    def read(self, piece: Piece) -> torch.Tensor:
        """One piece in megatron-core's layout, without padding rows of the vocabulary.

        Args:
            piece: A weight, or a part of the optimizer's state where ``has_optimizer``.
        """
        ...

    def tokenizer_folder(self, scratch: Path) -> Path:
        """A folder for ``load_tokenizer``; what is not there as it is, is put together in scratch.

        Args:
            scratch: A folder that may be made, and filled.
        """
        ...


@dataclass(frozen=True)
class Target:
    """What a sink writes.

    Attributes:
        dtypes: Of each weight, by its piece's key.
        tokenizer: With its image tokenizer.
        origin: The checkpoint that it comes from, for people to read.
        shards: How many files, for a format where it matters to the reader; None: its default.
        shard_bytes: Largest size of a file, for the others.
        has_optimizer: Whether main weights and moments come with the weights.
        config: What it was trained with; None where the source doesn't say.
        data: What the run has read; None where the source doesn't say.
        skipped_steps: Its steps without an update.
    """

    model: ModelConfig
    dimensions: Dimensions
    dtypes: Mapping[str, torch.dtype]
    step: int
    tokenizer: Tokenizer
    origin: str
    shards: int | None = None
    shard_bytes: int = SHARD_BYTES
    has_optimizer: bool = False
    config: Config | None = None
    data: dict[str, Any] | None = None
    skipped_steps: Sequence[int] = ()

    @property
    def weights(self) -> list[Piece]:
        return list(pieces(self.dimensions))

    @property
    def pieces(self) -> list[Piece]:
        """The weights, each followed by the parts of its optimizer state, if there is one."""
        found = []
        for piece in self.weights:
            found.append(piece)
            if self.has_optimizer:
                parts = optimizer_parts(self.dtypes[piece.key])
                found += [replace(piece, part=part) for part in parts]
        return found

    def dtype(self, piece: Piece) -> torch.dtype:
        """Of a weight, or of the optimizer's state, which is in fp32."""
        return torch.float32 if piece.part else self.dtypes[piece.key]

    @property
    def main_dtype(self) -> torch.dtype:
        """The one with the most bytes: what configs call the model's."""
        sizes: dict[torch.dtype, int] = {}
        for piece in self.weights:
            dtype = self.dtypes[piece.key]
            sizes[dtype] = sizes.get(dtype, 0) + element_count(piece.shape) * dtype.itemsize
        return max(sizes, key=lambda dtype: sizes[dtype])


class Sink(Protocol):
    """Writes one checkpoint.

    Args:
        target: What to write.

    Attributes:
        holds_optimizer: Whether the format has a place for optimizer state; if not, no target has
            any.

    Raises:
        CheckpointError: The format cannot hold it.
    """

    holds_optimizer: bool

    def __init__(self, target: Target) -> None: ...

    def files(self) -> dict[str, int]:
        """The files that hold the transformer's tensors, and their sizes in bytes."""
        ...

    def write(self, folder: Path, stream: Stream) -> None:
        """Write everything into an existing, empty folder.

        Args:
            folder: It gets the destination's name afterwards.
            stream: The target's pieces in their order, each with its tensor in its dtype.
        """
        ...


def best_piece(source: Source, piece: Piece, dtype: torch.dtype) -> Piece:
    """What to read from a source for a piece in a dtype.

    An fp32 weight may be its own main weight, or have one that is more precise than itself.
    """
    is_fp32 = source.dtype(replace(piece, part=None)) == torch.float32
    if piece.part == MAIN_WEIGHT and is_fp32:
        return replace(piece, part=None)
    if piece.part is None and dtype == torch.float32 and source.has_optimizer and not is_fp32:
        return replace(piece, part=MAIN_WEIGHT)
    return piece


def one_dtype(where: str, name: str, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of tensors that other formats keep in one.

    Raises:
        CheckpointError: They have several.
    """
    found = set(dtypes)
    if len(found) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise CheckpointError(where, f"the parts of {name} are {names}", "Bring them to one dtype")
    return dtypes[0]


def check_names(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare the tensors of a checkpoint with those that its config asks for.

    Args:
        where: The folder or file that an error names.
        found: Shapes by name.
        expected: Shapes by name.

    Raises:
        CheckpointError: It names the first tensor that is missing, left over or of another shape.
    """
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(
            where, f"the tensor {name} is missing", "Use a checkpoint of a whole Chameleon model"
        )
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            where,
            f"the tensor {name} {list(found[name])} has no place in a Chameleon model",
            "Use a checkpoint of a Chameleon model",
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                where,
                f"{name} is {list(found[name])}, its config says {list(shape)}",
                "Use a checkpoint whose config is its own",
            )


def write_origin(folder: Path, target: Target) -> None:
    """``chameleon.json``: where it comes from, and what the format itself has no place for."""
    parameters = sum(element_count(piece.shape) for piece in target.weights)
    content = {
        "format": ORIGIN_FORMAT,
        "source": target.origin,
        "step": target.step,
        "vocab_size": target.dimensions.vocab_size,
        "tokenizer_fingerprint": target.tokenizer.fingerprint,
        "parameters": parameters,
        "model": asdict(target.model),
    }
    if target.has_optimizer:
        content["data"] = target.data
        content["skipped_steps"] = list(target.skipped_steps)
    (folder / ORIGIN_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> dict[str, Any]:
    """``chameleon.json`` of an exported folder.

    Raises:
        CheckpointError: The file is missing or no whole one of this version.
    """
    file = folder / ORIGIN_FILE
    remedy = "Give a folder of `chameleon convert`, or a checkpoint"
    origin = read_json_object(file, remedy)
    if origin.get("format") != ORIGIN_FORMAT:
        what = f"format is {origin.get('format')!r}, this version reads {ORIGIN_FORMAT!r}"
        raise CheckpointError(str(file), what, remedy)
    return origin


def read_json_object(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON file whose top level is an object.

    Raises:
        CheckpointError: It is not there or something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(file), f"cannot be read ({error})", remedy) from error
    if not isinstance(content, dict):
        what = f"is a {type(content).__name__}, not an object"
        raise CheckpointError(str(file), what, remedy)
    return content


def with_recorded(model: ModelConfig, origin: Mapping[str, Any], known: set[str]) -> ModelConfig:
    """The model, with what ``chameleon.json`` says about fields that the format's files don't hold.

    Args:
        model: From the files.
        origin: Content of ``chameleon.json``; may be empty.
        known: Fields that the files do hold: they stay.
    """
    recorded = origin.get("model")
    recorded = recorded if isinstance(recorded, dict) else {}
    values = asdict(model)
    for field in fields(ModelConfig):
        value = recorded.get(field.name, values[field.name])
        if field.name not in known and isinstance(value, type(values[field.name])):
            values[field.name] = value
    return ModelConfig(**values)


def norm_settings(
    recorded: Any, *, q_groups: int, k_groups: int, heads: int, key_heads: int
) -> tuple[int, int, int]:
    """``qk_norm_groups`` of a model, and the groups of its query and key norms.

    Args:
        recorded: ``qk_norm_groups`` of the config it was exported with; None where unknown. It
            counts if the tensors are equal within its groups: a group count may be larger than the
            tensors need.
        q_groups: The fewest groups in which the query norms of all layers are equal.
        k_groups: The same for the keys.
        heads: Attention heads.
        key_heads: Key heads.
    """
    groups = common_norm_groups(q_groups, k_groups, heads, key_heads)
    if isinstance(recorded, int) and recorded > 0 and heads % recorded == 0:
        of_keys = min(recorded, key_heads)
        if recorded % q_groups == 0 and key_heads % of_keys == 0 and of_keys % k_groups == 0:
            groups = recorded
    return groups, groups, min(groups, key_heads)
