"""Build the model: megatron-core's ``GPTModel`` in Chameleon's shape.

This file says what the model is. How it is split over processes does not show here, because
megatron-core's layers split themselves according to the config.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.config.parameters import qk_norm_groups
from megatron_chameleon.config.schema import Config, Fp8Config
from megatron_chameleon.model.backend import select_backend
from megatron_chameleon.model.fp8_linear import set_up_delayed_scaling
from megatron_chameleon.model.fused_qk_norm import fuse_qk_norm
from megatron_chameleon.model.fusions import select_fusions
from megatron_chameleon.model.initialization import initialize_weights
from megatron_chameleon.model.layers import block_spec
from megatron_chameleon.model.loss import select_loss_parts
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.random_streams import seed_random
from megatron_chameleon.parallel.topology import Topology

# A config cannot choose fp64, which megatron-core cannot clip; tests use it for exact gradients.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class ChameleonModel(GPTModel):
    """``GPTModel`` that, given labels, returns the parts of Chameleon's loss for each token."""

    def __init__(self, *args: Any, loss_fusion: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss_parts = select_loss_parts(loss_fusion)
        set_up_delayed_scaling(self.decoder)  # for emulated FP8

    def compute_language_model_loss(
        self, labels: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, log(Z) and the largest logit of each position.

        Args:
            labels: [B, S] token ids.
            logits: [S, B, vocabulary / tensor-parallel size].

        Returns:
            Three tensors [B, S].
        """
        parts = self._loss_parts(logits, labels.t(), self.pg_collection.tp)
        cross_entropy, log_z, max_logit = (part.t() for part in parts)
        return cross_entropy, log_z, max_logit


def build_model(
    config: Config, vocab_size: int, topology: Topology, *, draws_weights: bool = True
) -> list[ChameleonModel]:
    """Build this rank's parts of the model on its device, with the initial weights for the seed.

    Args:
        config: A checked config.
        vocab_size: A multiple of the tensor-parallel size.
        topology: From ``create_topology``.
        draws_weights: Whether to draw the initial weights. Without them the weights are not set,
            which saves minutes if those of a large checkpoint follow.

    Returns:
        One part, or ``virtual_pipeline_model_parallel_size`` parts. All share one
        ``TransformerConfig``.
    """
    seed_random(config.training.seed, 0, 0, topology)  # megatron-core needs its streams
    transformer = transformer_config(config)
    stages = range(topology.virtual_pipeline_size)
    parts = [_build_part(config, transformer, vocab_size, topology, stage) for stage in stages]
    for part in parts if draws_weights else ():
        initialize_weights(
            part,
            seed=config.training.seed,
            std=config.model.init_method_std,
            num_layers=config.model.num_layers,
            rank=topology.tensor_rank,
            size=topology.tensor_size,
        )
    return [part.to(platform.device()) for part in parts]


def _build_part(
    config: Config,
    transformer: TransformerConfig,
    vocab_size: int,
    topology: Topology,
    stage: int,
) -> ChameleonModel:
    model_config = config.model
    vp_stage = stage if topology.virtual_pipeline_size > 1 else None
    fusions = select_fusions(config)
    layers = block_spec(
        transformer,
        select_backend(config),
        norm_order=model_config.norm_order,
        qk_norm_groups=qk_norm_groups(model_config),
        vp_stage=vp_stage,
    )
    if fusions.qk_norm_rope_fusion:
        fuse_qk_norm(layers)
    model = ChameleonModel(
        config=transformer,
        transformer_layer_spec=layers,
        vocab_size=vocab_size,
        max_sequence_length=model_config.seq_length,
        pre_process=topology.is_first_part(stage),
        post_process=topology.is_last_part(stage),
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=model_config.rotary_base,
        vp_stage=vp_stage,
        loss_fusion=fusions.loss_fusion,
    )
    if model.pre_process:
        model.embedding.embedding_dropout.p = 0.0  # unlike megatron-core, the paper has none
        if transformer.recompute_granularity == "full":
            model.embedding.register_forward_hook(partial(_need_gradient, model.decoder))
    return model


def _need_gradient(decoder: nn.Module, embedding: nn.Module, inputs: Any, output: Tensor) -> None:
    """Recomputed layers get gradients only if their input needs one, also above frozen weights."""
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in decoder.parameters()):
        output.requires_grad_()


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's config for ours. Source: paper, section 2.3, and Llama 2 for the rest."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.training.dtype]
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    full_recompute = parallel.recompute_granularity == "full"
    fusions = select_fusions(config)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=0.0,
        qk_layernorm=qk_norm_groups(model) > 0,
        layernorm_epsilon=model.layernorm_epsilon,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=functional.silu,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method="uniform" if full_recompute else None,
        recompute_num_layers=parallel.recompute_num_layers if full_recompute else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,  # mean over the unmasked tokens of the whole global batch
        # initialization.py draws the weights; megatron-core only marks how each one is split
        init_method=_keep,
        output_layer_init_method=_keep,
        apply_rope_fusion=fusions.apply_rope_fusion,
        bias_activation_fusion=fusions.bias_activation_fusion,
        bias_dropout_fusion=fusions.bias_dropout_fusion,
        gradient_accumulation_fusion=False,  # see add_weight_gradients_in_products
        masked_softmax_fusion=False,
        # Interleaved pipelines need these to be exact. Batched messages between two stages gave
        # wrong gradients, and so did outputs that were freed while gloo was still sending them.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=not interleaved or platform.has_gpu(),
        **_fp8_fields(config.fp8),
    )


def _fp8_fields(fp8: Fp8Config) -> dict[str, Any]:
    """All FP8 fields, because megatron-core's defaults are not Transformer Engine's.

    megatron-core is not told of emulated FP8, because it would enter Transformer Engine's context.
    """
    start, end = fp8.num_layers_at_start_in_bf16, fp8.num_layers_at_end_in_bf16
    return {
        "fp8": None if fp8.emulate else fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": fp8.amax_compute_algo,
        "first_last_layers_bf16": start + end > 0,
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }


def _keep(weight: Tensor) -> Tensor:
    return weight
