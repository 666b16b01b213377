"""Read the files that DeepSpeed itself writes, parameter by parameter and without DeepSpeed.

A ZeRO checkpoint, as ``engine.save_checkpoint`` writes it:

    latest                                                  the name of the newest step's folder
    global_step8/mp_rank_00_model_states.pt                 the model (ZeRO 0 to 2)
    global_step8/zero_pp_rank_R_mp_rank_00_model_states.pt  its shapes, one file per rank (ZeRO 3)
    global_step8/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt
        flat fp32 weights and moments; in ZeRO 1 and 2 every rank has the fragments that it names,
        in ZeRO 3 an equal part of every parameter

A universal checkpoint, as ``ds_to_universal.py`` writes it:

    latest_universal
    global_step8_universal/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt
    global_step8_universal/zero/optimizer_state.pt
    global_step8_universal/*_model_states.pt                as above

The files are pickles. They are read by ``tensor_files/torch_pickles.py``, and five of DeepSpeed's
classes are allowed, in whose place empty ones are used. Source: deepspeed 0.19.8,
checkpoint/ds_to_universal.py and utils/zero_to_fp32.py.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.checkpoint.names.optimizer_state import MAIN_WEIGHT, MOMENTS
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.checkpoint.tensor_files.torch_pickles import (
    StoredTensor,
    load_without_data,
)
from megatron_chameleon.errors import CheckpointError, first_line
from megatron_chameleon.files import read_bytes
from megatron_chameleon.values import LARGEST_COUNT, Values, describe

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
LARGEST_TAG_BYTES = 4096
ZERO_FOLDER = "zero"
OPTIMIZER_FILE = "optimizer_state.pt"
UNIVERSAL_FILES = {MAIN_WEIGHT: "fp32.pt", **{part: f"{part}.pt" for part in MOMENTS}}
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_REMEDY = "Save it again with DeepSpeed 0.19"


class _StandIn:
    """Used in place of one of DeepSpeed's objects; its attributes come from the file."""

    numel: int
    start: int


class _ZeroStage(int):
    """Used in place of DeepSpeed's enum of ZeRO stages."""


_ALLOWED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _StandIn,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _StandIn,
    "deepspeed.utils.tensor_fragment.fragment_address": _StandIn,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _ZeroStage,
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape": _StandIn,
}


@dataclass(frozen=True)
class Fragment:
    """A range of a stored tensor's elements: ``count`` of them, beginning with ``start``."""

    stored: StoredTensor
    start: int
    count: int


@dataclass
class DeepSpeedFiles:
    """Where each parameter of one checkpoint is in DeepSpeed's files.

    Attributes:
        folder: The step's folder.
        step: Number of the optimizer's updates.
        shapes: The shape of every parameter, by its name in the model that was trained.
        dtypes: The dtype that the model computed with, by the parameter's name.
        fragments: The stored fragments in order, by the parameter's name and the part
            (``MAIN_WEIGHT``, ``MOMENTS``).
    """

    folder: Path
    step: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    fragments: defaultdict[tuple[str, str], list[Fragment]] = field(
        default_factory=lambda: defaultdict(list)
    )

    @property
    def has_optimizer(self) -> bool:
        """Whether any parameter has moments; a parameter without moments was not trained."""
        return any(part in MOMENTS for _, part in self.fragments)

    def read(self, name: str, part: str) -> torch.Tensor:
        """Read a whole parameter or moment in fp32; untrained parameters have moments of zero."""
        fragments = self.fragments.get((name, part), [])
        shape = self.shapes[name]
        if not fragments and part in MOMENTS:
            return torch.zeros(shape)
        parts = [f.stored.read_flat(name, f.start, f.count).float() for f in fragments]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)

    def add(self, name: str, part: str, stored: StoredTensor, start: int, count: int) -> None:
        """Record the next fragment of a parameter.

        Raises:
            CheckpointError: The stored tensor is too short.
        """
        size = stored.elements
        if not 0 <= start <= start + count <= size:
            what = f"{name} is at {start:,} to {start + count:,} of a tensor of {size:,} elements"
            raise CheckpointError(str(stored.path), what, "Copy it again")
        if count:
            self.fragments[name, part].append(Fragment(stored, start, count))

    def check(self) -> None:
        """Check that the fragments make up whole parameters.

        Raises:
            CheckpointError: It names the first parameter that is not whole.
        """
        trained = {name for name, part in self.fragments if part in MOMENTS}
        for name, shape in self.shapes.items():
            for part in (MAIN_WEIGHT, *(MOMENTS if name in trained else ())):
                found = sum(f.count for f in self.fragments.get((name, part), []))
                size = element_count(shape)
                if found != size:
                    what = f"{part} of {name} has {found:,} of {size:,} elements in its files"
                    raise CheckpointError(str(self.folder), what, "Copy the whole folder again")


