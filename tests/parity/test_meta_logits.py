"""After conversion, transformers and megatron-core compute what Meta's shards compute.

The formulas below are those of the reference code (transformer.py of facebookresearch/chameleon),
in float64 and shard by shard: RoPE on neighbouring pairs, one QK-norm per shard, and partial sums
that are added over the shards.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.loading.transformers_model import load_transformers, logits
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from meta_files import HEAD_DIM, HEADS, KEY_HEADS, LAYERS, MetaModel, random_shards, write_meta

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
"""fp32 compared with float64; the logits are of order 1."""
FAMILIES = {
    "7b": MetaModel(shards=1, norm_groups=1, swin=False),
    "30b": MetaModel(shards=4, norm_groups=4, swin=True),
}
EPS = 1e-5


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def rotate_pairs(x_TND: Tensor) -> Tensor:
    """RoPE on pairs: dims 2i, 2i + 1 are a complex number rotated by position / 10000^(2i/D)."""
    angles = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    turns = torch.outer(torch.arange(len(x_TND), dtype=torch.float64), angles)
    planes = torch.view_as_complex(x_TND.unflatten(-1, (-1, 2)).contiguous())
    turned = planes * torch.polar(torch.ones_like(turns), turns)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def attention_of_shard(x: Tensor, w: dict[str, Tensor], shards: int) -> Tensor:
    """The partial sum of the attention's output that this shard computes."""
    heads, key_heads = HEADS // shards, KEY_HEADS // shards
    q, k, v = (
        (x @ w[f"attention.w{which}.weight"].T).unflatten(-1, (count, HEAD_DIM))
        for which, count in (("q", heads), ("k", key_heads), ("v", key_heads))
    )
    q, k = (
        functional.layer_norm(
            t,
            (HEAD_DIM,),
            w[f"attention.{which}_normalization.weight"],
            w[f"attention.{which}_normalization.bias"],
        )
        for which, t in (("q", q), ("k", k))
    )
    q, k = rotate_pairs(q), rotate_pairs(k)
    k, v = (t.repeat_interleave(heads // key_heads, dim=1) for t in (k, v))
    scores = torch.einsum("snd,tnd->nst", q, k) / math.sqrt(HEAD_DIM)
    scores += torch.full_like(scores, -torch.inf).triu(1)
    mixed = torch.einsum("nst,tnd->snd", scores.softmax(-1), v).flatten(1)
    return mixed @ w["attention.wo.weight"].T


def feed_forward_of_shard(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    gate = functional.silu(x @ w["feed_forward.w1.weight"].T)
    return (gate * (x @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T


def reference_logits(shards: list[dict[str, Tensor]], swin: bool, token_ids: Tensor) -> Tensor:
    """Logits [T, vocabulary] of one sequence, in float64."""
    shards = [{name: t.double() for name, t in shard.items()} for shard in shards]
    x = torch.cat([shard["tok_embeddings.weight"][token_ids] for shard in shards], dim=-1)
    for layer in range(LAYERS):
        prefix = f"layers.{layer}."
        ws = [{n.removeprefix(prefix): t for n, t in s.items() if prefix in n} for s in shards]

        def attention(x: Tensor, ws: list = ws) -> Tensor:
            return sum(attention_of_shard(x, w, len(ws)) for w in ws)

        def feed_forward(x: Tensor, ws: list = ws) -> Tensor:
            return sum(feed_forward_of_shard(x, w) for w in ws)

        for branch, norm in ((attention, "attention_norm"), (feed_forward, "ffn_norm")):
            weight = ws[0][f"{norm}.weight"]
            x = x + (rms_norm(branch(x), weight) if swin else branch(rms_norm(x, weight)))
    x = rms_norm(x, shards[0]["norm.weight"])
    return torch.cat([x @ shard["output.weight"].T for shard in shards], dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_models_compute_the_reference_formulas(
    tmp_path: Path, tiny_tokenizer: Path, family: str
) -> None:
    model = FAMILIES[family]
    shards = random_shards(model)
    source = write_meta(tmp_path / "models" / family, model, shards, tiny_tokenizer)
    token_ids = torch.randint(320, (2, 32), generator=torch.Generator().manual_seed(3))
    expected = torch.stack([reference_logits(shards, model.swin, row) for row in token_ids])
    assert expected.std() > 0.5, "logits near 0 would prove nothing"

    convert(source, tmp_path / "hf", "hf")
    found = logits(load_transformers(tmp_path / "hf"), token_ids)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)

    convert(source, tmp_path / "megatron", "megatron")
    found = megatron_logits(tmp_path / "megatron", token_ids)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


def megatron_logits(checkpoint: Path, token_ids: Tensor) -> Tensor:
    """Logits of megatron-core's model, loaded with its own ``dist_checkpointing.load``."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_chameleon.model.chameleon import build_model
    from megatron_chameleon.parallel.megatron_setup import prepare_megatron
    from megatron_chameleon.parallel.topology import create_topology

    prepare_megatron()
    config = TrainingCheckpoint(checkpoint).config
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        topology = create_topology(config.parallel)
        (model,) = build_model(config, 320, topology)
        model.eval()
        state = dist_checkpointing.load(model.sharded_state_dict(), str(checkpoint))
        model.load_state_dict(state)
        positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)
        with torch.no_grad():
            return model(token_ids, positions, attention_mask=None)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
