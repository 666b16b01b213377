"""For an exported model, transformers, the paper's formulas and megatron-core agree.

There are three ways from the same checkpoint to logits: transformers on the exported folder; the
formulas below, written from the paper's description, in float64 and directly from megatron-core's
tensors; and megatron-core's own model. If they agree, the names, the fused layouts, the norm order,
QK-norm, RoPE and the head order are right.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.config.schema import Config, ModelConfig
from tiny_model import (
    PADDED_VOCAB_SIZE,
    VOCAB_SIZE,
    exported_logits,
    model_config,
    random_tensors,
    random_token_ids,
    write_checkpoint,
)

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
"""fp32: differences up to 6e-6 from float64 and 1.2e-6 from megatron-core, on logits up to 4."""

LAYOUTS = [("pre", 2), ("pre", None), ("swin", 2), ("swin", 1)]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def head_norm(x_TND: Tensor, weight_GD: Tensor, bias_GD: Tensor) -> Tensor:
    """LayerNorm over D. Neighbouring heads share a row of weight and bias."""
    share = x_TND.shape[1] // weight_GD.shape[0]
    centred = x_TND - x_TND.mean(-1, keepdim=True)
    normal = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
    rows = torch.arange(x_TND.shape[1]) // share
    return normal * weight_GD[rows] + bias_GD[rows]


def rotate(x_TND: Tensor, base: float) -> Tensor:
    """RoPE on halves: dims i and i + D/2 rotate together by position / base^(2i/D)."""
    tokens, _, dim = x_TND.shape
    turns = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.tensor(
        [base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64
    )
    cos, sin = turns.cos()[:, None], turns.sin()[:, None]
    first, second = x_TND[..., : dim // 2], x_TND[..., dim // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x_TH: Tensor, w: dict[str, Tensor], model: ModelConfig) -> Tensor:
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    dim, queries = model.hidden_size // heads, heads // groups
    fused = (x_TH @ w["self_attention.linear_qkv.weight"].T).view(len(x_TH), groups, -1, dim)
    q = fused[:, :, :queries].reshape(len(x_TH), heads, dim)
    k, v = fused[:, :, queries], fused[:, :, queries + 1]
    q_norm, k_norm = (f"self_attention.{n}_layernorm" for n in "qk")
    q = rotate(head_norm(q, w[f"{q_norm}.weight"], w[f"{q_norm}.bias"]), model.rotary_base)
    k = rotate(head_norm(k, w[f"{k_norm}.weight"], w[f"{k_norm}.bias"]), model.rotary_base)
    outputs = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // queries].T / math.sqrt(dim)
        scores += torch.full_like(scores, -torch.inf).triu(1)
        outputs.append(scores.softmax(-1) @ v[:, head // queries])
    return torch.cat(outputs, dim=-1) @ w["self_attention.linear_proj.weight"].T


def feed_forward(x_TH: Tensor, w: dict[str, Tensor], model: ModelConfig) -> Tensor:
    both = x_TH @ w["mlp.linear_fc1.weight"].T
    gate, up = both[:, : model.ffn_hidden_size], both[:, model.ffn_hidden_size :]
    return (gate * torch.sigmoid(gate) * up) @ w["mlp.linear_fc2.weight"].T


def reference_logits(tensors: dict[str, Tensor], model: ModelConfig, token_ids: Tensor) -> Tensor:
    """Logits [T, V] of one sequence, in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    eps = model.layernorm_epsilon
    x = tensors["embedding.word_embeddings.weight"][token_ids]
    for layer in range(model.num_layers):
        w = {
            name.removeprefix("decoder.layers."): tensor[layer]
            for name, tensor in tensors.items()
            if name.startswith("decoder.layers.")
        }
        if model.norm_order == "pre":
            x = x + attention(rms_norm(x, w["input_layernorm.weight"], eps), w, model)
            x = x + feed_forward(rms_norm(x, w["pre_mlp_layernorm.weight"], eps), w, model)
        else:
            branch = attention(x, w, model)
            x = x + rms_norm(branch, w["post_self_attn_layernorm.weight"], eps)
            branch = feed_forward(x, w, model)
            x = x + rms_norm(branch, w["post_mlp_layernorm.weight"], eps)
    x = rms_norm(x, tensors["decoder.final_layernorm.weight"], eps)
    return (x @ tensors["output_layer.weight"].T)[:, :VOCAB_SIZE]


@pytest.mark.parametrize(("norm_order", "qk_norm_groups"), LAYOUTS)
def test_exported_model_computes_the_formulas(
    tmp_path: Path, tiny_tokenizer: Path, norm_order: str, qk_norm_groups: int | None
) -> None:
    model = model_config(norm_order, qk_norm_groups)
    tensors = random_tensors(model, PADDED_VOCAB_SIZE)
    source = write_checkpoint(tmp_path / "step_00000007", model, tensors, tiny_tokenizer)
    convert(source, tmp_path / "hf", "hf")
    token_ids = random_token_ids(40)
    logits = exported_logits(tmp_path / "hf", token_ids)
    for row in range(2):
        expected = reference_logits(tensors, model, token_ids[row])
        torch.testing.assert_close(logits[row].double(), expected, **TOLERANCE)


@pytest.mark.parametrize(("norm_order", "qk_norm_groups"), LAYOUTS)
def test_exported_model_computes_what_megatron_core_computes(
    tmp_path: Path, tiny_tokenizer: Path, norm_order: str, qk_norm_groups: int | None
) -> None:
    """End to end: build the training model, save it, export it, and compare logits."""
    from megatron.core import parallel_state

    from megatron_chameleon.model.chameleon import build_model
    from megatron_chameleon.parallel.megatron_setup import prepare_megatron
    from megatron_chameleon.parallel.topology import create_topology

    prepare_megatron()
    model_settings = model_config(norm_order, qk_norm_groups)
    config = Config(model=model_settings)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        topology = create_topology(config.parallel)
        model = build_model(config, VOCAB_SIZE, topology)[0].eval()
        _randomize(model)
        state = model.sharded_state_dict()
        source = write_checkpoint(
            tmp_path / "step_00000007", model_settings, {}, tiny_tokenizer, sharded_state=state
        )
        token_ids = random_token_ids(model_settings.seq_length)
        positions = torch.arange(model_settings.seq_length).expand_as(token_ids)
        with torch.no_grad():
            expected = model(token_ids, positions, attention_mask=None)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    convert(source, tmp_path / "hf", "hf")
    logits = exported_logits(tmp_path / "hf", token_ids)
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def _randomize(model: torch.nn.Module) -> None:
    """Move norms away from 1 and 0, so that a lost or swapped one is noticed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.1)
