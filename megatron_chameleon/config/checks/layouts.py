"""Check the layout over the processes, and suggest the nearest ones that work."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from megatron_chameleon.config.schema import Config, ParallelConfig
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.schedules.batch_sizes import sizes_of

SUGGESTIONS = 3
MOST_SIZES = 40
"""Batch sizes that an error lists."""
MOST_PROCESSES = 2**20
"""Of a job. The largest machines have a tenth of these."""


def check_layout(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Problems of the layout, followed by the nearest layouts that work.

    Args:
        config: A config whose single values are valid.
        world_size: Number of processes of the job.
    """
    if world_size > MOST_PROCESSES:
        what = f"{world_size:,} processes are more than {MOST_PROCESSES:,}"
        yield ConfigError("parallel", what, "Check the launcher and the sizes of the layout")
        return
    problems = list(layout_problems(config, world_size))
    layouts = nearest_layouts(config, world_size) if problems else []
    if not layouts:
        yield from problems
        return
    names = "; ".join(_describe(layout) for layout in layouts)
    if len(problems) == 1:
        problem = problems[0]
        remedy = f"{problem.remedy}, or use the nearest layout that works: {names}"
        yield ConfigError(problem.where, problem.what, remedy)
        return
    yield from problems
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    what = f"{_describe(config.parallel)} does not work on {processes}"
    yield ConfigError("parallel", what, f"Use one of the nearest layouts that do: {names}")


def nearest_layouts(config: Config, world_size: int) -> list[ParallelConfig]:
    """Up to three layouts that work on ``world_size`` processes, the nearest first.

    The distance is counted in doublings of the tensor, pipeline and context parallel sizes.
    """
    asked = config.parallel

    def distance(layout: ParallelConfig) -> tuple[float, int]:
        pairs = (
            (layout.tensor_model_parallel_size, asked.tensor_model_parallel_size),
            (layout.pipeline_model_parallel_size, asked.pipeline_model_parallel_size),
            (layout.context_parallel_size, asked.context_parallel_size),
        )
        doublings = sum(abs(math.log2(found / wanted)) for found, wanted in pairs)
        dropped = layout.virtual_pipeline_model_parallel_size is None
        return doublings, int(dropped)

    found = []
    sizes = divisors(world_size)
    # A size that does not divide these would be refused below, a thousand times more slowly.
    tensor = [size for size in sizes if config.model.num_attention_heads % size == 0]
    pipeline = [size for size in sizes if config.model.num_layers % size == 0]
    contexts = {1, asked.context_parallel_size}
    virtual_sizes = {None, asked.virtual_pipeline_model_parallel_size}
    for tp, pp, cp, vpp in itertools.product(tensor, pipeline, contexts, virtual_sizes):
        if world_size % (tp * pp * cp):
            continue
        layout = dataclasses.replace(
            asked,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            virtual_pipeline_model_parallel_size=vpp,
            sequence_parallel=asked.sequence_parallel and tp > 1,
        )
        if not any(layout_problems(dataclasses.replace(config, parallel=layout), world_size)):
            found.append(layout)
    return sorted(found, key=distance)[:SUGGESTIONS]


def divisors(number: int) -> list[int]:
    """All divisors in ascending order, found in the square root of the number of steps.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return [*low, *(number // size for size in reversed(low) if size * size != number)]


def list_divisors(number: int) -> str:
    """``1, 2, 3, 4, 6, 12``."""
    return ", ".join(map(str, divisors(number)))


def _describe(parallel: ParallelConfig) -> str:
    text = f"tensor {parallel.tensor_model_parallel_size}"
    text += f" x pipeline {parallel.pipeline_model_parallel_size}"
    if parallel.virtual_pipeline_model_parallel_size is not None:
        text += f" (interleaved by {parallel.virtual_pipeline_model_parallel_size})"
    if parallel.context_parallel_size > 1:
        text += f" x context {parallel.context_parallel_size}"
    return text


def check_vocabulary(vocab_size: int, config: Config) -> Iterator[ConfigError]:
    """Whether the layout can split a tokenizer's vocabulary, which is never padded."""
    tp = config.parallel.tensor_model_parallel_size
    if vocab_size % tp:
        what = f"its {vocab_size} tokens are not divisible by tensor_model_parallel_size {tp}"
        remedy = f"Train a tokenizer whose --vocab-size is a multiple of {tp}"
        yield ConfigError("tokenizer.path", what, remedy)


