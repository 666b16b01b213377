"""The Hugging Face folder: what ``ChameleonForConditionalGeneration.from_pretrained`` opens.

    config.json, generation_config.json, model*.safetensors   transformer and the VQGAN's encoder
    tokenizer and processor files                             for transformers
    text.model, vocabulary.json, image_tokenizer/             our tokenizer, the VQ decoder included
    chameleon.json                                            where it all comes from

Hugging Face's model has no place for the decoder that turns codes into images: it is kept beside.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_chameleon.checkpoint.names import K_NORM, Q_NORM, Dimensions, Piece, pieces
from megatron_chameleon.checkpoint.reader import CheckpointReader
from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.tokenizer.image import IMAGE_CONFIG_FILE, IMAGE_WEIGHTS_FILE
from megatron_chameleon.tokenizer.text import TEXT_MODEL_FILE
from megatron_chameleon.tokenizer.vocabulary import VOCABULARY_FILE, Vocabulary
from megatron_chameleon.tokenizer.vqgan import VqganConfig

EXPORT_FILE = "chameleon.json"
EXPORT_FORMAT = "megatron_chameleon.export/1"
IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
VQ_PREFIX = "model.vqmodel."
SHARD_BYTES = 5 * 10**9


def checked_pieces(reader: CheckpointReader) -> list[Piece]:
    """The pieces of a checkpoint, after every tensor's name and shape was compared with the config.

    Raises:
        CheckpointError: A tensor is missing, left over or of the wrong shape, or HF cannot hold the
            model.
    """
    where, model, vocab_size = str(reader.folder), reader.config.model, reader.state["vocab_size"]
    if Q_NORM not in reader.tensors or K_NORM not in reader.tensors:
        raise CheckpointError(
            where,
            "the model has no QK-norm (model.qk_norm_groups is 0), and Hugging Face's Chameleon "
            "cannot leave it out",
            "Convert a model that was trained with QK-norm",
        )
    q_groups, k_groups = (reader.tensors[name].shape[1] for name in (Q_NORM, K_NORM))
    found = list(pieces(Dimensions.of(model, vocab_size, q_groups, k_groups)))
    known = {piece.megatron_name for piece in found}
    for name in sorted(known - reader.tensors.keys()):
        raise CheckpointError(
            where, f"the tensor {name} is missing", "Use a checkpoint of a whole Chameleon model"
        )
    for name in sorted(reader.tensors.keys() - known):
        raise CheckpointError(
            where,
            f"the tensor {name} {list(reader.tensors[name].shape)} has no place in Hugging Face's "
            "Chameleon",
            "Use a checkpoint of a Chameleon model of this version",
        )
    for piece in found:
        _check_shape(piece, reader, where)
    return found


def _check_shape(piece: Piece, reader: CheckpointReader, where: str) -> None:
    stored = reader.tensors[piece.megatron_name].shape
    layers = () if piece.layer is None else (reader.config.model.num_layers,)
    expected = (*layers, *piece.shape)
    has_rows_to_cut = (
        piece.shape[0] == piece.dimensions.vocab_size
        and piece.layer is None
        and len(stored) == len(expected)
        and stored[0] >= expected[0]
        and stored[1:] == expected[1:]
    )
    if stored != expected and not has_rows_to_cut:
        raise CheckpointError(
            where,
            f"{piece.megatron_name} is {list(stored)}, its config says {list(expected)}",
            "Use a checkpoint whose config.yaml is its own",
        )


def build_config(
    model: ModelConfig, vocabulary: Vocabulary, vqgan: VqganConfig | None, dtype: torch.dtype
) -> Any:
    """HF's ``ChameleonConfig`` for a model of ours.

    Args:
        model: Our config.
        vocabulary: Its names fill HF's ``vocabulary_map``.
        vqgan: The image tokenizer's shape; None leaves HF's default.
        dtype: Of the tensors in the files.
    """
    from transformers import ChameleonConfig

    return ChameleonConfig(
        vocab_size=vocabulary.size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups or model.num_attention_heads,
        max_position_embeddings=model.seq_length,
        initializer_range=model.init_method_std,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
        swin_norm=model.norm_order == "swin",
        bos_token_id=vocabulary.bos,
        pad_token_id=vocabulary.pad,
        eos_token_id=vocabulary.eos,
        tie_word_embeddings=False,
        vocabulary_map=vocabulary_map(vocabulary),
        vq_config=None if vqgan is None else vq_config(vqgan),
        dtype=dtype,
        architectures=["ChameleonForConditionalGeneration"],
    )


def vocabulary_map(vocabulary: Vocabulary) -> dict[str, int]:
    """Token names to ids as HF wants them: the placeholder is called ``<image>``.

    HF takes every name that begins with IMGIMG for an image code, so a learned text piece that does
    is left out.
    """
    codes = set(vocabulary.code_token_ids.tolist())
    names = {
        name: token_id
        for token_id, name in enumerate(vocabulary.tokens)
        if token_id in codes or not name.startswith("IMGIMG")
    }
    del names[vocabulary.tokens[vocabulary.image_placeholder]]
    return {**names, "<image>": vocabulary.image_placeholder}


def vq_config(vqgan: VqganConfig) -> dict[str, Any]:
    """The image tokenizer's shape in HF's words; both sides attend in the mid block only."""
    return {
        "embed_dim": vqgan.embed_dim,
        "num_embeddings": vqgan.codebook_size,
        "latent_channels": vqgan.z_channels,
        "resolution": vqgan.resolution,
        "in_channels": vqgan.in_channels,
        "base_channels": vqgan.base_channels,
        "channel_multiplier": list(vqgan.ch_mult),
        "num_res_blocks": vqgan.num_res_blocks,
        "dropout": vqgan.dropout,
    }


def encoder_tensors(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """The VQGAN's tensors that HF has a place for, under HF's names: all but the decoder's."""
    assert tokenizer.image is not None
    weights = tokenizer.image.model.state_dict()
    return {
        VQ_PREFIX + name: tensor
        for name, tensor in weights.items()
        if not name.startswith("decoder.")
    }


