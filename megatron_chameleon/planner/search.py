"""Which layouts a config can have on a number of GPUs, how fast each is, and which do not fit.

    chameleon plan chameleon_7b --gpus 64 --gpu h100

The search tries all sizes of tensor parallelism (within a node), pipeline parallelism and
interleaving, all micro-batch sizes and all kinds of recomputation. Sequence parallelism is on
whenever tensor parallelism is; the distributed optimizer and its overlaps are always on; context
parallelism stays as the config has it. The trainer's own checks decide which layouts are valid.
Nothing here imports torch.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_chameleon.config.checks.adapters import check_quantized
from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.checks.fp8 import check_fp8
from megatron_chameleon.config.checks.layouts import check_vocabulary, divisors, layout_problems
from megatron_chameleon.config.schema import Config, ParallelConfig
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.planner.gpus import Gpu
from megatron_chameleon.planner.memory import GIB, MemoryEstimate, predict_memory
from megatron_chameleon.planner.time import (
    StepTimeEstimate,
    model_tflops,
    predict_step,
    tokens_per_second_per_gpu,
    uses_fp8,
)
from megatron_chameleon.planner.trained import StageParameters, Trained, stage_parameters
from megatron_chameleon.schedules.batch_sizes import plan_batches, samples_before

MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE = (None, "selective", "full")
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class PlanRequest:
    """What to plan: a config on a number of GPUs of one kind."""

    config: Config
    vocab_size: int
    gpus: int
    gpu: Gpu
    trained: Trained = None
    """The trained parameters of the model, where ``model.train`` or ``freeze`` choose them."""

    @property
    def parameters(self) -> StageParameters:
        """Of the whole model and its adapters."""
        whole = dataclasses.replace(self.config, parallel=ParallelConfig())
        return stage_parameters(whole, self.vocab_size, 0, self.trained)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        training = self.config.training
        samples = samples_before(plan_batches(training), training.steps)
        return samples * self.config.model.seq_length


@dataclass(frozen=True)
class LayoutPlan:
    """One layout with its estimated memory and time."""

    request: PlanRequest
    config: Config
    """The requested config, with this layout and micro-batch."""
    memory: MemoryEstimate
    step: StepTimeEstimate

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.request.gpu.memory_gib * GIB

    @property
    def data_size(self) -> int:
        """The number of data-parallel ranks."""
        parallel = self.config.parallel
        return self.request.gpus // (
            parallel.tensor_model_parallel_size
            * parallel.pipeline_model_parallel_size
            * parallel.context_parallel_size
        )

    @property
    def speed(self) -> float:
        """Tokens per second on each GPU."""
        return tokens_per_second_per_gpu(self.config, self.request.gpus, self.step.total)

    @property
    def tflops(self) -> float:
        """TFLOP/s of each GPU by the convention of ``flops.py``."""
        return model_tflops(self.config, self.request.vocab_size, self.speed)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: share of the peak of the format of the matrix products."""
        peak = self.request.gpu.peak_flops(self.config.training.dtype, uses_fp8(self.config))
        return self.tflops * 1e12 / peak

    @property
    def days(self) -> float:
        """Days of the whole run, without failures."""
        batches, steps = plan_batches(self.config.training), self.config.training.steps
        ends = [min(batch.first_step, steps) for batch in batches[1:]] + [steps]
        seconds = 0.0
        for batch, end in zip(batches, ends, strict=True):
            size = batch.global_batch_size
            training = dataclasses.replace(self.config.training, global_batch_size=size)
            config = dataclasses.replace(self.config, training=training)
            step = _predict_step(self.request, config)
            seconds += step.total * max(0, end - batch.first_step)
        return seconds / SECONDS_PER_DAY

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.request.gpus

    def overrides(self) -> list[str]:
        """The overrides that make ``chameleon train`` use this layout."""
        names = (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "sequence_parallel",
            "use_distributed_optimizer",
            "overlap_grad_reduce",
            "overlap_param_gather",
            "recompute_granularity",
        )
        values = [(f"parallel.{name}", getattr(self.config.parallel, name)) for name in names]
        values.append(("training.micro_batch_size", self.config.training.micro_batch_size))
        return [f"{key}={_yaml(value)}" for key, value in values]


@dataclass(frozen=True)
class LayoutSearchResult:
    """The result of a search."""

    request: PlanRequest
    fitting: list[LayoutPlan]
    """Fastest first. Each layout and micro-batch size has the least recomputation that fits."""
    too_large: list[LayoutPlan]
    """Fastest first. If any layout fits, only those that are faster than the fastest of them."""
    refused: Counter[str]
    """The trainer's reasons for refusing layouts, and how many layouts each one excluded."""
    own: LayoutPlan | None
    """The config's own layout, if the trainer accepts it."""


