"""How long a step takes under a layout: matrix products, memory traffic, messages and bubbles.

Everything is computed from the config, except for a few shares in ``gpus.py`` and below. Those are
calibrated on some published runs and tested on others (``published_runs.yaml``).
"""

import math
from dataclasses import dataclass, replace

from megatron_chameleon.config.parameters import query_groups
from megatron_chameleon.config.schema import Config
from megatron_chameleon.planner.flops import (
    BACKWARD,
    attention_flops,
    matrix_flops,
    matrix_passes,
    output_flops,
    training_flops_per_token,
)
from megatron_chameleon.planner.gpus import Gpu
from megatron_chameleon.planner.memory import local_sequence
from megatron_chameleon.planner.trained import (
    NF4_BYTES,
    Trained,
    adapted_sites,
    stage_parameters,
    stages_to_compare,
)

ATTENTION_EFFICIENCY = 0.5
"""Share of the bf16 peak that a fused causal attention kernel reaches on the half it computes."""
ATTENTION_BACKWARD = 2.5
"""A fused kernel's backward pass recomputes the scores: five products instead of forward's two."""
MEMORY_EFFICIENCY = 0.85
LINK_EFFICIENCY = 0.75
"""Share of a link's bandwidth that large collectives reach, within nodes and between them."""
MESSAGE_SECONDS = 20e-6
"""Cost of a message apart from its bytes: its launch and the wait for the other side."""
OVERHEAD = 0.05
"""Share of a step for everything else: launches, waiting for the slowest rank, data, logging."""
LOSS_BYTES = 44
"""Bytes that the loss reads and writes per logit, forward and backward."""
OPTIMIZER_BYTES = 50
"""Bytes that clipping and AdamW read and write per parameter that they hold in fp32."""


@dataclass(frozen=True)
class Software:
    """What differs between training systems. The defaults describe this project."""

    fused: bool = False
    """Whether SwiGLU, RoPE and dropout each run as one kernel."""
    tensor_overlap: float = 0.0
    """Share of the tensor-parallel messages that overlaps with matrix products."""


@dataclass(frozen=True)
class StepTimeEstimate:
    """Estimated seconds of one optimizer update, by what they are spent on. The parts add up."""

    matrices: float
    attention: float
    elementwise: float
    logits: float
    recompute: float
    tensor_messages: float
    pipeline_messages: float
    bubble: float
    data_messages: float
    optimizer: float
    other: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class _LayerTime:
    """Seconds that one process needs for one layer and micro-batch, forward and backward."""

    matrices: float
    attention: float
    elementwise: float
    recompute: float
    tensor_messages: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def predict_step(
    config: Config,
    vocab_size: int,
    world_size: int,
    gpu: Gpu,
    software: Software | None = None,
    trained: Trained = None,
) -> StepTimeEstimate:
    """Predict the time of a step, part by part.

    Args:
        config: A config for the megatron engine, with the layout in question.
        vocab_size: The number of tokens in the vocabulary.
        world_size: The number of processes.
        gpu: The GPU that each process has.
        software: The training system; None means this project.
        trained: The trained parameters of the model, where ``model.train`` or ``freeze`` choose
            them. Passes through frozen layers are counted as if these were trained.
    """
    parallel, training = config.parallel, config.training
    software = software or Software()
    pp, vpp = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
    )
    replica = parallel.tensor_model_parallel_size * pp * parallel.context_parallel_size
    data = world_size // replica
    count = training.global_batch_size / (training.micro_batch_size * data)
    layer, logits = _layer_time(config, gpu, software), _logit_time(config, vocab_size, gpu)
    layers = math.ceil(config.model.num_layers / pp)
    last_layers = config.model.num_layers - layers * (pp - 1)
    # The slowest stage sets the pace. The output layer may make the last stage the slowest.
    slowest_is_last = last_layers * layer.total + logits > layers * layer.total
    paced = last_layers if slowest_is_last else layers
    paced_logits = logits if slowest_is_last else 0.0
    micro_batch = layers * layer.total + logits / pp
    messages = _pipeline_messages(config, gpu, world_size, count)
    updated = _trained_parameters(config, vocab_size, trained)
    parts = StepTimeEstimate(
        matrices=count * paced * layer.matrices,
        attention=count * paced * layer.attention,
        elementwise=count * paced * layer.elementwise,
        logits=count * paced_logits,
        recompute=count * paced * layer.recompute,
        tensor_messages=count * paced * layer.tensor_messages,
        pipeline_messages=messages,
        bubble=(pp - 1) / vpp * micro_batch,
        data_messages=_data_messages(config, updated, gpu, data, layers * layer.total),
        optimizer=_optimizer_time(config, updated, gpu, data),
        other=0.0,
    )
    return replace(parts, other=parts.total * OVERHEAD / (1 - OVERHEAD))


