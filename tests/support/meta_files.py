"""Random checkpoints in Meta's format, with every name spelled out here and saved by torch."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_chameleon.checkpoint.formats.meta_tokenizer import write_meta_tokenizer
from megatron_chameleon.tokenizer.folder import load_tokenizer

LAYERS, HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, FFN, VOCABULARY = 2, 64, 8, 4, 8, 48, 320


@dataclass(frozen=True)
class MetaModel:
    """Settings that tests vary; shards are cut into ``norm_groups`` groups that share a QK-norm."""

    shards: int = 4
    norm_groups: int = 4
    swin: bool = False
    dtype: torch.dtype = torch.float32


def shard_shapes(model: MetaModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one shard's tensors, without the QK-norms."""
    n = model.shards
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (VOCABULARY, HIDDEN // n),
        "norm.weight": (HIDDEN,),
        "output.weight": (VOCABULARY // n, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"layers.{layer}."
        shapes |= {
            prefix + "attention.wq.weight": (HEADS * HEAD_DIM // n, HIDDEN),
            prefix + "attention.wk.weight": (KEY_HEADS * HEAD_DIM // n, HIDDEN),
            prefix + "attention.wv.weight": (KEY_HEADS * HEAD_DIM // n, HIDDEN),
            prefix + "attention.wo.weight": (HIDDEN, HEADS * HEAD_DIM // n),
            prefix + "feed_forward.w1.weight": (FFN // n, HIDDEN),
            prefix + "feed_forward.w2.weight": (HIDDEN, FFN // n),
            prefix + "feed_forward.w3.weight": (FFN // n, HIDDEN),
            prefix + "attention_norm.weight": (HIDDEN,),
            prefix + "ffn_norm.weight": (HIDDEN,),
        }
    return shapes


def random_shards(model: MetaModel, seed: int = 1) -> list[dict[str, Tensor]]:
    """The tensors of every shard, with norms far from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)

    def norm(size: int, name: str) -> Tensor:
        noise = 0.3 * torch.randn(size, generator=generator)
        return (noise + (0.0 if name.endswith("bias") else 1.0)).to(model.dtype)

    shards: list[dict[str, Tensor]] = [{} for _ in range(model.shards)]
    for name, shape in shard_shapes(model).items():
        if "norm" in name:
            same = norm(shape[0], name)
            for shard in shards:
                shard[name] = same
            continue
        for shard in shards:
            noise = torch.randn(shape, generator=generator)
            shard[name] = (noise * HIDDEN**-0.5).to(model.dtype)
    for layer in range(LAYERS):
        for which in "qk":
            for part in ("weight", "bias"):
                name = f"layers.{layer}.attention.{which}_normalization.{part}"
                rows = [norm(HEAD_DIM, name) for _ in range(model.norm_groups)]
                for index, shard in enumerate(shards):
                    shard[name] = rows[index * model.norm_groups // model.shards]
    for shard in shards:
        shard["rope.freqs"] = torch.ones(HEAD_DIM // 2)
    return shards


def write_meta(
    folder: Path, model: MetaModel, shards: list[dict[str, Tensor]], tokenizer_folder: Path | None
) -> Path:
    """Write a folder as released: without files of ours, and with the tokenizer two folders up."""
    folder.mkdir(parents=True)
    for index, shard in enumerate(shards):
        name = "consolidated.pth" if len(shards) == 1 else f"consolidated.{index:02}.pth"
        torch.save(shard, folder / name)
    params = {
        "dim": HIDDEN,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": KEY_HEADS,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "qk_normalization": True,
        "swin_norm": model.swin,
    }
    (folder / "params.json").write_text(json.dumps({"model": params, "seed": 1}))
    settings = {"model_parallel_size": len(shards)}
    (folder / "consolidate_params.json").write_text(json.dumps(settings))
    if tokenizer_folder is not None:
        tokenizer = folder.parent.parent / "tokenizer"
        write_meta_tokenizer(load_tokenizer(tokenizer_folder), tokenizer)
        for name in ("text.model", "vocabulary.json", "image.json"):
            (tokenizer / name).unlink()
    return folder


def load_shards(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors that torch finds in each shard of a folder, in order."""
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]


def same_shards(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    """Whether all tensors are equal bit for bit, except ``rope.freqs``, which is recomputed."""
    if [shard.keys() for shard in first] != [shard.keys() for shard in second]:
        return False
    return all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name])
        for a, b in zip(first, second, strict=True)
        for name in a
        if name != "rope.freqs"
    )
