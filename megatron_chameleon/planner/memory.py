"""How much memory a layout needs on the process that needs most: plain arithmetic, no torch.

What a layer keeps for its backward pass is counted tensor by tensor, as megatron-core's layers save
it for Chameleon's architecture. ``tests/unit/planner/test_memory.py`` compares it with the bytes
that a real model saves. The method follows Korthikanti et al. (arXiv 2205.05198), sections 4 and 5.
Their layer has no gate, no grouped queries and no QK-norm, and it stores its attention scores.
"""

import math
from dataclasses import dataclass

from megatron_chameleon.config.parameters import (
    ParameterCounts,
    parameter_counts,
    qk_norm_groups,
    query_groups,
)
from megatron_chameleon.config.schema import Config

GIB = 2**30
RESERVED_GIB = 4.0
"""The CUDA context, buffers of NCCL and cuBLAS, and workspaces of Transformer Engine."""
FRAGMENTATION = 0.06
"""Memory that the allocator loses between its blocks, as a share of the activations."""
LOGIT_BYTES = 6
"""Bytes per logit: 2 for the output layer's bf16 logits and 4 for the loss's fp32 copy. In fp32
there is one buffer of 4 bytes, and the loss works in place."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory of one process, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reserved: float = 0.0

    @property
    def total(self) -> float:
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits)
        return sum(parts) + self.reserved


def predict_memory(config: Config, vocab_size: int, world_size: int) -> MemoryEstimate:
    """The memory of the process that needs most.

    The first pipeline stage keeps the most activations and the last one has the logits, so the
    larger of the two is returned.

    Args:
        config: A config for the megatron engine, with the layout in question.
        vocab_size: The number of tokens in the vocabulary.
        world_size: The number of processes.
    """
    last = config.parallel.pipeline_model_parallel_size - 1
    stages = [stage_memory(config, vocab_size, world_size, stage) for stage in {0, last}]
    return max(stages, key=lambda memory: memory.total)


def stage_memory(config: Config, vocab_size: int, world_size: int, stage: int) -> MemoryEstimate:
    """The memory of one process of a pipeline stage; see ``predict_memory``."""
    parallel, bf16 = config.parallel, config.training.dtype == "bf16"
    state_bytes = (12 if bf16 else 8) + (4 if config.training.ema_decay is not None else 0)
    pp, cp = parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    data = world_size // (parallel.tensor_model_parallel_size * pp * cp)
    parameters = stage_parameters(config, vocab_size, stage)
    layers = math.ceil(config.model.num_layers / pp)
    is_muon, counts = config.optimizer.name == "muon", parameter_counts(config.model, vocab_size)
    matrices = layers * (counts.attention + counts.feed_forward) if is_muon else 0
    in_flight = micro_batches_in_flight(config, data, stage)
    activations = stage_activations(config, layers, in_flight)
    is_last = stage == pp - 1
    return MemoryEstimate(
        weights=parameters * _width(config) + _fp8_copies(config, layers),
        gradients=parameters * 4,
        # Muon has one moment where AdamW has two.
        optimizer=(parameters * state_bytes - 4 * matrices / parallel.tensor_model_parallel_size)
        / (data * cp if parallel.use_distributed_optimizer else 1),
        activations=activations * (1 + FRAGMENTATION),
        logits=output_bytes(config, vocab_size, LOGIT_BYTES) if is_last else 0.0,
        reserved=RESERVED_GIB * GIB,
    )


def stage_parameters(config: Config, vocab_size: int, stage: int) -> float:
    """The number of parameters that one process of a pipeline stage holds."""
    counts = parameter_counts(config.model, vocab_size)
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = math.ceil(config.model.num_layers / pp)
    ends = (stage == 0) + (stage == pp - 1)
    total = layers * _layer_parameters(counts, tp) + ends * counts.embeddings / tp
    return total + (counts.final_norm if stage == pp - 1 else 0)


def micro_batches_in_flight(config: Config, data_size: int, stage: int) -> float:
    """How many micro-batches' activations a stage keeps at the same time.

    The unit is one micro-batch in all layers of the stage. With the 1F1B schedule, it is the number
    of stages from this one to the last. The interleaved schedule keeps slightly more.
    """
    parallel, training = config.parallel, config.training
    pp, vpp = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
    )
    count = training.global_batch_size / (training.micro_batch_size * data_size)
    if vpp == 1:
        return min(pp - stage, count)
    warm_up = 2 * (pp - stage - 1) + (vpp - 1) * pp + 1
    return min(warm_up, count * vpp) / vpp


def local_sequence(config: Config) -> float:
    """Tokens of each sequence on one process, where sequence parallelism does not divide them."""
    return config.model.seq_length / config.parallel.context_parallel_size


def stage_activations(config: Config, layers: int, in_flight: float = 1) -> float:
    """Bytes that the layers of one stage keep for their backward passes.

    Args:
        config: The config, with its layout and recomputation.
        layers: The number of layers in the stage.
        in_flight: The number of micro-batches kept at the same time.
    """
    parallel = config.parallel
    tokens = config.training.micro_batch_size * local_sequence(config)
    layer = layer_bytes_per_token(config)
    if parallel.recompute_granularity != "full":
        return in_flight * tokens * layers * layer
    block = min(parallel.recompute_num_layers, layers)
    inputs = math.ceil(layers / block) * config.model.hidden_size * _width(config)
    # the inputs of all blocks, and the layers of one block while it is recomputed
    return tokens * (in_flight * inputs / _sequence_split(config) + block * layer)


def layer_bytes_per_token(config: Config, fused_norms: bool = True) -> float:
    """Bytes that a layer keeps for its backward pass, per token of the micro-batch.

    Args:
        config: The config, with its layout.
        fused_norms: False for torch's norms and dropout on CPUs, which keep more: the norms keep
            their inputs and their normalised inputs in fp32, and the dropout masks are as wide as
            what they mask.
    """
    model, parallel = config.model, config.parallel
    tp, split, width = parallel.tensor_model_parallel_size, _sequence_split(config), _width(config)
    hidden, heads = model.hidden_size, model.num_attention_heads
    head_size, keys = hidden // heads, query_groups(model) * (hidden // heads)
    linear = 1 if config.fp8.format and not config.fp8.emulate else width
    # Hidden vectors: the inputs of both norms and of both column-parallel layers. (In the Swin
    # order, the norms' inputs are the branches, and the layers' inputs are the residual stream.)
    stream = 2 * hidden * linear + 2 * norm_bytes(config, fused_norms)
    if model.hidden_dropout > 0:
        stream += 2 * hidden * (1 if fused_norms else width)
    # Attention: the output of the query-key-value layer, of which the values are a view; queries
    # and keys after RoPE; the output of attention, which is the input of the projection.
    attention: float = width * ((hidden + 2 * keys) + (hidden + keys) + hidden)
    attention += linear * hidden if linear != width else 0  # the projection's own FP8 copy
    if parallel.recompute_granularity != "selective":
        attention += 4 * heads  # the softmax's normalisers
    attention += _qk_norm_bytes(config, hidden, keys)
    # RoPE's tables, which each layer makes for queries and keys, have a row per position.
    tables = 4 * head_size * width / config.training.micro_batch_size
    # Feed-forward: gate and value; the gate's activation; the value again, since megatron-core adds
    # an offset of 0 to it; their product, which is the input of the last layer.
    feed_forward = model.ffn_hidden_size * (4 * width + linear)
    return stream / split + tables + (attention + feed_forward) / tp


def norm_bytes(config: Config, fused: bool = True) -> float:
    """Bytes per token that a norm of hidden vectors keeps."""
    return config.model.hidden_size * (_width(config) if fused else 8) + 4


def _qk_norm_bytes(config: Config, queries: int, keys: int) -> float:
    """Bytes per token that QK-norm keeps, for queries and keys of these widths."""
    model = config.model
    groups, width = qk_norm_groups(model), _width(config)
    if not groups:
        return 0.0
    heads = model.num_attention_heads + query_groups(model)
    found = 2.0 * width * heads  # the statistics
    if groups > 1:  # the normalised vectors, which each group's weight multiplies
        found += width * (queries + keys)
    if query_groups(model) < model.num_attention_heads:
        found += width * queries  # queries that share keys are copied from the layer's output
    return found


def _layer_parameters(counts: ParameterCounts, tp: int) -> float:
    return (counts.attention + counts.feed_forward) / tp + counts.norms + counts.qk_norms


def output_bytes(
    config: Config, vocab_size: int, logit_bytes: int, fused_norms: bool = True
) -> float:
    """Bytes that the final norm, the output layer and the loss keep for a micro-batch.

    Args:
        config: The config, with its layout.
        vocab_size: The number of tokens in the vocabulary.
        logit_bytes: Bytes per logit in bf16. In fp32 there is one buffer, and the loss works in
            place.
        fused_norms: See ``layer_bytes_per_token``.
    """
    width = _width(config)
    inputs = config.model.hidden_size * width + norm_bytes(config, fused_norms)
    logits = (4 if width == 4 else logit_bytes) * vocab_size
    tp = config.parallel.tensor_model_parallel_size
    tokens = config.training.micro_batch_size * local_sequence(config)
    return tokens * (inputs / _sequence_split(config) + logits / tp)


def _fp8_copies(config: Config, layers: int) -> float:
    """Bytes of Transformer Engine's FP8 weights and their transposes, one byte per number."""
    if not config.fp8.format or config.fp8.emulate:
        return 0.0
    counts = parameter_counts(config.model, vocab_size=1)
    matrices = counts.attention + counts.feed_forward
    return 2 * layers * matrices / config.parallel.tensor_model_parallel_size


def _sequence_split(config: Config) -> int:
    """How many parts sequence parallelism divides norms, residuals and their dropout into."""
    return config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1


def _width(config: Config) -> int:
    """Bytes per number in the training format."""
    return 2 if config.training.dtype == "bf16" else 4