def tokens_per_second_per_gpu(config: Config, world_size: int, step_seconds: float) -> float:
    """Trained tokens per second on each GPU."""
    tokens = config.training.global_batch_size * config.model.seq_length
    return tokens / step_seconds / world_size


def model_tflops(config: Config, vocab_size: int, tokens_per_second: float) -> float:
    """TFLOP/s by the convention of ``flops.py``."""
    flops = training_flops_per_token(config.model, vocab_size, config.adapter.rank > 0)
    return flops * tokens_per_second / 1e12


def uses_fp8(config: Config) -> bool:
    return config.fp8.format is not None and not config.fp8.emulate


def _layer_time(config: Config, gpu: Gpu, software: Software) -> _LayerTime:
    model, parallel, training = config.model, config.parallel, config.training
    tp = parallel.tensor_model_parallel_size
    tokens = training.micro_batch_size * local_sequence(config)
    rate = gpu.peak_flops(training.dtype, uses_fp8(config))
    rate *= gpu.fp8_efficiency if uses_fp8(config) else gpu.bf16_efficiency
    matrices = tokens * matrix_flops(model) / tp / rate + _unpacking_seconds(config, gpu)
    # causal: half of the square is computed
    causal = tokens * attention_flops(model) / 2 / tp
    attention = causal / (gpu.peak_flops(training.dtype, False) * ATTENTION_EFFICIENCY)
    elementwise = tokens * _elementwise_bytes(config, software) / _memory_rate(gpu)
    collective = _collective_seconds(config, gpu, tokens) * (1 - software.tensor_overlap)
    forward = matrices + attention + elementwise + 4 * collective
    recompute = {None: 0.0, "selective": attention, "full": forward}
    return _LayerTime(
        matrices=matrices * matrix_passes(config.adapter.rank > 0),
        attention=attention * (1 + ATTENTION_BACKWARD),
        elementwise=elementwise * (1 + BACKWARD),
        recompute=recompute[parallel.recompute_granularity],
        tensor_messages=8 * collective,
    )


