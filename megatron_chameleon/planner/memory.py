"""How much memory a layout needs on the process that needs most: plain arithmetic, no torch.

What a layer keeps for its backward pass is counted tensor by tensor, as megatron-core's layers save
it for Chameleon's architecture. ``tests/unit/planner/test_memory.py`` compares it with the bytes
that a real model saves. The method follows Korthikanti et al. (arXiv 2205.05198), sections 4 and 5.
Their layer has no gate, no grouped queries and no QK-norm, and it stores its attention scores.
"""

import math
from dataclasses import dataclass

from megatron_chameleon.checkpoint.names.adapters import SITES
from megatron_chameleon.config.parameters import parameter_counts, qk_norm_groups, query_groups
from megatron_chameleon.config.schema import Config
from megatron_chameleon.planner.trained import (
    NF4_BYTES,
    StageParameters,
    Trained,
    adapted_sites,
    is_trained,
    kept_layers,
    layers_of_stage,
    stage_parameters,
    stages_to_compare,
)

GIB = 2**30
BLOCK_NORMS = (
    *("input_layernorm", "pre_mlp_layernorm"),
    *("post_self_attn_layernorm", "post_mlp_layernorm"),
)
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


def predict_memory(
    config: Config, vocab_size: int, world_size: int, trained: Trained = None
) -> MemoryEstimate:
    """The memory of the process that needs most.

    The first pipeline stage keeps the most activations and the last one has the logits, so the
    larger of the two is returned. If only some parameters are trained, all stages are compared.

    Args:
        config: A config for the megatron engine, with the layout in question.
        vocab_size: The number of tokens in the vocabulary.
        world_size: The number of processes.
        trained: The trained parameters of the model, where ``model.train`` or ``freeze`` choose
            them.
    """
    stages = stages_to_compare(config, trained)
    estimates = [stage_memory(config, vocab_size, world_size, stage, trained) for stage in stages]
    return max(estimates, key=lambda memory: memory.total)


def stage_memory(
    config: Config, vocab_size: int, world_size: int, stage: int, trained: Trained = None
) -> MemoryEstimate:
    """The memory of one process of a pipeline stage; see ``predict_memory``."""
    parallel = config.parallel
    pp, cp = parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    data = world_size // (parallel.tensor_model_parallel_size * pp * cp)
    parameters = stage_parameters(config, vocab_size, stage, trained)
    in_flight = micro_batches_in_flight(config, data, stage)
    activations = stage_activations(config, kept_layers(config, stage, trained), in_flight, trained)
    is_last = stage == pp - 1
    return MemoryEstimate(
        weights=_weight_bytes(config, parameters),
        gradients=parameters.trained * 4,
        optimizer=_optimizer_bytes(config, parameters)
        / (data * cp if parallel.use_distributed_optimizer else 1),
        activations=activations * (1 + FRAGMENTATION) + _whole_matrices(config),
        logits=output_bytes(config, vocab_size, LOGIT_BYTES, trained=trained) if is_last else 0.0,
        reserved=RESERVED_GIB * GIB,
    )


def _weight_bytes(config: Config, parameters: StageParameters) -> float:
    """Frozen or not, weights have the training format, but for those in 4 bits."""
    plain = parameters.total - parameters.quantized
    quantized = parameters.quantized * NF4_BYTES
    return plain * _width(config) + quantized + _fp8_copies(config, layers_of_stage(config))


def _optimizer_bytes(config: Config, parameters: StageParameters) -> float:
    """Moments, averages, and with bf16 main weights, of what is trained alone."""
    training = config.training
    each = (12 if training.dtype == "bf16" else 8) + (4 if training.ema_decay is not None else 0)
    # Muon has one moment where AdamW has two.
    less = 4 * parameters.matrices if config.optimizer.name == "muon" else 0
    return parameters.trained * each - less


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


