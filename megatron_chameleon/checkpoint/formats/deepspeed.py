"""The format of plain DeepSpeed: ZeRO checkpoints are read, universal ones read and written.

``deepspeed_files.py`` finds the tensors in DeepSpeed's files. Checkpoints of our DeepSpeed engine
are not in this format; they are training checkpoints like any other
(``checkpoint/state/deepspeed_state.py``).

The parameters have the names of the model that was trained: transformers' Chameleon, or ours with
its layers numbered. The model's settings are read from ``config.json`` (transformers) or
``config.yaml`` (ours), in the step's folder or the one above it. What is written:

    latest_universal                                         the name of the step's folder
    global_step8/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt  under transformers' names
    global_step8/zero/optimizer_state.pt
    global_step8/*_model_states.pt                           what DeepSpeed wants beside them
    config.json, tokenizer and processor files               as in the hf format, for transformers
    chameleon.json, config.yaml                              ours: where it comes from

ZeRO's own files load at one stage and with one number of ranks only, a universal checkpoint at any
stage and with any number. It loads with ``"checkpoint": {"load_universal": true}`` in DeepSpeed's
config and ``engine.load_checkpoint(DST, load_lr_scheduler_states=False)``.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from megatron_chameleon.checkpoint.formats.base import (
    ORIGIN_FILE,
    RowStream,
    Target,
    check_names,
    one_dtype,
    read_origin,
    with_recorded,
)
from megatron_chameleon.checkpoint.formats.deepspeed_files import (
    LATEST_UNIVERSAL,
    OPTIMIZER_FILE,
    UNIVERSAL_FILES,
    ZERO_FOLDER,
    DeepSpeedFiles,
    find_step_folder,
    open_deepspeed_files,
)
from megatron_chameleon.checkpoint.formats.hf import (
    VQ_PREFIX,
    build_settings,
    check_has_images,
    check_has_norms,
    check_has_tokenizer,
    encoder_tensors,
    write_settings,
)
from megatron_chameleon.checkpoint.formats.hf_config import (
    CONFIG_FILE,
    KNOWN,
    model_of_config,
    read_config,
)
from megatron_chameleon.checkpoint.names.architecture import check_layer_count, check_model
from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.norm_groups import norm_groups, norm_settings
from megatron_chameleon.checkpoint.names.optimizer_state import MAIN_WEIGHT, MOMENTS
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.config.load import load_recorded_config, save_config
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import write_text
from megatron_chameleon.values import printable

OWN_CONFIG_FILE = "config.yaml"
VERSION = "0.19.8"
"""The DeepSpeed version whose file layout is written; DeepSpeed checks that it knows it."""
PARAMETER_GROUPS = 1024
"""Number of parameter groups that are written, all without values. DeepSpeed skips the parameters
of a group that is missing here, and would take learning rates and the like from groups with
values."""


def recognise(folder: Path) -> bool:
    """Whether a folder looks like this format."""
    return find_step_folder(folder) is not None


class Reader:
    """A ZeRO or universal checkpoint. See ``formats.base.CheckpointReader``."""

    format = "deepspeed"
    image_config = None
    token_ids: Mapping[str, int] = MappingProxyType({})
    ema_updates = 0

    def __init__(self, folder: Path) -> None:
        step_folder = find_step_folder(folder)
        assert step_folder is not None
        self.folder = folder
        self.weight_files = {path.name for path in folder.glob("*.pt")}
        self._files = open_deepspeed_files(step_folder)
        self._places = (step_folder, step_folder.parent)
        self.step = self._files.step
        self.has_optimizer = self.has_main_weights = self._files.has_optimizer
        exported = self._folder_with(ORIGIN_FILE)
        self.origin = read_origin(exported)
        self.fingerprint = self.origin.fingerprint
        self.data, self.skipped_steps = self.origin.data, self.origin.skipped_steps
        self.conversations = self.origin.conversations
        own = self._folder_with(OWN_CONFIG_FILE)
        self.config: Config | None = load_recorded_config(own / OWN_CONFIG_FILE) if own else None
        self._prefix, self._is_hf = _naming(self._files)
        self.model, self.dimensions = self._hf_geometry() if self._is_hf else self._own_geometry()
        expected = {
            name: shape
            for row in tensor_rows(self.dimensions)
            for name, shape in self._shapes(row).items()
        }
        found = {n: s for n, s in self._files.shapes.items() if VQ_PREFIX not in n}
        check_names(str(folder), found, expected)
        if self._is_hf:
            self._find_norm_groups()

    def moments(self, row: TensorRow) -> tuple[str, ...]:
        """AdamW's."""
        return MOMENTS

    def dtype(self, row: TensorRow) -> torch.dtype:
        """The dtype that the model computed with."""
        dtypes = [self._files.dtypes[name] for name in self._names(row)]
        return one_dtype(str(self.folder), row.key, dtypes)

    def read(self, row: TensorRow) -> torch.Tensor:
        """Read one tensor in megatron-core's form; a weight is cast from its main weight."""
        part = row.part or MAIN_WEIGHT
        tensors = [self._files.read(name, part) for name in self._names(row)]
        named = dict(zip(row.hf_names, tensors, strict=True)) if self._is_hf else {}
        tensor = row.to_megatron(named) if self._is_hf else tensors[0]
        return tensor if row.part else tensor.to(self.dtype(row))

    def tokenizer_folder(self, scratch: Path) -> Path:
        """The folder with our tokenizer's files, or the one that the config names.

        Raises:
            TokenizerMissingError: Neither exists.
        """
        exported = self._folder_with(ORIGIN_FILE)
        if exported is None and self.config and Path(self.config.tokenizer.path).is_dir():
            return Path(self.config.tokenizer.path)
        check_has_tokenizer(exported or self._places[1])
        return exported or self._places[1]

    def encoder(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """Nothing: weight decay shrinks an encoder that DeepSpeed's optimizer holds."""
        return {}

    def _folder_with(self, name: str) -> Path | None:
        """The folder that has a file: the step's, the one above it, or None."""
        return next((place for place in self._places if (place / name).is_file()), None)

    def _names(self, row: TensorRow) -> list[str]:
        """The names of the parameters that a row consists of."""
        if self._is_hf:
            return [self._prefix + name for name in row.hf_names]
        layer = f"decoder.layers.{row.layer}."
        return [self._prefix + row.megatron_name.replace("decoder.layers.", layer)]

    def _shapes(self, row: TensorRow) -> dict[str, tuple[int, ...]]:
        shapes = row.hf_shapes.values() if self._is_hf else [row.shape]
        return dict(zip(self._names(row), shapes, strict=True))

    def _hf_geometry(self) -> tuple[ModelConfig, Dimensions]:
        """Settings and sizes from ``config.json``, with one QK-norm per head as in transformers."""
        place = self._folder_with(CONFIG_FILE)
        if place is None:
            self._raise_missing(
                CONFIG_FILE, "transformers' config.save_pretrained(FOLDER) writes it"
            )
        model, vocab_size = model_of_config(read_config(place))
        where = str(place / CONFIG_FILE)
        check_layer_count(where, model.num_layers, len(self._files.shapes))
        heads, key_heads = model.num_attention_heads, model.num_query_groups or 0
        model = with_recorded(model, self.origin, KNOWN, where)
        return model, Dimensions.of(model, vocab_size, heads, key_heads)

    def _own_geometry(self) -> tuple[ModelConfig, Dimensions]:
        """Settings and sizes from our ``config.yaml`` and the tensors' shapes."""
        if self.config is None:
            self._raise_missing(OWN_CONFIG_FILE, "it is in the run folder")
        model, shapes = self.config.model, self._files.shapes
        attention = f"{self._prefix}decoder.layers.0.self_attention."
        q_groups, k_groups = (
            (*shapes.get(f"{attention}{which}_layernorm.weight", ()), 0)[0] for which in "qk"
        )
        key_heads = model.num_query_groups or model.num_attention_heads
        model = replace(model, num_query_groups=key_heads, qk_norm_groups=q_groups)
        where = str(self.folder)
        check_model(model, where)
        check_layer_count(where, model.num_layers, len(shapes))
        vocab_size = (*shapes[f"{self._prefix}output_layer.weight"], 0)[0]
        return model, Dimensions.of(model, vocab_size, q_groups, k_groups)

    def _raise_missing(self, name: str, hint: str) -> NoReturn:
        what = f"without a {name} here or in {self._places[0]} the model's settings are unknown"
        raise CheckpointError(str(self._places[1]), what, f"Put the file there ({hint})")

    def _find_norm_groups(self) -> None:
        """Set the fewest groups of heads whose QK-norms, and their moments, are equal."""
        dims, parts = self.dimensions, (MAIN_WEIGHT, *(MOMENTS if self.has_optimizer else ()))

        def groups(which: str) -> int:
            return norm_groups(
                self._files.read(f"{self._prefix}model.layers.{i}.self_attn.{which}_norm.{p}", part)
                for i in range(dims.num_layers)
                for p in ("weight", "bias")
                for part in parts
            )

        self.model.qk_norm_groups, q_groups, k_groups = norm_settings(
            self.origin.model.get("qk_norm_groups"),
            q_groups=groups("q"),
            k_groups=groups("k"),
            heads=dims.num_attention_heads,
            key_heads=dims.num_query_groups,
        )
        self.dimensions = replace(dims, q_norm_groups=q_groups, k_norm_groups=k_groups)


def _naming(files: DeepSpeedFiles) -> tuple[str, bool]:
    """The prefix of the parameters' names, as wrappers add it, and whether the names are HF's.

    Raises:
        CheckpointError: The parameters are those of another model.
    """
    for name, is_hf in (("lm_head.weight", True), ("output_layer.weight", False)):
        for found in files.shapes:
            if found == name or found.endswith("." + name):
                return found.removesuffix(name), is_hf
    first = printable(next(iter(files.shapes), "none"))
    raise CheckpointError(
        str(files.folder),
        "has no parameter lm_head.weight (transformers) or output_layer.weight (ours); its first "
        f"parameter is {first}",
        "Use a checkpoint of a whole Chameleon model",
    )


class Writer:
    """Writes a universal checkpoint. See ``formats.base.CheckpointWriter``."""

    holds: Collection[str] = (MAIN_WEIGHT, *MOMENTS)

    def __init__(self, target: Target) -> None:
        check_has_norms(target)
        check_has_images(target, decoder=False)
        self._target, self._settings = target, build_settings(target)
        self._folder = f"global_step{target.step}"
        self._encoder = encoder_tensors(target.tokenizer)
        self._parts = (MAIN_WEIGHT, *(MOMENTS if target.has_optimizer else ()))

    def files(self) -> dict[str, int]:
        """Patterns of files with tensors and their total sizes, to a few kilobytes per tensor."""
        sizes = [element_count(row.shape) for row in self._target.weights]
        size_bytes = 4 * (sum(sizes) + sum(t.numel() for t in self._encoder.values()))
        names = (UNIVERSAL_FILES[part] for part in self._parts)
        return {f"{self._folder}/{ZERO_FOLDER}/*/{name}": size_bytes for name in names}

    def write(self, folder: Path, stream: RowStream) -> None:
        """Write everything."""
        target, step_folder = self._target, folder / self._folder
        zero = step_folder / ZERO_FOLDER
        zero.mkdir(parents=True)
        dtypes: dict[str, torch.dtype] = {}
        for row, tensor in stream:
            if row.part is None:
                dtypes |= dict.fromkeys(row.hf_names, tensor.dtype)
                if target.has_optimizer and tensor.dtype != torch.float32:
                    continue  # its main weight follows
            for name, hf_tensor in row.to_hf(tensor).items():
                self._write_part(zero / name, row.part or MAIN_WEIGHT, hf_tensor)
        for name, tensor in self._encoder.items():
            dtypes[name] = target.main_dtype
            self._write_part(zero / name, MAIN_WEIGHT, tensor)
            for part in self._parts[1:]:
                self._write_part(zero / name, part, torch.zeros_like(tensor))
        self._write_global(step_folder, dtypes)
        write_text(folder / LATEST_UNIVERSAL, self._folder, CheckpointError)
        write_settings(folder, target, self._settings)
        if target.config is not None:
            save_config(replace(target.config, model=target.model), folder / OWN_CONFIG_FILE)

    def _write_part(self, folder: Path, part: str, tensor: torch.Tensor) -> None:
        folder.mkdir(exist_ok=True)
        # a small view is copied, because torch.save writes the whole tensor that it is a view of
        whole = tensor.float().contiguous()
        whole = whole.clone() if whole.numel() < whole.untyped_storage().nbytes() // 4 else whole
        torch.save({"param": whole}, folder / UNIVERSAL_FILES[part])
        if part in MOMENTS:
            torch.save(torch.tensor(float(self._target.step)), folder / "step.pt")

    def _write_global(self, step_folder: Path, dtypes: Mapping[str, torch.dtype]) -> None:
        """Write what is not of a single parameter, in the form that each ZeRO stage expects."""
        groups: list[dict[str, Any]] = [{} for _ in range(PARAMETER_GROUPS)]
        step = torch.tensor(float(self._target.step))
        state = {
            "ds_version": VERSION,
            "param_groups": groups,
            "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
        }
        torch.save(state, step_folder / ZERO_FOLDER / OPTIMIZER_FILE)
        model = {
            "module": {name: torch.empty(0, dtype=dtype) for name, dtype in dtypes.items()},
            "buffer_names": [],
            "global_steps": self._target.step,
            "skipped_steps": 0,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "lr_scheduler": None,
            "ds_version": VERSION,
        }
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            torch.save(model, step_folder / name)