def _elementwise_bytes(config: Config, software: Software) -> float:
    """Bytes per token and layer that move outside matrix products and attention, forward."""
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    split = tp if parallel.sequence_parallel else 1
    width = 2 if config.training.dtype == "bf16" else 4
    hidden = model.hidden_size
    keys = query_groups(model) * (hidden // model.num_attention_heads)
    stream = 4 * hidden + 6 * hidden  # both norms, both residual additions
    if model.hidden_dropout > 0:
        stream += hidden if software.fused else 5 * hidden
    rope_passes, gate_passes = (2, 3) if software.fused else (9, 5)
    norm_passes = 0 if model.qk_norm_groups == 0 else 2
    heads = (rope_passes + norm_passes) * (hidden + keys)
    found = width * (stream / split + (heads + gate_passes * model.ffn_hidden_size) / tp)
    for site, _ in adapted_sites(config):  # input; what is added, joined with the output
        outputs = sum(site.outputs(model).values())
        found += width * (site.inputs(model) + 4 * outputs) / tp
    if uses_fp8(config):  # casts of four inputs, each written twice: plain and transposed
        found += (2 + 2) * (2 * hidden / split + (hidden + model.ffn_hidden_size) / tp)
    return found


def _logit_time(config: Config, vocab_size: int, gpu: Gpu) -> float:
    """Seconds of the output layer and the loss, per micro-batch."""
    tp = config.parallel.tensor_model_parallel_size
    tokens = config.training.micro_batch_size * local_sequence(config)
    passes = matrix_passes(config.adapter.rank > 0)
    flops = passes * tokens * output_flops(config.model, vocab_size) / tp
    rate = gpu.peak_flops(config.training.dtype, False) * gpu.bf16_efficiency
    return flops / rate + tokens * LOSS_BYTES * vocab_size / tp / _memory_rate(gpu)


def _collective_seconds(config: Config, gpu: Gpu, tokens: float) -> float:
    """Seconds to gather or scatter a micro-batch's hidden vectors once over the tensor ranks.

    Without sequence parallelism, an all-reduce takes twice as long.
    """
    tp = config.parallel.tensor_model_parallel_size
    if tp == 1:
        return 0.0
    width = 2 if config.training.dtype == "bf16" else 4
    moved = tokens * config.model.hidden_size * width * (tp - 1) / tp
    within = tp <= gpu.gpus_per_node
    link = gpu.nvlink_gb_per_second if within else gpu.network_gb_per_second
    return moved / (link * 1e9 * LINK_EFFICIENCY) + MESSAGE_SECONDS


def _pipeline_messages(config: Config, gpu: Gpu, world_size: int, count: float) -> float:
    """Seconds that a step waits for messages between pipeline stages, forward and backward.

    An interleaved pipeline sends them while it computes, so that only their number costs time.
    """
    parallel = config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if pp == 1:
        return 0.0
    tokens = config.training.micro_batch_size * local_sequence(config)
    width = 2 if config.training.dtype == "bf16" else 4
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    moved = tokens * config.model.hidden_size * width / split
    within = world_size <= gpu.gpus_per_node
    link = gpu.nvlink_gb_per_second if within else gpu.network_gb_per_second
    seconds = moved / (link * 1e9 * LINK_EFFICIENCY)
    if vpp is None:
        return 2 * (count + pp - 1) * (seconds + MESSAGE_SECONDS)
    return 2 * (pp - 1) * seconds + 2 * (count * vpp + pp - 1) * MESSAGE_SECONDS


def _data_messages(
    config: Config, parameters: float, gpu: Gpu, data: int, micro_batch_seconds: float
) -> float:
    """Seconds of gradient reduction and weight gathering that do not overlap with computation.

    With overlap, they run during the backward pass of the last micro-batch and the forward pass of
    the first one.
    """
    parallel = config.parallel
    size = data * parallel.context_parallel_size
    if size == 1:
        return 0.0
    tp = parallel.tensor_model_parallel_size
    share = (size - 1) / size
    # tp groups share the network cards of a node
    network = gpu.network_gb_per_second * max(1.0, gpu.gpus_per_node / tp)
    within = tp * size <= gpu.gpus_per_node
    link = gpu.nvlink_gb_per_second
    rate = (link if within else min(link, network)) * 1e9 * LINK_EFFICIENCY
    width = 2 if config.training.dtype == "bf16" else 4
    reduce = parameters * 4 * share / rate
    gather = parameters * width * share / rate
    if not parallel.use_distributed_optimizer:
        reduce, gather = 2 * reduce, 0.0
    forward = micro_batch_seconds / (1 + BACKWARD)
    if parallel.overlap_grad_reduce:
        reduce = max(0.0, reduce - (micro_batch_seconds - forward))
    if parallel.overlap_param_gather:
        gather = max(0.0, gather - forward)
    return reduce + gather


def _optimizer_time(config: Config, parameters: float, gpu: Gpu, data: int) -> float:
    parallel = config.parallel
    split = data * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    return parameters / split * OPTIMIZER_BYTES / _memory_rate(gpu)


def _trained_parameters(config: Config, vocab_size: int, trained: Trained) -> float:
    """Of the process that updates the most."""
    stages = {0} if trained is None else stages_to_compare(config, trained)
    return max(stage_parameters(config, vocab_size, stage, trained).trained for stage in stages)


def _unpacking_seconds(config: Config, gpu: Gpu) -> float:
    """Seconds to make the matrices of a layer of 4 bits those of the training format, once."""
    if config.adapter.quantize != "nf4":
        return 0.0
    width = 2 if config.training.dtype == "bf16" else 4
    numbers = matrix_flops(config.model) / 2 / config.parallel.tensor_model_parallel_size
    return numbers * (NF4_BYTES + width) / _memory_rate(gpu)


def _memory_rate(gpu: Gpu) -> float:
    return gpu.memory_gb_per_second * 1e9 * MEMORY_EFFICIENCY