def find_step_folder(folder: Path) -> Path | None:
    """Find the step's folder that a path means; None if it is not a DeepSpeed checkpoint.

    Raises:
        CheckpointError: ``latest`` names a folder that does not exist.
    """
    if _is_step_folder(folder):
        return folder
    for name in (LATEST, LATEST_UNIVERSAL):
        if (folder / name).is_file():
            content = read_bytes(folder / name, CheckpointError, LARGEST_TAG_BYTES)
            tag = content.decode("utf-8", "replace").strip()
            is_name = Path(tag).name == tag and tag.isprintable()
            if not is_name or not _is_step_folder(folder / tag):
                what = f"names {describe(tag)}, but there is no such step folder beside it"
                raise CheckpointError(str(folder / name), what, "Copy the whole folder again")
            return folder / tag
    return None


def _is_step_folder(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / ZERO_FOLDER).is_dir() or any(folder.glob("*mp_rank_*_states.pt"))
    )


def open_deepspeed_files(folder: Path) -> DeepSpeedFiles:
    """Find all tensors in a step's folder.

    Raises:
        CheckpointError: A file is missing, damaged, malicious or of an unsupported kind.
    """
    for path in folder.glob("layer_*_states.pt"):
        what = f"has {path.name}, a file of a model with pipeline stages or experts"
        raise CheckpointError(str(folder), what, "Save a model without them")
    files = DeepSpeedFiles(folder)
    try:
        if (folder / ZERO_FOLDER).is_dir():
            _read_universal(files)
        else:
            _read_zero(files)
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        what = f"differs from what DeepSpeed 0.19 writes ({reason})"
        raise CheckpointError(str(folder), what, _REMEDY) from error
    files.check()
    return files


