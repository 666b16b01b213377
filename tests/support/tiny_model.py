"""A tiny tokenizer folder, and training checkpoints of random tensors, for the tests of readers.

Megatron-core itself writes the checkpoints, each tensor in several chunks as in a tensor-parallel
run.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import Config, ModelConfig, TokenizerConfig
from megatron_chameleon.evaluation.tasks.captions import NUMBER_WORDS

TEXTS = [f"a handwritten {word}, digit number {n}" for n, word in enumerate(NUMBER_WORDS)]
IMAGE_CODES = 16
VOCAB_SIZE = 320
PADDED_VOCAB_SIZE = 384


def write_tokenizer(folder: Path, seed: int = 1, quantizer: str = "vq") -> Path:
    """A trained text tokenizer and an untrained image tokenizer: 8x8 pixels, 4x4 codes of 16."""
    from safetensors.torch import save_file

    from megatron_chameleon.tokenizer.image.stored import (
        FORMAT,
        IMAGE_CONFIG_FILE,
        IMAGE_WEIGHTS_FILE,
        vqgan_config_to_json,
    )
    from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
    from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

    train_text_tokenizer(TEXTS * 20, folder, VOCAB_SIZE, IMAGE_CODES)
    config = VqganConfig(
        resolution=8,
        base_channels=32,
        ch_mult=[1, 2],
        num_res_blocks=1,
        z_channels=8,
        embed_dim=4 if quantizer == "lfq" else 8,
        codebook_size=IMAGE_CODES,
        quantizer=quantizer,
    )
    torch.manual_seed(seed)
    model = Vqgan(config)
    # As widely spread as an untrained encoder's latents, so that random images get different codes.
    if quantizer != "lfq":
        torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    save_file(model.state_dict(), folder / IMAGE_WEIGHTS_FILE)
    (folder / IMAGE_CONFIG_FILE).write_text(
        json.dumps({"format": FORMAT, "model": vqgan_config_to_json(config)})
    )
    return folder


def model_config(norm_order: str = "pre", qk_norm_groups: int | None = 2) -> ModelConfig:
    """A config with grouped queries, shared QK-norms and sizes that are all different."""
    return ModelConfig(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=40,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=64,
        norm_order=norm_order,
        qk_norm_groups=qk_norm_groups,
    )


def random_tensors(model: ModelConfig, vocab_rows: int, seed: int = 1) -> dict[str, Tensor]:
    """Every tensor of a model under megatron-core's name, with stacked layers.

    The norms are far from 1 and 0.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, hidden, ffn = model.num_layers, model.hidden_size, model.ffn_hidden_size
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    head_dim = hidden // heads
    norms = (
        ("input_layernorm", "pre_mlp_layernorm")
        if model.norm_order == "pre"
        else ("post_self_attn_layernorm", "post_mlp_layernorm")
    )
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (vocab_rows, hidden),
        "decoder.layers.self_attention.linear_qkv.weight": (
            layers,
            (heads + 2 * groups) * head_dim,
            hidden,
        ),
        "decoder.layers.self_attention.linear_proj.weight": (layers, hidden, heads * head_dim),
        "decoder.layers.mlp.linear_fc1.weight": (layers, 2 * ffn, hidden),
        "decoder.layers.mlp.linear_fc2.weight": (layers, hidden, ffn),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (vocab_rows, hidden),
    }
    for norm in norms:
        shapes[f"decoder.layers.{norm}.weight"] = (layers, hidden)
    q_groups = heads if model.qk_norm_groups is None else model.qk_norm_groups
    for name, count in (("q", q_groups), ("k", min(q_groups, groups))):
        if q_groups:
            prefix = f"decoder.layers.self_attention.{name}_layernorm"
            shapes[f"{prefix}.weight"] = shapes[f"{prefix}.bias"] = (layers, count, head_dim)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = 0.3 * noise + (0.0 if name.endswith("bias") else 1.0)
        else:
            tensors[name] = noise * shape[-1] ** -0.5
    return tensors