def search_layouts(request: PlanRequest) -> LayoutSearchResult:
    """Search the layouts of a config.

    Raises:
        ConfigError: The planner does not know the config's engine, or the GPU has no FP8.
        ConfigErrors: Values that do not depend on the layout are wrong.
    """
    _check_request(request)
    fitting, rest, refused = [], [], Counter[str]()
    for layout in _layouts(request):
        problem = next(_refusals(request, layout), None)
        if problem is not None:
            refused[problem.where + ": " + problem.what] += 1
            continue
        kinds = [_predict(request, _with_recompute(layout, kind)) for kind in RECOMPUTE]
        kept = next((plan for plan in kinds if plan.fits), None)
        if kept is not None:
            fitting.append(kept)
        rest += [plan for plan in kinds if not plan.fits]
    fitting.sort(key=_rank)
    rest.sort(key=_rank)
    if fitting:
        rest = [plan for plan in rest if plan.speed > fitting[0].speed]
    own = None if any(_refusals(request, request.config)) else _predict(request, request.config)
    return LayoutSearchResult(request, fitting, rest, refused, own)


def _rank(plan: LayoutPlan) -> tuple[float, float]:
    """Sort key: the fastest first; layouts within a thousandth of each other by their memory."""
    return -round(math.log(plan.speed), 3), plan.memory.total


def best_of_each(plans: Sequence[LayoutPlan]) -> list[LayoutPlan]:
    """The first plan of each TP x PP."""
    found: dict[tuple[int, int], LayoutPlan] = {}
    for plan in plans:
        parallel = plan.config.parallel
        sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        found.setdefault(sizes, plan)
    return list(found.values())


def _check_request(request: PlanRequest) -> None:
    config = request.config
    if config.engine.name != "megatron":
        what = f"is {config.engine.name}, but the planner only knows the megatron engine"
        raise ConfigError("engine.name", what, "Set engine.name=megatron")
    if uses_fp8(config) and request.gpu.fp8_tflops is None:
        what = f"is {config.fp8.format}, but {request.gpu.name} has no FP8"
        raise ConfigError("fp8.format", what, "Set fp8.format=null, or plan for h100 or h200")
    # Without its layout, which is what the search looks for.
    neutral = ParallelConfig(context_parallel_size=config.parallel.context_parallel_size)
    training = dataclasses.replace(config.training, micro_batch_size=1)
    neutral_config = dataclasses.replace(config, parallel=neutral, training=training)
    check_config(neutral_config, config.parallel.context_parallel_size)


def _layouts(request: PlanRequest) -> Iterator[Config]:
    """Every layout to consider, including impossible ones, in no particular order."""
    layers = request.config.model.num_layers
    cp = request.config.parallel.context_parallel_size
    sizes = divisors(request.gpus)
    tensor = [size for size in sizes if size <= request.gpu.gpus_per_node]
    pipeline = [size for size in sizes if size <= layers]
    for tp, pp, micro in itertools.product(tensor, pipeline, MICRO_BATCHES):
        if tp * pp * cp > request.gpus:
            continue
        each = layers // pp
        parts = divisors(each)[1:] if pp > 1 else []
        for vpp in (None, *parts):
            layout = dataclasses.replace(
                request.config.parallel,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=vpp,
                sequence_parallel=tp > 1,
                use_distributed_optimizer=True,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
                recompute_granularity=None,
                recompute_num_layers=1,
            )
            training = dataclasses.replace(request.config.training, micro_batch_size=micro)
            yield dataclasses.replace(request.config, parallel=layout, training=training)


def _refusals(request: PlanRequest, config: Config) -> Iterator[ConfigError]:
    yield from layout_problems(config, request.gpus)
    yield from check_vocabulary(request.vocab_size, config)
    yield from check_fp8(config)
    yield from check_quantized(config)


def _with_recompute(config: Config, kind: str | None) -> Config:
    parallel = dataclasses.replace(config.parallel, recompute_granularity=kind)
    return dataclasses.replace(config, parallel=parallel)


def _predict(request: PlanRequest, config: Config) -> LayoutPlan:
    memory = predict_memory(config, request.vocab_size, request.gpus, request.trained)
    return LayoutPlan(request, config, memory, _predict_step(request, config))


def _predict_step(request: PlanRequest, config: Config) -> StepTimeEstimate:
    return predict_step(
        config, request.vocab_size, request.gpus, request.gpu, trained=request.trained
    )


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_layout(config: Config) -> str:
    """A layout in words: ``TP 2 x PP 4 x VPP 2, micro-batch 1, full recomputation``."""
    parallel = config.parallel
    words = [f"TP {parallel.tensor_model_parallel_size}"]
    words.append(f"PP {parallel.pipeline_model_parallel_size}")
    if parallel.virtual_pipeline_model_parallel_size:
        words.append(f"VPP {parallel.virtual_pipeline_model_parallel_size}")
    if parallel.context_parallel_size > 1:
        words.append(f"CP {parallel.context_parallel_size}")
    text = f"{' x '.join(words)}, micro-batch {config.training.micro_batch_size}"
    kind = parallel.recompute_granularity
    return f"{text}, {kind} recomputation" if kind else text


def largest_parts(memory: MemoryEstimate, count: int = 2) -> Sequence[tuple[str, float]]:
    """The parts that need the most memory, largest first."""
    parts = sorted(vars(memory).items(), key=lambda part: -part[1])
    return parts[:count]
