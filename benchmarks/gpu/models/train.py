"""Training speed: some layers of the 7B and the line through them, all of it, a rank of the 34B.

Operations are counted as in ``megatron_chameleon/planner/flops.py``: three times the forward matrix
products, attention over the full square, recomputation not counted. MFU refers to the data sheet's
dense peak of the precision of the matrix products (``planner/gpus.py``).
"""

import contextlib
import itertools
from collections.abc import Callable

import torch

from benchmarks.gpu.common import (
    GIB,
    Context,
    Figures,
    LeftOutError,
    free_memory,
    layers_by,
    median_and_spread,
    need_fp8,
    need_gpu,
    process_group,
    time_calls,
)
from benchmarks.gpu.models.engines import (
    Lazy,
    bf16_gradients,
    build_engine,
    head_size,
    preset_config,
    random_batch,
    vocab_size,
    with_recipe,
)
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.planner.flops import training_flops_per_token
from megatron_chameleon.planner.gpus import find_gpu
from megatron_chameleon.planner.memory import predict_memory
from megatron_chameleon.training.engines.megatron import MegatronEngine

SHARD_RANKS = 8
Build = Callable[[int, str], MegatronEngine]
Flops = Callable[[int], float]


def run_slices(context: Context) -> None:
    """Part ``train``."""
    vocab = vocab_size(context.tiny)

    with process_group() as topology:

        def build(layers: int, recipe: str) -> MegatronEngine:
            config = with_recipe(preset_config("chameleon_7b", context.tiny, layers), recipe)
            return build_engine(config, vocab, topology)

        def flops(layers: int) -> float:
            model = preset_config("chameleon_7b", context.tiny, layers).model
            return training_flops_per_token(model, vocab)

        depths = (1, 2) if context.tiny else (4, 8)
        whole = 4 if context.tiny else 32
        micro_batches = (1, 2) if context.tiny else (2, 4)
        measure_line(context, "7B", depths, whole, micro_batches, build, flops)


