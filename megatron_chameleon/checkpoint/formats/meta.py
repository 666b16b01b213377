"""Meta's format: one ``.pth`` file per model-parallel rank, and two files of settings.

    consolidated.pth, or consolidated.00.pth, .01.pth, ...   the shards
    params.json                                              the model's settings, under "model"
    consolidate_params.json                                  the number of shards
    tokenizer/text_tokenizer.json, vqgan.ckpt, vqgan.yaml    in this folder, or up to two above it
    chameleon.json                                           ours: where it comes from

A shard has one QK-norm weight and bias for all its heads, so a model with n groups of heads fits
into n shards or a multiple of n. Source: loader.py, transformer.py of facebookresearch/chameleon.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron_chameleon.checkpoint.formats.base import (
    RowStream,
    Target,
    TokenizerMissingError,
    check_names,
    one_dtype,
    read_origin,
    read_values,
    with_recorded,
    write_origin,
)
from megatron_chameleon.checkpoint.formats.hf import check_has_images, check_has_vqgan
from megatron_chameleon.checkpoint.formats.hf_config import whole_rotary_base
from megatron_chameleon.checkpoint.formats.meta_tokenizer import (
    META_TEXT_FILE,
    meta_encoder,
    read_meta_tokenizer,
    write_meta_tokenizer,
)
from megatron_chameleon.checkpoint.names.architecture import (
    ARCHITECTURE,
    bounds,
    check_layer_count,
    check_model,
)
from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.norm_groups import norm_groups, norm_settings
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.checkpoint.tensor_files.pth import PthFile, create_pth
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import write_text
from megatron_chameleon.values import Values

PARAMS_FILE, SHARDS_FILE = "params.json", "consolidate_params.json"
TOKENIZER_FOLDER = "tokenizer"
ROPE = "rope.freqs"
"""A tensor that the reference code requires in the files, and ignores."""
LARGEST_SHARDS = 1024
SEQ_LENGTH = 4096
"""Sequence length of the released models, whose files don't say."""
_SHARD = re.compile(r"consolidated(\.(\d+))?\.pth")


def recognise(folder: Path) -> bool:
    """Whether a folder looks like this format."""
    return (folder / PARAMS_FILE).is_file() or any(
        _SHARD.fullmatch(path.name) for path in folder.iterdir()
    )


