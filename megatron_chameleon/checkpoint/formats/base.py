"""What every format has: a ``CheckpointReader`` and a ``CheckpointWriter``.

A format is a module of this folder with ``recognise(folder)``, a ``Reader`` class and a ``Writer``
class; ``formats.FORMATS`` lists the modules, and ``convert/run.py`` joins any reader to any writer.
Rows of the table of tensor names (``checkpoint/names``) go from one to the other, one at a time, as
tensors in megatron-core's form.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_chameleon.checkpoint.names.architecture import check_model
from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.optimizer_state import (
    AVERAGE,
    MAIN_WEIGHT,
    MOMENTS,
    optimizer_parts,
)
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import read_json_object, write_text
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.tokenizer.image.shape import VqganConfig
from megatron_chameleon.values import LARGEST_COUNT, Values, printable
from megatron_chameleon.wording import shown

ORIGIN_FILE = "chameleon.json"
ORIGIN_FORMAT = "megatron_chameleon.export/1"
LARGEST_JSON_BYTES = 16 << 20
"""A config.json with the names of 65,536 tokens has 2 MB."""
SHARD_BYTES = 5 * 10**9
"""Default largest size of a file."""

RowStream = Iterator[tuple[TensorRow, torch.Tensor]]


class CheckpointReader(Protocol):
    """An opened checkpoint of one format.

    Attributes:
        format: The format's name, as ``--to`` takes it.
        folder: The checkpoint's folder.
        model: The model's settings as the files state them; settings that are not in the files have
            their default values.
        dimensions: The model's sizes, with the QK-norm groups that the tensors have.
        step: Updates that the model has seen; 0 if the files don't say.
        fingerprint: Fingerprint of the tokenizer it was trained with; None if the files don't say.
        has_optimizer: Whether AdamW's moments can be read too.
        has_main_weights: Whether weights that are not fp32 can be read in fp32 too, more precisely
            than they are in their own dtype.
        config: The training config; None if the files don't say.
        data: What the run has read, as stored in ``state.json``; None if the files don't say.
        skipped_steps: Steps of the run that made no update, as stored in ``state.json``; empty if
            the files don't say.
        conversations: Whether the model was trained on conversations; None if the files don't say.
        ema_updates: Number of weights in the moving average of the weights that is stored beside
            them; 0: there is none.
        weight_files: Names of the files in the folder whose tensors are read.
        image_config: The shape of the image encoder that came with the checkpoint; None if the
            files don't say.
        token_ids: Ids by the names of tokens; empty if the files don't say.

    Raises (on opening):
        CheckpointError: A tensor is missing, unexpected or of the wrong shape, a file is damaged,
            or the checkpoint is of another architecture.
    """

    format: str
    folder: Path
    model: ModelConfig
    dimensions: Dimensions
    step: int
    fingerprint: str | None
    has_optimizer: bool
    has_main_weights: bool
    config: Config | None
    data: dict[str, Any] | None
    skipped_steps: Sequence[int]
    conversations: bool | None
    ema_updates: int
    weight_files: Collection[str]
    image_config: VqganConfig | None
    token_ids: Mapping[str, int]

    def dtype(self, row: TensorRow) -> torch.dtype:
        """The dtype of a stored weight."""
        ...

    def moments(self, row: TensorRow) -> tuple[str, ...]:
        """The parts of a weight's optimizer state besides its main weight, if ``has_optimizer``."""
        ...

    def read(self, row: TensorRow) -> torch.Tensor:
        """Read one tensor in megatron-core's form, without padding rows of the vocabulary.

        Args:
            row: A weight, its main weight if ``has_main_weights``, or another part of the
                optimizer's state if ``has_optimizer``.
        """
        ...

    def tokenizer_folder(self, scratch: Path) -> Path:
        """A folder for ``load_tokenizer``.

        Args:
            scratch: A folder that may be created and filled, if the tokenizer's files have to be
                put together.

        Raises:
            TokenizerMissingError: The checkpoint has no whole tokenizer, and names none.
        """
        ...

    def encoder(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """How to read each tensor of the image encoder that came with the checkpoint.

        Returns:
            Functions by the names of ``Vqgan``; empty if the checkpoint has no encoder.
        """
        ...


@dataclass(frozen=True)
class Target:
    """What a writer has to write.

    Attributes:
        model: The model's settings.
        dimensions: The model's sizes.
        dtypes: The dtype of each weight, by its row's key.
        step: Updates that the model has seen.
        tokenizer: The tokenizer, with its image tokenizer.
        origin: The checkpoint that it comes from, for people to read.
        shards: Number of files, for a format whose readers depend on it; None: its default.
        shard_bytes: Largest size of a file, for the other formats.
        has_optimizer: Whether main weights and moments come with the weights.
        config: The training config; None if the source doesn't say.
        data: What the run has read; None if the source doesn't say.
        skipped_steps: Steps of the run that made no update.
        conversations: Whether the model was trained on conversations; None if the source doesn't
            say.
        moments: The parts of each weight's optimizer state besides its main weight, by its row's
            key; ``MOMENTS`` for a weight that is not in it.
        ema_updates: Number of weights in the moving average, if that is one of the parts.
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
    conversations: bool | None = None
    moments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ema_updates: int = 0

    @property
    def keeps_average(self) -> bool:
        """Whether the moving average of the weights comes along."""
        return self.has_optimizer and any(AVERAGE in parts for parts in self.moments.values())

    @property
    def weights(self) -> list[TensorRow]:
        """The rows of the weights."""
        return list(tensor_rows(self.dimensions))

    @property
    def rows(self) -> list[TensorRow]:
        """The rows of the weights, each followed by those of its optimizer state, if any."""
        found = []
        for row in self.weights:
            found.append(row)
            if self.has_optimizer:
                moments = self.moments.get(row.key, MOMENTS)
                parts = optimizer_parts(self.dtypes[row.key], moments)
                found += [replace(row, part=part) for part in parts]
        return found

    def dtype(self, row: TensorRow) -> torch.dtype:
        """The dtype of a weight, or of optimizer state, which is always fp32."""
        return torch.float32 if row.part else self.dtypes[row.key]

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype with the most bytes, which configs call the model's dtype."""
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
        holds: The parts of optimizer state that the format can store. The target never has others.

    Raises:
        CheckpointError: The format cannot store the target.
    """

    holds: Collection[str]

    def __init__(self, target: Target) -> None: ...

    def files(self) -> dict[str, int]:
        """The files that hold the transformer's tensors, and their sizes in bytes."""
        ...

    def write(self, folder: Path, stream: RowStream) -> None:
        """Write everything into an existing, empty folder.

        Args:
            folder: The folder; it is renamed to the destination afterwards.
            stream: The target's rows in their order, each with its tensor in its dtype.
        """
        ...


class TokenizerMissingError(CheckpointError):
    """A checkpoint without a tokenizer: there is nothing to refuse, but one must be given."""


def most_precise_row(reader: CheckpointReader, row: TensorRow, dtype: torch.dtype) -> TensorRow:
    """The row to read for the most precise value of a row in a dtype.

    An fp32 weight is its own main weight, and another weight that is wanted in fp32 may have a main
    weight, which is more precise than the weight itself.
    """
    is_fp32 = reader.dtype(replace(row, part=None)) == torch.float32
    if row.part == MAIN_WEIGHT and is_fp32:
        return replace(row, part=None)
    if row.part is None and dtype == torch.float32 and reader.has_main_weights and not is_fp32:
        return replace(row, part=MAIN_WEIGHT)
    return row


def one_dtype(where: str, name: str, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The common dtype of several tensors that other formats store as one.

    Raises:
        CheckpointError: The tensors have different dtypes.
    """
    found = set(dtypes)
    if len(found) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise CheckpointError(where, f"the parts of {name} are {names}", "Cast them to one dtype")
    return dtypes[0]


def check_names(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare the tensors of a checkpoint with those that its config asks for.

    Args:
        where: The folder or file that an error names.
        found: The shapes in the files, by name.
        expected: The shapes that the config asks for, by name.

    Raises:
        CheckpointError: It names the first tensor that is missing, unexpected or of another shape.
    """
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(
            where, f"the tensor {name} is missing", "Use a checkpoint of a whole Chameleon model"
        )
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            where,
            f"the tensor {printable(name)} {list(found[name])} has no place in a Chameleon model",
            "Use a checkpoint of a Chameleon model",
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                where,
                f"{name} is {list(found[name])}, its config says {list(shape)}",
                "Use the config that belongs to the checkpoint",
            )


def write_origin(folder: Path, target: Target) -> None:
    """Write ``chameleon.json``: the origin, and what the format itself cannot store."""
    parameters = sum(element_count(row.shape) for row in target.weights)
    content = {
        "format": ORIGIN_FORMAT,
        "source": target.origin,
        "step": target.step,
        "vocab_size": target.dimensions.vocab_size,
        "tokenizer_fingerprint": target.tokenizer.fingerprint,
        "parameters": parameters,
        "trained_on_conversations": target.conversations,
        # What a run trained says nothing of the model.
        "model": asdict(replace(target.model, train=[], freeze=[])),
    }
    if target.has_optimizer:
        content["data"] = target.data
        content["skipped_steps"] = list(target.skipped_steps)
    write_text(folder / ORIGIN_FILE, json.dumps(content, indent=1) + "\n", CheckpointError)


@dataclass(frozen=True)
class Origin:
    """What ``chameleon.json`` says; all of it is missing where there is no such file.

    Attributes:
        step: Updates that the model has seen.
        fingerprint: The tokenizer's fingerprint.
        model: The model's settings by name.
        data: What the run has read.
        skipped_steps: Steps of the run that made no update.
        conversations: Whether the model was trained on conversations; None if it is not known. A
            folder without the file is Meta's or made from it, and those models were.
    """

    step: int = 0
    fingerprint: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    skipped_steps: Sequence[int] = ()
    conversations: bool | None = None


def read_origin(folder: Path | None) -> Origin:
    """Read ``chameleon.json`` of a folder, if there is one.

    Raises:
        CheckpointError: The file is damaged, of another version, or has a value of another type or
            range.
    """
    if folder is None:
        return Origin()
    if not (folder / ORIGIN_FILE).exists():
        return Origin(conversations=True)
    remedy = "Copy the file from the original, or remove it"
    values = read_values(folder / ORIGIN_FILE, remedy)
    if (found := values.text("format")) != ORIGIN_FORMAT:
        raise values.error(f"format is {shown(found)}, this version reads {ORIGIN_FORMAT!r}")
    model = values.section("model", {})
    recorded = {f.name: model.content[f.name] for f in fields(ModelConfig) if f.name in model}
    data = values.section("data", {}).content if values.content.get("data") is not None else None
    return Origin(
        step=values.whole("step", high=LARGEST_COUNT, default=0),
        fingerprint=values.text("tokenizer_fingerprint", None),
        model=recorded,
        data=None if data is None else dict(data),
        skipped_steps=values.wholes("skipped_steps", high=LARGEST_COUNT),
        conversations=values.flag("trained_on_conversations", None),
    )


def read_values(file: Path, remedy: str) -> Values:
    """Read a small JSON file whose top level is an object.

    Raises:
        CheckpointError: The file is missing, too large or not a JSON object.
    """
    try:
        content = read_json_object(file, CheckpointError, LARGEST_JSON_BYTES)
    except CheckpointError as error:
        raise CheckpointError(error.where, error.what, remedy) from error
    return Values(content, str(file), remedy)


def with_recorded(
    model: ModelConfig, origin: Origin, known: Collection[str], where: str
) -> ModelConfig:
    """Complete a model's settings with those that only ``chameleon.json`` has.

    Args:
        model: The settings in the format's own files.
        origin: What ``chameleon.json`` says.
        known: The fields that the format's own files have; they are left as they are.
        where: The folder that errors name.

    Raises:
        CheckpointError: A setting is out of its bounds.
    """
    values = asdict(model)
    for name, value in origin.model.items():
        if name not in known and isinstance(value, type(values[name])):
            values[name] = value
    completed = ModelConfig(**values)
    check_model(completed, where)
    return completed