def write_checkpoint(
    folder: Path,
    model: ModelConfig,
    tensors: dict[str, Tensor],
    tokenizer_folder: Path,
    step: int = 7,
    sharded_state: dict[str, Any] | None = None,
    prefix: str = "",
    main_weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write a whole checkpoint folder.

    The moments are the weights times 0.5, and the weights' squares. Tensors in bf16 need
    ``main_weights``. If ``sharded_state`` is given, it is saved in place of the tensors, without
    optimizer state.
    """
    from megatron_chameleon.tokenizer.folder import fingerprint

    folder.mkdir(parents=True)
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    moments = {
        "exp_avg": lambda tensor: 0.5 * tensor.float(),
        "exp_avg_sq": lambda tensor: tensor.float() ** 2,
    }
    optimizer = {
        f"optimizer.state.{part}.{name}": moment(tensor)
        for part, moment in moments.items()
        for name, tensor in tensors.items()
    }
    for name, tensor in (main_weights or {}).items():
        optimizer[f"optimizer.state.fp32_param.{name}"] = tensor
    state = sharded_state or {
        f"{name}/{number}": chunk
        for name, tensor in {**named, **optimizer}.items()
        for number, chunk in enumerate(_chunks(name, tensor))
    }
    _save_sharded({"model": state, "step": step}, folder)
    config = Config(model=model, tokenizer=TokenizerConfig(path=str(tokenizer_folder)))
    save_config(config, folder / "config.yaml")
    values = {
        "format": "megatron_chameleon.checkpoint/1",
        "step": step,
        "consumed_samples": step,
        "consumed_tokens": step * model.seq_length,
        "vocab_size": VOCAB_SIZE,
        "tokenizer_fingerprint": fingerprint(tokenizer_folder),
        "optimizer": sharded_state is None,
    }
    (folder / "state.json").write_text(json.dumps(values))
    return folder


def _save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Let megatron-core save, in this process's group or in one of its own."""
    from megatron.core import dist_checkpointing

    from megatron_chameleon.parallel.megatron_setup import prepare_megatron

    prepare_megatron()
    own_group = not torch.distributed.is_initialized()
    if own_group:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        dist_checkpointing.save(state, str(folder))
    finally:
        if own_group:
            torch.distributed.destroy_process_group()


def _chunks(key: str, tensor: Tensor) -> list:
    """The tensor as two tensor-parallel ranks would save it, each layer on its own."""
    from megatron.core.dist_checkpointing import ShardedTensor

    stacked = "decoder.layers." in key
    layers = tensor.unbind(0) if stacked else [tensor]
    axis = int(stacked)
    chunks = []
    for layer, part in enumerate(layers):
        halves = part.chunk(2) if part.shape[0] % 2 == 0 else [part]
        for rank, half in enumerate(halves):
            offsets = [(axis, rank, len(halves))]
            if stacked:
                offsets.insert(0, (0, layer, len(layers)))
            chunks.append(
                ShardedTensor.from_rank_offsets(
                    key, half.contiguous(), *offsets, prepend_axis_num=axis
                )
            )
    return chunks


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder, which tests must not change."""
    return write_tokenizer(tmp_path_factory.mktemp("tiny") / "tokenizer")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A checkpoint of random tensors with a padded vocabulary, which tests must not change."""
    model = model_config()
    folder = tmp_path_factory.mktemp("tiny_run") / "checkpoints" / "step_00000007"
    tensors = random_tensors(model, PADDED_VOCAB_SIZE)
    return write_checkpoint(folder, model, tensors, tiny_tokenizer)


def exported_logits(folder: Path, token_ids: Tensor) -> Tensor:
    """Transformers' logits [B, T, V], before the mask that its ``forward`` puts on image codes."""
    from transformers import ChameleonForConditionalGeneration

    model = ChameleonForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=token_ids).last_hidden_state)


def random_token_ids(tokens: int) -> Tensor:
    """[2, tokens] from the whole vocabulary, including ``<pad>`` and image codes."""
    return torch.randint(VOCAB_SIZE, (2, tokens), generator=torch.Generator().manual_seed(3))