def layout_problems(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Problems of the layout, without a search for others; see ``check_layout``."""
    yield from _check_tensor(config)
    yield from _check_pipeline(config)
    yield from _check_context(config)
    yield from _check_data(config, world_size)


def _check_tensor(config: Config) -> Iterator[ConfigError]:
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    for key, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.num_query_groups or model.num_attention_heads),
        ("ffn_hidden_size", model.ffn_hidden_size),
    ):
        if value % tp:
            what = f"{value} is not divisible by tensor_model_parallel_size {tp}"
            yield ConfigError(f"model.{key}", what, f"Use a multiple of {tp} or another layout")
    if parallel.sequence_parallel and tp == 1:
        what = "true needs tensor_model_parallel_size of 2 or more, but it is 1"
        yield ConfigError("parallel.sequence_parallel", what, "Set it to false")
    elif parallel.sequence_parallel and model.seq_length % (tp * parallel.context_parallel_size):
        what = f"{model.seq_length} is not divisible by tensor_model_parallel_size {tp}"
        yield ConfigError(
            "model.seq_length", what, "Use a multiple, which sequence parallelism needs"
        )


def _check_pipeline(config: Config) -> Iterator[ConfigError]:
    layers, parallel = config.model.num_layers, config.parallel
    pp, vpp = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    if layers % pp:
        what = f"{layers} layers are not divisible by {pp} pipeline stages"
        yield ConfigError("model.num_layers", what, f"Use one of {list_divisors(layers)}")
        return
    if vpp is None:
        return
    key = "parallel.virtual_pipeline_model_parallel_size"
    if pp == 1:
        what = f"{vpp} needs pipeline_model_parallel_size of 2 or more, but it is 1"
        yield ConfigError(key, what, "Set it to null")
    elif vpp < 2 or layers // pp % vpp:
        each = layers // pp
        parts = map(str, divisors(each)[1:])
        what = f"{vpp} does not divide the {each} layers of a pipeline stage into 2 or more parts"
        yield ConfigError(key, what, f"Use one of {', '.join([*parts, 'null'])}")


def _check_context(config: Config) -> Iterator[ConfigError]:
    cp, seq_length = config.parallel.context_parallel_size, config.model.seq_length
    if cp > 1 and seq_length % (2 * cp):
        what = f"{seq_length} is not divisible by 2 x context_parallel_size {cp}"
        yield ConfigError("model.seq_length", what, f"Use a multiple of {2 * cp}")


def _check_data(config: Config, world_size: int) -> Iterator[ConfigError]:
    parallel, training = config.parallel, config.training
    pp = parallel.pipeline_model_parallel_size
    replica = parallel.tensor_model_parallel_size * pp * parallel.context_parallel_size
    if world_size % replica:
        ranks = f"{world_size} process{'es' if world_size > 1 else ''}"
        layout = f"{_describe(parallel)} = {replica}"
        what = f"{ranks} cannot be laid out as {layout} times data parallel"
        yield ConfigError("parallel", what, f"Start a multiple of {replica} processes")
        return
    dp = world_size // replica
    chunk = training.micro_batch_size * dp
    if training.rampup_batch_size:
        yield from _check_ramp_sizes(config, dp)
        return
    batch = training.global_batch_size
    if batch % chunk:
        low = batch // chunk * chunk
        near = f"{low} or {low + chunk}" if low else str(chunk)
        what = (
            f"{batch} is not divisible by micro_batch_size {training.micro_batch_size} x data "
            f"parallel {dp} = {chunk}"
        )
        yield ConfigError("training.global_batch_size", what, f"Use {near}")
    elif parallel.virtual_pipeline_model_parallel_size and (batch // chunk) % pp:
        what = (
            f"{batch} gives {batch // chunk} micro-batches, but the interleaved schedule of {pp} "
            f"stages needs a multiple of {pp}"
        )
        yield ConfigError("training.global_batch_size", what, f"Use a multiple of {chunk * pp}")


def _check_ramp_sizes(config: Config, dp: int) -> Iterator[ConfigError]:
    """Whether every size of a batch-size warm-up can be dealt out to the data-parallel ranks."""
    parallel, training = config.parallel, config.training
    chunk = training.micro_batch_size * dp
    what = f"micro_batch_size {training.micro_batch_size} x data parallel {dp} = {chunk}"
    if parallel.virtual_pipeline_model_parallel_size:
        chunk *= parallel.pipeline_model_parallel_size
        what = f"{what}, times {parallel.pipeline_model_parallel_size} interleaved pipeline stages"
    sizes = sizes_of(training)
    if wrong := [str(size) for size in sizes if size % chunk]:
        count = "1 of its sizes is" if len(wrong) == 1 else f"{len(wrong)} of its sizes are"
        more = f" and {len(wrong) - MOST_SIZES} more" if len(wrong) > MOST_SIZES else ""
        what = f"{count} not divisible by {what}: {', '.join(wrong[:MOST_SIZES])}{more}"
        remedy = f"Use a start and an increment that are multiples of {chunk}"
        if sizes[-1] % chunk == 0:
            remedy += ", or [] if the run is past its warm-up"
        yield ConfigError("training.rampup_batch_size", what, remedy)