def stage_activations(
    config: Config, layers: float, in_flight: float = 1, trained: Trained = None
) -> float:
    """Bytes that the layers of one stage keep for their backward passes.

    Args:
        config: The config, with its layout and recomputation.
        layers: The number of layers in the stage that keep something.
        in_flight: The number of micro-batches kept at the same time.
        trained: See ``predict_memory``.
    """
    parallel = config.parallel
    tokens = config.training.micro_batch_size * local_sequence(config)
    layer = layer_bytes(config, trained=trained)
    if parallel.recompute_granularity != "full":
        return in_flight * layers * layer
    block = min(parallel.recompute_num_layers, layers)
    if not block:
        return 0.0
    inputs = math.ceil(layers / block) * config.model.hidden_size * _width(config)
    # the inputs of all blocks, and the layers of one block while it is recomputed
    return in_flight * tokens * inputs / _sequence_split(config) + block * layer


def layer_bytes(config: Config, fused_norms: bool = True, trained: Trained = None) -> float:
    """Bytes that a layer keeps for its backward pass of a micro-batch.

    A linear layer keeps its input for the gradient of its weight. A frozen one does not, but the
    adapter beside it does.

    Args:
        config: The config, with its layout.
        fused_norms: False for torch's norms and dropout on CPUs, which keep more: the norms keep
            their inputs and their normalised inputs in fp32, and the dropout masks are as wide as
            what they mask.
        trained: See ``predict_memory``.
    """
    tokens = config.training.micro_batch_size * local_sequence(config)
    return tokens * _layer_bytes_per_token(config, fused_norms, trained) + _joined_adapters(config)


def _layer_bytes_per_token(config: Config, fused_norms: bool, trained: Trained) -> float:
    model, parallel = config.model, config.parallel
    tp, split, width = parallel.tensor_model_parallel_size, _sequence_split(config), _width(config)
    hidden, heads = model.hidden_size, model.num_attention_heads
    head_size, keys = hidden // heads, query_groups(model) * (hidden // heads)
    inputs = {name: _input_width(config, name, trained) for name in ("linear_qkv", "linear_fc1")}
    # Hidden vectors: the inputs of both norms and of both column-parallel layers. (In the Swin
    # order, the norms' inputs are the branches, and the layers' inputs are the residual stream.)
    frozen_norms = not is_trained(config, trained, *BLOCK_NORMS)
    stream = hidden * sum(inputs.values()) + 2 * norm_bytes(config, fused_norms, frozen_norms)
    if model.hidden_dropout > 0:
        stream += 2 * hidden * (1 if fused_norms else width)
    # Attention: the output of the query-key-value layer, of which the values are a view; queries
    # and keys after RoPE; the output of attention, which is the input of the projection.
    attention: float = width * ((hidden + 2 * keys) + (hidden + keys) + hidden)
    projection = _input_width(config, "linear_proj", trained)
    attention += hidden * projection if projection < width else 0  # its own FP8 copy
    if parallel.recompute_granularity != "selective":
        attention += 4 * heads  # the softmax's normalisers
    elif not projection:
        attention -= hidden * width
    attention += _qk_norm_bytes(config, hidden, keys, trained)
    # RoPE's tables, which each layer makes for queries and keys, have a row per position.
    tables = 4 * head_size * width / config.training.micro_batch_size
    # Feed-forward: gate and value; the gate's activation; the value again, since megatron-core adds
    # an offset of 0 to it; their product, which is the input of the last layer.
    product = _input_width(config, "linear_fc2", trained)
    feed_forward = model.ffn_hidden_size * (4 * width + product)
    adapters = _adapter_bytes_per_token(config)
    return stream / split + tables + (attention + feed_forward) / tp + adapters


def _input_width(config: Config, linear: str, trained: Trained) -> int:
    """Bytes per number of the input that a linear layer, or its adapter, keeps; 0: neither does."""
    if is_trained(config, trained, linear):
        return 1 if config.fp8.format and not config.fp8.emulate else _width(config)
    is_adapted = any(site.linear == linear for site, _ in adapted_sites(config))
    # With dropout, an adapter's input is a tensor of its own.
    return _width(config) if is_adapted and not config.adapter.dropout else 0