class Reader:
    """Meta's shards. See ``formats.base.CheckpointReader``."""

    format = "meta"
    image_config = None
    token_ids: Mapping[str, int] = MappingProxyType({})
    has_optimizer = False
    has_main_weights = False
    config = None
    data = None
    skipped_steps: Sequence[int] = ()
    ema_updates = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origin = read_origin(folder)
        self.step, self.fingerprint = self.origin.step, self.origin.fingerprint
        self.conversations = self.origin.conversations
        params = _params(folder)
        self._shards = [PthFile(path) for path in _shard_files(folder)]
        self.weight_files = {shard.path.name for shard in self._shards}
        model, dims = self._geometry(params)
        self._check(dims)
        self.model = with_recorded(model, self.origin, ARCHITECTURE, str(folder))
        q_groups = k_groups = self.model.qk_norm_groups = 0
        if model.qk_norm_groups:
            self.model.qk_norm_groups, q_groups, k_groups = norm_settings(
                self.origin.model.get("qk_norm_groups"),
                q_groups=self._norm_groups(dims, "q"),
                k_groups=self._norm_groups(dims, "k"),
                heads=dims.num_attention_heads,
                key_heads=dims.num_query_groups,
            )
        self.dimensions = Dimensions.of(self.model, dims.vocab_size, q_groups, k_groups)

    @property
    def shard_count(self) -> int:
        return len(self._shards)

    def moments(self, row: TensorRow) -> tuple[str, ...]:
        """None: the format has weights only."""
        return ()

    def dtype(self, row: TensorRow) -> torch.dtype:
        """The dtype of a weight's stored tensors."""
        dtypes = [shard.tensors[meta.name].dtype for meta in row.meta for shard in self._shards]
        return one_dtype(str(self.folder), row.key, dtypes)

    def read(self, row: TensorRow) -> torch.Tensor:
        """Read one tensor in megatron-core's form."""
        tensors = {}
        for name, meta in zip(row.hf_names, row.meta, strict=True):
            parts = [shard.read(meta.name) for shard in self._shards]
            tensors[name] = meta.from_shards(parts, row.dimensions)
        return row.to_megatron(tensors)

    def tokenizer_folder(self, scratch: Path) -> Path:
        """Make our tokenizer's files in ``scratch`` from Meta's.

        Raises:
            TokenizerMissingError: Meta's are neither in the folder nor in the two above it.
            CheckpointError: They are damaged.
        """
        if found := self._meta_tokenizer():
            return read_meta_tokenizer(found, scratch)
        raise TokenizerMissingError(
            str(self.folder / TOKENIZER_FOLDER),
            f"there is no {META_TEXT_FILE}, nor in the two folders above",
            "Give a tokenizer folder, ours or Meta's, with --tokenizer",
        )

    def _meta_tokenizer(self) -> Path | None:
        """Meta's tokenizer folder, if there is one."""
        places = [self.folder, self.folder.parent, self.folder.parent.parent]
        for place in places:  # the released models are in models/7b/, the tokenizer in tokenizer/
            if (place / TOKENIZER_FOLDER / META_TEXT_FILE).is_file():
                return place / TOKENIZER_FOLDER
        return None

    def encoder(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """How to read each tensor of the encoder in ``vqgan.ckpt``."""
        folder = self._meta_tokenizer()
        return meta_encoder(folder) if folder else {}

    def _geometry(self, params: Values) -> tuple[ModelConfig, Dimensions]:
        """The model's settings and sizes, from params.json and the tensors' shapes."""
        first = self._shards[0].tensors
        w1, output = "layers.0.feed_forward.w1.weight", "output.weight"
        for name in (w1, output):
            if name not in first or not first[name].shape:
                raise CheckpointError(
                    str(self._shards[0].path),
                    f"the tensor {name} is missing",
                    "Use a checkpoint of a whole Chameleon model",
                )
        heads = params.whole("n_heads", *bounds("num_attention_heads"))
        has_norms = params.flag("qk_normalization", False)
        theta = params.number("rope_theta", *bounds("rotary_base"), 10000.0)
        model = ModelConfig(
            num_layers=params.whole("n_layers", *bounds("num_layers")),
            hidden_size=params.whole("dim", *bounds("hidden_size")),
            ffn_hidden_size=first[w1].shape[0] * self.shard_count,
            num_attention_heads=heads,
            num_query_groups=params.whole("n_kv_heads", 1, heads, heads),
            seq_length=params.whole("max_seq_len", *bounds("seq_length"), SEQ_LENGTH),
            norm_order="swin" if params.flag("swin_norm", False) else "pre",
            qk_norm_groups=self.shard_count if has_norms else 0,
            layernorm_epsilon=params.number("norm_eps", *bounds("layernorm_epsilon"), 1e-5),
            rotary_base=whole_rotary_base(theta, params.where),
        )
        check_model(model, params.where)
        check_layer_count(params.where, model.num_layers, len(first))
        groups = self.shard_count if has_norms else 0
        vocab_size = first[output].shape[0] * self.shard_count
        stated = params.whole("vocab_size", low=-1, default=vocab_size)
        if stated not in (vocab_size, -1):
            raise params.error(f"vocab_size is {stated}, but the tensors have {vocab_size} tokens")
        return model, Dimensions.of(model, vocab_size, groups, groups)

    def _check(self, dims: Dimensions) -> None:
        check_divides(str(self.folder), dims, self.shard_count)
        expected = {name: shape for name, shape, _ in shard_tensors(dims, self.shard_count)}
        for shard in self._shards:
            found = {name: t.shape for name, t in shard.tensors.items() if name != ROPE}
            check_names(str(shard.path), found, expected)

    def _norm_groups(self, dims: Dimensions, which: str) -> int:
        """The fewest groups of shards whose QK-norms are equal in all layers."""
        names = [
            f"layers.{layer}.attention.{which}_normalization.{part}"
            for layer in range(dims.num_layers)
            for part in ("weight", "bias")
        ]
        return norm_groups(
            torch.stack([shard.read(name) for shard in self._shards]) for name in names
        )


class Writer:
    """Writes Meta's shards. See ``formats.base.CheckpointWriter``."""

    holds: Collection[str] = ()

    def __init__(self, target: Target) -> None:
        check_has_images(target, decoder=True)
        check_has_vqgan(target)
        dims = target.dimensions
        count = target.shards or max(1, dims.q_norm_groups, dims.k_norm_groups)
        check_divides(f"--shards {count}", dims, count)
        for groups in (dims.q_norm_groups, dims.k_norm_groups):
            if groups and count % groups:
                raise CheckpointError(
                    f"--shards {count}",
                    f"the model has {groups} groups of QK-norms, and {count} shards cannot "
                    "hold them, since each holds one",
                    f"Use --shards {groups}, or a multiple of it",
                )
        self._target, self._shard_count = target, count
        self._tensors = {
            name: (shape, target.dtypes[row.key]) for name, shape, row in shard_tensors(dims, count)
        }
        self._tensors[ROPE] = ((dims.head_dim // 2,), target.main_dtype)

    def files(self) -> dict[str, int]:
        """The shards and their sizes, accurate to a few kilobytes."""
        size_bytes = sum(
            element_count(shape) * dtype.itemsize for shape, dtype in self._tensors.values()
        )
        return dict.fromkeys(shard_names(self._shard_count), size_bytes)

    def write(self, folder: Path, stream: RowStream) -> None:
        """Write everything."""
        dims, model = self._target.dimensions, self._target.model
        shards = [
            create_pth(folder / name, self._tensors) for name in shard_names(self._shard_count)
        ]
        turns = torch.arange(0, dims.head_dim, 2, dtype=torch.float64) / dims.head_dim
        freqs = (float(model.rotary_base) ** -turns).to(self._target.main_dtype)
        for shard in shards:
            shard.write(ROPE, freqs)
        for row, tensor in stream:
            for meta, whole in zip(row.meta, row.to_hf(tensor).values(), strict=True):
                parts = meta.to_shards(whole, dims, self._shard_count)
                for shard, part in zip(shards, parts, strict=True):
                    shard.write(meta.name, part)
        _write_json(folder / PARAMS_FILE, {"model": model_params(model, dims)})
        _write_json(folder / SHARDS_FILE, {"model_parallel_size": self._shard_count})
        write_meta_tokenizer(self._target.tokenizer, folder / TOKENIZER_FOLDER)
        write_origin(folder, self._target)


def shard_names(shards: int) -> list[str]:
    """The file names of a model in this many shards."""
    if shards == 1:
        return ["consolidated.pth"]
    return [f"consolidated.{index:02}.pth" for index in range(shards)]


def shard_tensors(dims: Dimensions, shards: int) -> list[tuple[str, tuple[int, ...], TensorRow]]:
    """Every tensor of one shard: its name, its shape, and the row that it belongs to."""
    return [
        (meta.name, meta.shard_shape(whole, dims, shards), row)
        for row in tensor_rows(dims)
        for meta, whole in zip(row.meta, row.hf_shapes.values(), strict=True)
    ]


def check_divides(where: str, dims: Dimensions, shards: int) -> None:
    """Refuse a number of shards into which the model cannot be cut.

    Raises:
        CheckpointError: It names the first size that the number does not divide.
    """
    for name in (
        "num_query_groups",
        "num_attention_heads",
        "hidden_size",
        "ffn_hidden_size",
        "vocab_size",
    ):
        if getattr(dims, name) % shards:
            raise CheckpointError(
                where,
                f"{name} {getattr(dims, name)} is not divisible by {shards} shards",
                f"Use a divisor of {getattr(dims, name)} as the number of shards",
            )


def model_params(model: ModelConfig, dims: Dimensions) -> dict[str, Any]:
    """The model's settings for the reference code's ``params.json``.

    The reference code computes the feed-forward width as 2/3 of 4 dim, times
    ``ffn_dim_multiplier``, rounded up to ``multiple_of``. Both are chosen so that the result is our
    width.
    """
    ffn, base = model.ffn_hidden_size, int(2 * 4 * model.hidden_size / 3)
    multiple_of = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if ffn % size == 0)
    by_default = -(-base // multiple_of) * multiple_of == ffn
    return {
        "dim": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": dims.num_query_groups,
        "vocab_size": dims.vocab_size,
        "ffn_dim_multiplier": None if by_default else (ffn + 0.5) / base,
        "multiple_of": multiple_of,
        "norm_eps": model.layernorm_epsilon,
        "rope_theta": float(model.rotary_base),
        "qk_normalization": dims.q_norm_groups > 0,
        "swin_norm": model.norm_order == "swin",
        "max_seq_len": model.seq_length,
    }


def _params(folder: Path) -> Values:
    """What ``params.json`` says of the model, under ``model`` or at the top level."""
    values = read_values(folder / PARAMS_FILE, "Use the params.json of the checkpoint")
    model = values.section("model", {})
    values.content = {**values.content, **model.content}
    return values


def _shard_files(folder: Path) -> list[Path]:
    """The shards in order; their number must be that of the settings."""
    single = folder / "consolidated.pth"
    files = sorted(
        (path for path in folder.glob("consolidated.*.pth") if _SHARD.fullmatch(path.name)),
        key=lambda path: int(path.name.split(".")[1]),
    )
    if single.is_file():
        if files:
            raise CheckpointError(
                str(folder),
                f"holds consolidated.pth and {files[0].name}",
                "Keep the shards of one model only",
            )
        files = [single]
    expected = len(files)
    if (folder / SHARDS_FILE).is_file():
        settings = read_values(folder / SHARDS_FILE, "Copy it again")
        expected = settings.whole("model_parallel_size", 1, LARGEST_SHARDS, max(expected, 1))
    wanted = shard_names(max(expected, 1))
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            str(folder),
            f"{len(missing)} of {len(wanted)} shards are missing, the first is {missing[0]}",
            "Copy the whole folder",
        )
    if len(files) != len(wanted):
        raise CheckpointError(
            str(folder / SHARDS_FILE),
            f"says {len(wanted)} shards, but there are {len(files)}",
            "Keep the shards of one model only",
        )
    return files


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n", CheckpointError)
