"""What every format has: a ``CheckpointReader`` and a ``CheckpointWriter``.

A format is a module of this folder with ``recognise(folder)``, a ``Reader`` class and a ``Writer``
class; ``formats.FORMATS`` lists the modules, and ``convert/run.py`` joins any reader to any writer.
Rows of the table of tensor names (``checkpoint/names``) go from one to the other, one at a time, as
tensors in megatron-core's form.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.optimizer_state import MAIN_WEIGHT, optimizer_parts
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.tokenizer.folder import Tokenizer

ORIGIN_FILE = "chameleon.json"
ORIGIN_FORMAT = "megatron_chameleon.export/1"
SHARD_BYTES = 5 * 10**9

RowStream = Iterator[tuple[TensorRow, torch.Tensor]]


class CheckpointReader(Protocol):
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

    def dtype(self, row: TensorRow) -> torch.dtype:
        """Of a stored weight."""
        ...

    def read(self, row: TensorRow) -> torch.Tensor:
        """One row in megatron-core's layout, without padding rows of the vocabulary.

        Args:
            row: A weight, or a part of the optimizer's state where ``has_optimizer``.
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
        dtypes: Of each weight, by its row's key.
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
    def weights(self) -> list[TensorRow]:
        return list(tensor_rows(self.dimensions))

    @property
    def rows(self) -> list[TensorRow]:
        """The weights, each followed by the parts of its optimizer state, if there is one."""
        found = []
        for row in self.weights:
            found.append(row)
            if self.has_optimizer:
                parts = optimizer_parts(self.dtypes[row.key])
                found += [replace(row, part=part) for part in parts]
        return found

    def dtype(self, row: TensorRow) -> torch.dtype:
        """Of a weight, or of the optimizer's state, which is in fp32."""
        return torch.float32 if row.part else self.dtypes[row.key]

    @property
    def main_dtype(self) -> torch.dtype:
        """The one with the most bytes: what configs call the model's."""
        sizes: dict[torch.dtype, int] = {}
        for row in self.weights:
            dtype = self.dtypes[row.key]
            sizes[dtype] = sizes.get(dtype, 0) + element_count(row.shape) * dtype.itemsize
        return max(sizes, key=lambda dtype: sizes[dtype])


class CheckpointWriter(Protocol):
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

    def write(self, folder: Path, stream: RowStream) -> None:
        """Write everything into an existing, empty folder.

        Args:
            folder: It gets the destination's name afterwards.
            stream: The target's pieces in their order, each with its tensor in its dtype.
        """
        ...


def most_precise_row(reader: CheckpointReader, row: TensorRow, dtype: torch.dtype) -> TensorRow:
    """What to read from a source for a row in a dtype.

    An fp32 weight may be its own main weight, or have one that is more precise than itself.
    """
    is_fp32 = reader.dtype(replace(row, part=None)) == torch.float32
    if row.part == MAIN_WEIGHT and is_fp32:
        return replace(row, part=None)
    if row.part is None and dtype == torch.float32 and reader.has_optimizer and not is_fp32:
        return replace(row, part=MAIN_WEIGHT)
    return row


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
    parameters = sum(element_count(row.shape) for row in target.weights)
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