def _ranks(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """The files of every data-parallel rank, by rank.

    Raises:
        CheckpointError: There are files of several tensor-parallel ranks.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            if int(match[2]):
                what = f"{path.name} is of a second tensor-parallel rank, which is not supported"
                remedy = "Turn it into a universal checkpoint with DeepSpeed's ds_to_universal.py"
                raise CheckpointError(str(folder), what, remedy)
            found[int(match[1] or 0)] = path
    return found


def _read_zero(files: DeepSpeedFiles) -> None:
    model_files, ranks = _ranks(files.folder, _MODEL), _ranks(files.folder, _OPTIMIZER)
    if 0 not in model_files:
        what = "has no model states of rank 0"
        raise CheckpointError(str(files.folder), what, "Copy the whole folder again")
    model = load_without_data(model_files[0], _ALLOWED)
    files.step = _whole(model_files[0], model["global_steps"])
    _read_module(files, model)
    states = [
        load_without_data(ranks[rank], _ALLOWED)["optimizer_state_dict"] for rank in sorted(ranks)
    ]
    if states:
        stage = int(states[0]["zero_stage"])
        counts = states[0]["partition_count"]
        count = _whole(ranks[0], counts if isinstance(counts, int) else max(counts))
        _check_ranks(files.folder, ranks, count)
        for rank, state in enumerate(states):
            read_rank = _read_rank_of_zero_3 if stage == 3 else _read_rank_of_zero_2
            read_rank(files, ranks[rank], state, model["param_shapes"], rank, len(states))
    _read_untrained(files, model_files)


def _check_ranks(folder: Path, found: Mapping[int, Path], expected: int) -> None:
    missing = next((rank for rank in range(len(found) + 1) if rank not in found), 0)
    if len(found) != expected or missing < expected:
        what = f"has optimizer states of {len(found)} ranks, but {expected:,} ranks wrote them"
        what += f"; that of rank {missing} is missing" if missing < expected else ""
        raise CheckpointError(str(folder), what, "Copy the whole folder again")


def _read_module(files: DeepSpeedFiles, model: Mapping[str, Any]) -> None:
    """Shapes and dtypes of the parameters; under ZeRO 3 their tensors are empty."""
    shapes = [*(model.get("param_shapes") or []), model.get("frozen_param_shapes") or {}]
    known = {name: _shape(shape) for group in shapes for name, shape in group.items()}
    for name, tensor in model["module"].items():
        if isinstance(tensor, StoredTensor) and not name.endswith("_extra_state"):
            files.dtypes[name] = tensor.dtype
            if name in known or tensor.elements:
                files.shapes[name] = known.get(name, tensor.shape)


def _read_untrained(files: DeepSpeedFiles, model_files: Mapping[int, Path]) -> None:
    """Find the weights that no optimizer has, in the model's tensors or ZeRO 3's parts of them."""
    untrained = [name for name in files.shapes if (name, MAIN_WEIGHT) not in files.fragments]
    if not untrained:
        return
    for rank in sorted(model_files):
        model = load_without_data(model_files[rank], _ALLOWED)
        parts = {**model["module"], **(model.get("frozen_param_fragments") or {})}
        for name in untrained:
            size = element_count(files.shapes[name])
            found = sum(f.count for f in files.fragments[name, MAIN_WEIGHT])
            stored = _stored(parts[name], name)
            files.add(name, MAIN_WEIGHT, stored, 0, min(stored.elements, size - found))


def _read_rank_of_zero_2(
    files: DeepSpeedFiles, path: Path, state: Mapping[str, Any], shapes: Any, rank: int, ranks: int
) -> None:
    base = state["base_optimizer_state"]
    if not isinstance(base, Mapping):
        remedy = "Train without elastic_checkpoint, or turn it into a universal checkpoint"
        raise CheckpointError(str(path), "belongs to an elastic checkpoint", remedy)
    weights = state["single_partition_of_fp32_groups"]
    for group, fragments in enumerate(state["param_slice_mappings"]):
        flat = _flat_states(weights[group], base, group)
        files.step = _step_of(path, base, group, files.step)
        for name, place in fragments.items():
            for part, stored in flat.items():
                files.add(name, part, stored, int(place.start), int(place.numel))


def _read_rank_of_zero_3(
    files: DeepSpeedFiles, path: Path, state: Mapping[str, Any], shapes: Any, rank: int, ranks: int
) -> None:
    base = state["optimizer_state_dict"]
    for group, parameters in enumerate(shapes):
        flat = _flat_states(state["fp32_flat_groups"][group], base, group)
        files.step = _step_of(path, base, group, files.step)
        start = 0
        for name, shape in parameters.items():
            size = element_count(_shape(shape))
            padded = math.ceil(size / ranks)
            count = max(0, min(padded, size - rank * padded))
            for part, stored in flat.items():
                files.add(name, part, stored, start, count)
            start += padded


def _flat_states(weights: Any, base: Mapping[str, Any], group: int) -> dict[str, StoredTensor]:
    """A rank's flat tensors of one parameter group; before the first step there are no moments."""
    moments = base["state"].get(group, {})
    flat = {MAIN_WEIGHT: weights, **{part: moments[part] for part in MOMENTS if part in moments}}
    return {part: _stored(tensor, part) for part, tensor in flat.items()}


def _step_of(path: Path, base: Mapping[str, Any], group: int, otherwise: int) -> int:
    """AdamW's number of updates, which is beside the moments or, in some AdamWs, in the group."""
    for place in (base["state"].get(group, {}), *base["param_groups"]):
        if "step" in place:
            return _number(path, place["step"])
    return otherwise


def _number(path: Path, value: Any) -> int:
    if isinstance(value, StoredTensor):
        value = value.check("step").read_flat("step", 0, 1).item()
    return _whole(path, value)


def _whole(path: Path, value: Any) -> int:
    """A number of steps or ranks.

    Raises:
        CheckpointError: It is something else.
    """
    values = Values({"a count in it": value}, str(path), _REMEDY)
    found: int = values.whole("a count in it", high=LARGEST_COUNT)
    return found


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(value)
    if not all(type(size) is int and 0 <= size < 2**40 for size in shape) or len(shape) > 8:
        raise ValueError("a shape has impossible sizes")
    return shape


def _stored(value: Any, name: str) -> StoredTensor:
    if not isinstance(value, StoredTensor):
        raise TypeError(f"{name} is a {type(value).__name__}, not a tensor")
    return value.check(name)


def _read_universal(files: DeepSpeedFiles) -> None:
    model_files = _ranks(files.folder, _MODEL)
    if 0 in model_files:
        model = load_without_data(model_files[0], _ALLOWED)
        files.step = _whole(model_files[0], model["global_steps"])
        _read_module(files, model)
    for name, folder in _parameter_folders(files.folder / ZERO_FOLDER):
        for part, file in UNIVERSAL_FILES.items():
            if not (folder / file).is_file():
                continue
            content = load_without_data(folder / file, _ALLOWED)
            tensor = content["param"] if isinstance(content, Mapping) else content
            stored = _stored(tensor, name)
            if part == MAIN_WEIGHT:
                known = files.shapes.get(name, ())
                is_flat = element_count(known) == stored.elements  # as ZeRO 3 stores it
                files.shapes[name] = known if is_flat else stored.shape
                files.dtypes.setdefault(name, torch.float32)
            files.add(name, part, stored, 0, stored.elements)
        if (folder / "step.pt").is_file():
            step = load_without_data(folder / "step.pt", _ALLOWED)
            files.step = _number(folder / "step.pt", step)
    _read_untrained(files, model_files)


def _parameter_folders(zero: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(zero.iterdir()):
        if path.is_dir():
            if not (path / UNIVERSAL_FILES[MAIN_WEIGHT]).is_file():
                raise CheckpointError(str(path), "has no fp32.pt", "Copy the whole folder again")
            yield path.name, path