def _adapter_bytes_per_token(config: Config) -> float:
    """Bytes per token that the adapters of a layer keep besides their inputs."""
    adapter, width = config.adapter, _width(config)
    tp, split = config.parallel.tensor_model_parallel_size, _sequence_split(config)
    found = 0.0
    for site, adapted in adapted_sites(config):
        # The low-rank vectors, which the second matrix needs.
        found += adapter.rank * len(adapted) * width / (1 if site.by_rows else split)
        inputs = site.inputs(config.model)
        if adapter.dropout:  # the mask is drawn for all ranks; the input is another one than W's
            found += inputs * (1 + width / (split if site.by_rows else tp))
        if adapter.dora:  # the output before it is scaled
            outputs = sum(site.outputs(config.model).values())
            found += outputs * width / (tp if site.by_rows else split)
    return found


def _joined_adapters(config: Config) -> float:
    """Bytes that the adapters of a layer keep, however many tokens there are."""
    tp, width = config.parallel.tensor_model_parallel_size, _width(config)
    found = 0.0
    for site, adapted in adapted_sites(config):
        # The first matrices, joined for one product.
        joined = config.adapter.rank * len(adapted) * site.inputs(config.model)
        found += width * joined / (1 if site.by_rows else tp)
        if config.adapter.dora:  # the factors of the output, and what they are made of
            outputs = sum(site.outputs(config.model).values())
            found += 2 * width * outputs / (tp if site.by_rows else 1)
    return found


def _whole_matrices(config: Config) -> float:
    """Bytes of a matrix that is computed for a moment: what nf4 stands for, or DoRA's sum."""
    if not config.adapter.rank:
        return 0.0
    model = config.model
    largest = max(sum(site.outputs(model).values()) * site.inputs(model) for site in SITES)
    # DoRA adds W and B A in fp32, and reads each of the three.
    each = 12 if config.adapter.dora else 0
    each += _width(config) if config.adapter.quantize == "nf4" else 0
    return largest * each / config.parallel.tensor_model_parallel_size


def norm_bytes(config: Config, fused: bool = True, frozen: bool = False) -> float:
    """Bytes per token that a norm of hidden vectors keeps."""
    unfused = 4 if frozen else 8
    return config.model.hidden_size * (_width(config) if fused else unfused) + 4


def _qk_norm_bytes(config: Config, queries: int, keys: int, trained: Trained) -> float:
    """Bytes per token that QK-norm keeps, for queries and keys of these widths."""
    model = config.model
    groups, width = qk_norm_groups(model), _width(config)
    if not groups:
        return 0.0
    heads = model.num_attention_heads + query_groups(model)
    found = 2.0 * width * heads  # the statistics
    # The normalised vectors, for the gradient of each group's weight, which multiplies them.
    if groups > 1 and is_trained(config, trained, "q_layernorm", "k_layernorm"):
        found += width * (queries + keys)
    if query_groups(model) < model.num_attention_heads:
        found += width * queries  # queries that share keys are copied from the layer's output
    return found


def output_bytes(
    config: Config,
    vocab_size: int,
    logit_bytes: int,
    fused_norms: bool = True,
    trained: Trained = None,
) -> float:
    """Bytes that the final norm, the output layer and the loss keep for a micro-batch.

    Args:
        config: The config, with its layout.
        vocab_size: The number of tokens in the vocabulary.
        logit_bytes: Bytes per logit in bf16. In fp32 there is one buffer, and the loss works in
            place.
        fused_norms: See ``layer_bytes``.
        trained: See ``predict_memory``.
    """
    width = _width(config)
    frozen_norm = not is_trained(config, trained, "final_layernorm")
    inputs = norm_bytes(config, fused_norms, frozen_norm)
    if is_trained(config, trained, "output_layer"):
        inputs += config.model.hidden_size * width
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