@dataclass
class ShardWriter:
    """Writes tensors into safetensors files as they come, holding one shard in memory.

    Args:
        folder: Where the files go.
        shard_bytes: Largest size of a shard; a single larger tensor gets a file of its own.
    """

    folder: Path
    shard_bytes: int = SHARD_BYTES
    parameters: int = 0
    total_bytes: int = 0
    _shards: list[list[str]] = field(default_factory=list)
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _held_bytes: int = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; writes a shard when the next one would not fit."""
        size_bytes = tensor.numel() * tensor.element_size()
        if self._tensors and self._held_bytes + size_bytes > self.shard_bytes:
            self._write()
        # cloned: a view into a fused tensor would keep, and make safetensors refuse, the whole of
        # it
        self._tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._held_bytes += size_bytes
        self.total_bytes += size_bytes
        self.parameters += tensor.numel()

    def _write(self) -> None:
        path = self.folder / f"shard-{len(self._shards)}"
        save_file(self._tensors, path, {"format": "pt"})
        path.chmod(self.folder.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone
        self._shards.append(list(self._tensors))
        self._tensors, self._held_bytes = {}, 0

    def finish(self) -> None:
        """Write the last shard and the index, and give the files their final names."""
        self._write()
        if len(self._shards) == 1:
            (self.folder / "shard-0").replace(self.folder / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self.folder / f"shard-{index}").replace(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        totals = {"total_parameters": self.parameters, "total_size": self.total_bytes}
        index_json = {"metadata": totals, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1))


@dataclass(frozen=True)
class Written:
    """What ``write_weights`` wrote, and the checksums that ``verify_weights`` compares with."""

    parameters: int
    total_bytes: int
    checksums: dict[str, str]


def write_weights(
    folder: Path,
    found: Iterable[Piece],
    read: Callable[[Piece], torch.Tensor],
    extra: dict[str, torch.Tensor],
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[Piece], None] = lambda piece: None,
) -> Written:
    """Write all tensors of a model.

    Args:
        folder: An existing folder.
        found: The pieces in the order to write.
        read: Gives megatron-core's tensor of a piece, in the dtype to write.
        extra: Further tensors by HF's name.
        shard_bytes: Largest size of a file.
        progress: Called after each piece.
    """
    writer = ShardWriter(folder, shard_bytes)
    checksums = {}
    for piece in found:
        tensor = read(piece)
        checksums[_key(piece)] = checksum(tensor[: piece.shape[0]])
        for name, part in piece.to_hf(tensor).items():
            writer.add(name, part)
        progress(piece)
    for name, tensor in extra.items():
        checksums[name] = checksum(tensor)
        writer.add(name, tensor)
    writer.finish()
    return Written(writer.parameters, writer.total_bytes, checksums)


def verify_weights(
    folder: Path, found: Iterable[Piece], extra: Iterable[str], written: Written
) -> None:
    """Read the files back, turn each tensor into megatron-core's layout and compare checksums.

    Raises:
        CheckpointError: A tensor is missing, left over or differs.
    """
    stored = StoredTensors(folder)
    expected = set(extra)
    for piece in found:
        expected.update(piece.hf_names)
        again = piece.to_megatron({name: stored.read(name) for name in piece.hf_names})
        _compare(folder, _key(piece), checksum(again), written)
    for name in extra:
        _compare(folder, name, checksum(stored.read(name)), written)
    for name in sorted(stored.names() - expected):
        raise CheckpointError(str(folder), f"{name} is left over in the files", "Report this bug")


def _compare(folder: Path, name: str, again: str, written: Written) -> None:
    if again != written.checksums[name]:
        raise CheckpointError(
            str(folder),
            f"{name} differs after writing (sha256 {again[:12]}, was "
            f"{written.checksums[name][:12]})",
            "Convert again, and check the disk if it differs again",
        )


def _key(piece: Piece) -> str:
    return piece.megatron_name if piece.layer is None else f"{piece.megatron_name}[{piece.layer}]"


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


class StoredTensors:
    """The tensors of a folder of safetensors files, with or without an index, read one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._files = dict(json.loads(index.read_text())["weight_map"])
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")

    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self._files:
            raise CheckpointError(
                str(self.folder), f"the tensor {name} is missing", "Convert again"
            )
        with safe_open(self.folder / self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Our tokenizer's files, and the same for transformers."""
    from megatron_chameleon.tokenizer.huggingface import write_huggingface_tokenizer

    write_huggingface_tokenizer(tokenizer, folder)
    for name in (TEXT_MODEL_FILE, VOCABULARY_FILE):
        shutil.copyfile(tokenizer.folder / name, folder / name)
    (folder / IMAGE_TOKENIZER_FOLDER).mkdir()
    for name in (IMAGE_CONFIG_FILE, IMAGE_WEIGHTS_FILE):
        shutil.copyfile(tokenizer.folder / name, folder / IMAGE_TOKENIZER_FOLDER / name)


def read_origin(folder: Path) -> dict[str, Any]:
    """``chameleon.json`` of an exported folder.

    Raises:
        CheckpointError: The file is missing or no whole one of this version.
    """
    file = folder / EXPORT_FILE
    remedy = "Give a folder of `chameleon convert --to hf`, or a checkpoint"
    try:
        origin = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(file), f"cannot be read ({error})", remedy) from error
    found = origin.get("format") if isinstance(origin, dict) else None
    if found != EXPORT_FORMAT:
        raise CheckpointError(
            str(file), f"format is {found!r}, this version reads {EXPORT_FORMAT!r}", remedy
        )
    return origin