def run_shard(context: Context) -> None:
    """Part ``shard34b``: the layers of one of eight tensor-parallel ranks, without communication.

    Norms and residuals have the whole hidden size, as without sequence parallelism.
    """
    vocab = vocab_size(context.tiny)

    with process_group() as topology:

        def build(layers: int, recipe: str) -> MegatronEngine:
            config = with_recipe(preset_config("chameleon_34b", context.tiny, layers), recipe)
            size = config.model.hidden_size // config.model.num_attention_heads
            config.model = shard_of(config.model)
            with head_size(size):
                return build_engine(config, vocab // SHARD_RANKS, topology)

        def flops(layers: int) -> float:
            model = preset_config("chameleon_34b", context.tiny, layers).model
            return training_flops_per_token(model, vocab) / SHARD_RANKS

        depths, whole = ((1, 2), 4) if context.tiny else ((8, 16), 48)
        name = "34B, one rank of TP8 without communication"
        measure_line(context, name, depths, whole, (1,), build, flops)


def shard_of(model: ModelConfig) -> ModelConfig:
    """Set heads, groups and feed-forward size to one rank's; ``head_size`` sets the head size."""
    model.num_attention_heads //= SHARD_RANKS
    model.num_query_groups = (model.num_query_groups or SHARD_RANKS) // SHARD_RANKS
    model.ffn_hidden_size //= SHARD_RANKS
    model.qk_norm_groups = 1  # the 8 heads of a rank are within one of the 4 groups of 16
    return model


def measure_line(
    context: Context,
    name: str,
    depths: tuple[int, int],
    whole: int,
    micro_batches: tuple[int, ...],
    build: Build,
    flops: Flops,
) -> None:
    """Measure two depths, each with embedding and head, and extrapolate along a straight line."""
    for recipe in ("bf16", "FP8 delayed", "FP8 current"):
        found: dict[tuple[int, int], Figures | None] = {}
        for layers in depths:
            engine = Lazy(
                lambda layers=layers, recipe=recipe: build_or_refuse(build, layers, recipe)
            )
            for size in micro_batches:
                title = f"{name}, {layers} layers, micro-batch {size}, {recipe}"
                found[layers, size] = context.row(
                    title,
                    lambda layers=layers, size=size, engine=engine, recipe=recipe: step_figures(
                        context, engine.get(), size, flops(layers), recipe
                    ),
                    layers_by(),
                )
            engine.clear()
        for size in micro_batches:
            context.row(
                f"{name}, {whole} layers along the line, micro-batch {size}, {recipe}",
                lambda size=size, found=found, recipe=recipe: line_figures(
                    context, [(d, found[d, size]) for d in depths], whole, flops(whole), recipe
                ),
                peak=False,
            )


def build_or_refuse(build: Build, layers: int, recipe: str) -> MegatronEngine:
    if recipe != "bf16":
        need_fp8()
    free_memory()
    return build(layers, recipe)


def step_figures(
    context: Context, engine: MegatronEngine, micro_batch_size: int, flops: float, recipe: str
) -> Figures:
    """Measure whole training steps of one micro-batch, with optimizer and metrics."""
    config = engine.config
    config.training.micro_batch_size = config.training.global_batch_size = micro_batch_size
    vocab = engine.parts[0].vocab_size
    batch = random_batch(vocab, micro_batch_size, config.model.seq_length)
    number = itertools.count(1)

    def step() -> None:
        metrics = engine.train_step(next(number), [batch])
        if metrics.get("skipped"):
            raise ArithmeticError(f"a step was skipped: loss {metrics['loss']}")

    times = time_calls(step, repeats=3 if context.tiny else 10, warmup=2 if context.tiny else 4)
    seconds, spread = median_and_spread(times)
    tokens = micro_batch_size * config.model.seq_length
    return {**speed(context, tokens, seconds, flops, recipe), "spread": spread}


def line_figures(
    context: Context,
    found: list[tuple[int, Figures | None]],
    whole: int,
    flops: float,
    recipe: str,
) -> Figures:
    if recipe != "bf16":
        need_fp8()
    (few, short), (many, long) = found
    if short is None or long is None:
        raise LeftOutError("it needs both depths, which were not measured")
    tokens = float(short["tokens per step"])
    first, second = (tokens / float(each["tokens/s"]) for each in (short, long))
    layer = (second - first) / (many - few)
    if layer <= 0:
        times = f"{first * 1e3:.3g} and {second * 1e3:.3g} ms"
        raise LeftOutError(f"{few} and {many} layers took {times}: too noisy for a line")
    figures = speed(context, int(tokens), first + (whole - few) * layer, flops, recipe)
    return {
        **figures,
        "ms per layer": layer * 1e3,
        "ms beside the layers": (first - few * layer) * 1e3,
    }


def speed(context: Context, tokens: int, seconds: float, flops: float, recipe: str) -> Figures:
    """Compare a rate with the data sheet's peak and the measured product of the same precision."""
    fp8 = recipe != "bf16"
    rate = tokens / seconds
    figures: Figures = {"tokens/s": rate, "ms": seconds * 1e3, "TFLOP/s": rate * flops / 1e12}
    gpu = find_gpu(platform.device_name() or "")
    if gpu:
        figures["MFU"] = rate * flops / gpu.peak_flops("bf16", fp8)
    if ceiling := context.ceiling("fp8 matmul" if fp8 else "bf16 matmul", "TFLOP/s"):
        figures["of the matmul"] = rate * flops / 1e12 / ceiling
    return {**figures, "tokens per step": tokens}


def run_whole(context: Context) -> None:
    """Part ``whole7b``: all 32 layers, micro-batch 1."""
    cases = (
        ("bf16", 16, None),
        ("bf16", 16, "full"),
        ("FP8 current", 16, "full"),
        ("bf16", 18, "full"),
    )
    with process_group() as topology:
        for recipe, width, recompute in cases:
            words = f"{recompute} recompute" if recompute else "no recompute"
            context.row(
                f"7B whole, micro-batch 1, {recipe}, {width} bytes per parameter, {words}",
                lambda recipe=recipe, width=width, recompute=recompute: whole_figures(
                    context, topology, recipe, width, recompute
                ),
                layers_by(),
            )


def whole_figures(
    context: Context, topology: Topology, recipe: str, width: int, recompute: str | None
) -> Figures:
    config = with_recipe(preset_config("chameleon_7b", context.tiny, 32), recipe)
    if context.tiny:
        config.model.num_layers = 4
    config.parallel.recompute_granularity = recompute
    config.parallel.use_distributed_optimizer = width == 16
    vocab = vocab_size(context.tiny)
    if recipe != "bf16":
        need_fp8()
    if width == 16:
        need_gpu("bf16 gradients need Transformer Engine's Adam")
        if not platform.has_transformer_engine():
            raise LeftOutError("bf16 gradients need Transformer Engine's Adam")
    needed = check_memory(config, vocab, width)
    with bf16_gradients() if width == 16 else contextlib.nullcontext():
        engine = build_engine(config, vocab, topology)
        flops = training_flops_per_token(config.model, vocab)
        figures = step_figures(context, engine, 1, flops, recipe)
    return {**figures, "GiB predicted": needed}


def check_memory(config: Config, vocab: int, width: int) -> float:
    """Return the GiB that the planner predicts; leave the row out if the device lacks them."""
    parameters = count_parameters(config.model, vocab)
    needed = (predict_memory(config, vocab, 1).total - (18 - width) * parameters) / GIB
    if platform.has_gpu():
        free = torch.cuda.mem_get_info()[0] / GIB
        if needed > 1.05 * free:
            raise LeftOutError(f"it needs about {needed:.0f} GiB, and {free:.0f} GiB are free")
    return needed
