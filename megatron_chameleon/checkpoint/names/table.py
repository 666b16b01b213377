"""The table of tensor names: megatron-core's, Hugging Face's (HF) and Meta's.

The names on megatron-core's side are those of its distributed checkpoints, which stack the layers
along a leading dimension. HF and Meta number the layers, and ``{layer}`` stands for that number.

To change what a tensor is called, or which mapping it uses, change its row here: all directions
come from it. The mappings themselves are in ``mappings.py`` (megatron-core's tensor to HF's) and
``meta_shards.py`` (each of HF's tensors to Meta's shards).
"""

from dataclasses import dataclass

from megatron_chameleon.checkpoint.names.mappings import (
    ATTENTION_OUTPUT,
    DOWN,
    FUSED_QKV,
    GATE_UP,
    HIDDEN_NORM,
    K_NORM_GROUPS,
    Q_NORM_GROUPS,
    VOCABULARY,
    TensorMapping,
)
from megatron_chameleon.checkpoint.names.meta_shards import MetaTensor

Q_NORM = "decoder.layers.self_attention.q_layernorm.weight"
K_NORM = "decoder.layers.self_attention.k_layernorm.weight"
Q_HEADS, K_HEADS = "num_attention_heads", "num_query_groups"


@dataclass(frozen=True)
class RowTemplate:
    """One megatron-core tensor and what the other formats call it, for any layer.

    Attributes:
        megatron: Megatron-core's name.
        hf: HF's names, in the order of the mapping.
        meta: Meta's tensor for each of HF's.
        mapping: How megatron-core's tensor becomes HF's.
        norm_order: The only norm order whose models have this tensor; None: it does not depend on
            the norm order. Models without QK-norm lack its four rows (``tensor_rows.py``).
    """

    megatron: str
    hf: tuple[str, ...]
    meta: tuple[MetaTensor, ...]
    mapping: TensorMapping
    norm_order: str | None = None


# HF and Meta name the two norms of a layer for their place in the pre-norm order, even in swin
# layers, where they come after the branches.
TABLE: tuple[RowTemplate, ...] = (
    RowTemplate(
        megatron="embedding.word_embeddings.weight",
        hf=("model.embed_tokens.weight",),
        meta=(MetaTensor("tok_embeddings.weight", axis=1),),
        mapping=VOCABULARY,
    ),
    RowTemplate(
        megatron="decoder.layers.input_layernorm.weight",
        hf=("model.layers.{layer}.input_layernorm.weight",),
        meta=(MetaTensor("layers.{layer}.attention_norm.weight"),),
        mapping=HIDDEN_NORM,
        norm_order="pre",
    ),
    RowTemplate(
        megatron="decoder.layers.post_self_attn_layernorm.weight",
        hf=("model.layers.{layer}.input_layernorm.weight",),
        meta=(MetaTensor("layers.{layer}.attention_norm.weight"),),
        mapping=HIDDEN_NORM,
        norm_order="swin",
    ),
    RowTemplate(
        megatron="decoder.layers.self_attention.linear_qkv.weight",
        hf=(
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        meta=(
            MetaTensor("layers.{layer}.attention.wq.weight", axis=0, in_pairs=True),
            MetaTensor("layers.{layer}.attention.wk.weight", axis=0, in_pairs=True),
            MetaTensor("layers.{layer}.attention.wv.weight", axis=0),
        ),
        mapping=FUSED_QKV,
    ),
    RowTemplate(
        megatron=Q_NORM,
        hf=("model.layers.{layer}.self_attn.q_norm.weight",),
        meta=(MetaTensor("layers.{layer}.attention.q_normalization.weight", norm_heads=Q_HEADS),),
        mapping=Q_NORM_GROUPS,
    ),
    RowTemplate(
        megatron="decoder.layers.self_attention.q_layernorm.bias",
        hf=("model.layers.{layer}.self_attn.q_norm.bias",),
        meta=(MetaTensor("layers.{layer}.attention.q_normalization.bias", norm_heads=Q_HEADS),),
        mapping=Q_NORM_GROUPS,
    ),
    RowTemplate(
        megatron=K_NORM,
        hf=("model.layers.{layer}.self_attn.k_norm.weight",),
        meta=(MetaTensor("layers.{layer}.attention.k_normalization.weight", norm_heads=K_HEADS),),
        mapping=K_NORM_GROUPS,
    ),
    RowTemplate(
        megatron="decoder.layers.self_attention.k_layernorm.bias",
        hf=("model.layers.{layer}.self_attn.k_norm.bias",),
        meta=(MetaTensor("layers.{layer}.attention.k_normalization.bias", norm_heads=K_HEADS),),
        mapping=K_NORM_GROUPS,
    ),
    RowTemplate(
        megatron="decoder.layers.self_attention.linear_proj.weight",
        hf=("model.layers.{layer}.self_attn.o_proj.weight",),
        meta=(MetaTensor("layers.{layer}.attention.wo.weight", axis=1),),
        mapping=ATTENTION_OUTPUT,
    ),
    RowTemplate(
        megatron="decoder.layers.pre_mlp_layernorm.weight",
        hf=("model.layers.{layer}.post_attention_layernorm.weight",),
        meta=(MetaTensor("layers.{layer}.ffn_norm.weight"),),
        mapping=HIDDEN_NORM,
        norm_order="pre",
    ),
    RowTemplate(
        megatron="decoder.layers.post_mlp_layernorm.weight",
        hf=("model.layers.{layer}.post_attention_layernorm.weight",),
        meta=(MetaTensor("layers.{layer}.ffn_norm.weight"),),
        mapping=HIDDEN_NORM,
        norm_order="swin",
    ),
    RowTemplate(
        megatron="decoder.layers.mlp.linear_fc1.weight",
        hf=(
            "model.layers.{layer}.mlp.gate_proj.weight",
            "model.layers.{layer}.mlp.up_proj.weight",
        ),
        meta=(
            MetaTensor("layers.{layer}.feed_forward.w1.weight", axis=0),
            MetaTensor("layers.{layer}.feed_forward.w3.weight", axis=0),
        ),
        mapping=GATE_UP,
    ),
    RowTemplate(
        megatron="decoder.layers.mlp.linear_fc2.weight",
        hf=("model.layers.{layer}.mlp.down_proj.weight",),
        meta=(MetaTensor("layers.{layer}.feed_forward.w2.weight", axis=1),),
        mapping=DOWN,
    ),
    RowTemplate(
        megatron="decoder.final_layernorm.weight",
        hf=("model.norm.weight",),
        meta=(MetaTensor("norm.weight"),),
        mapping=HIDDEN_NORM,
    ),
    RowTemplate(
        megatron="output_layer.weight",
        hf=("lm_head.weight",),
        meta=(MetaTensor("output.weight", axis=0),),
        mapping=VOCABULARY,
    ),
)
