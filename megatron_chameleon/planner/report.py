"""The output of ``chameleon plan``: tables for people, or one JSON object for scripts."""

from collections.abc import Sequence
from typing import Any

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.planner.memory import GIB, MemoryEstimate
from megatron_chameleon.planner.search import (
    LayoutPlan,
    LayoutSearchResult,
    PlanRequest,
    best_of_each,
    describe_layout,
    largest_parts,
)
from megatron_chameleon.planner.time import uses_fp8
from megatron_chameleon.wording import format_count

CONVENTION = (
    "Model FLOPs count all weight matrices, the output layer, and attention over the full square, "
    "although a causal kernel computes half of it; backward = 2 x forward, without recomputation."
)
ADAPTER_CONVENTION = CONVENTION.replace(
    "backward = 2 x forward", "backward = 1 x forward for frozen matrices, 2 x for attention"
)
MEMORY_WORDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "reserved": "CUDA, NCCL",
}
TIME_WORDS = {
    "matrices": "matrix products",
    "attention": "attention",
    "elementwise": "norms, RoPE, SwiGLU",
    "logits": "output layer and loss",
    "recompute": "recomputation",
    "tensor_messages": "tensor messages",
    "pipeline_messages": "pipeline messages",
    "bubble": "pipeline bubble",
    "data_messages": "data-parallel messages",
    "optimizer": "optimizer",
    "other": "launches, stragglers",
}
SHOWN_PROBLEMS = 5


def check_any_fits(result: LayoutSearchResult) -> None:
    """Check that at least one layout fits.

    Raises:
        ConfigError: None does. The message names the layout that comes closest, or the most
            frequent reason why the trainer refuses layouts.
    """
    if result.fitting:
        return
    request = result.request
    if not result.too_large:
        (reason, count), *_ = result.refused.most_common(1)
        what = (
            f"no layout on {request.gpus} GPUs passes the trainer's checks "
            f"({reason}: {count} times)"
        )
        raise ConfigError(
            "--gpus", what, "Use a different number of GPUs or a different global batch size"
        )
    smallest = min(result.too_large, key=lambda plan: plan.memory.total)
    what = (
        f"no layout fits on {request.gpus} x {request.gpu.name}: the smallest, "
        f"{describe_layout(smallest.config)}, needs {_gib(smallest.memory.total)} of "
        f"{request.gpu.memory_gib:.1f} GiB ({_largest(smallest.memory)})"
    )
    raise ConfigError("--gpus", what, "Use more GPUs, or GPUs with more memory")


def as_text(result: LayoutSearchResult, top: int, every: bool) -> str:
    """The result as tables.

    Args:
        result: A result with at least one layout that fits.
        top: The number of rows in the ranking.
        every: Rank all layouts, not only the best one of each TP x PP.
    """
    request, best = result.request, result.fitting[0]
    shown = (result.fitting if every else best_of_each(result.fitting))[:top]
    sections = [
        _heading(request),
        _table(["", *_COLUMNS], [_row(str(n), plan) for n, plan in enumerate(shown, start=1)]),
        _details(best),
        _too_large(result),
        _refused(result),
    ]
    if result.own is not None:
        sections.insert(2, _own(result.own))
    return "\n\n".join(section for section in sections if section)


def as_json(result: LayoutSearchResult, top: int) -> dict[str, Any]:
    """The result for scripts, with sizes in GiB and times in seconds."""
    request = result.request
    return {
        "gpu": request.gpu.name,
        "gpus": request.gpus,
        "vocab_size": request.vocab_size,
        "tokens": request.tokens,
        "parameters": round(request.parameters.total),
        "trained_parameters": round(request.parameters.trained),
        "flops_convention": ADAPTER_CONVENTION if request.config.adapter.rank else CONVENTION,
        "plans": [_plan_json(plan) for plan in result.fitting[:top]],
        "own_layout": None if result.own is None else _plan_json(result.own),
        "do_not_fit": [_plan_json(plan) for plan in result.too_large[:top]],
        "refused": dict(result.refused.most_common()),
    }


def _plan_json(plan: LayoutPlan) -> dict[str, Any]:
    parallel = plan.config.parallel
    memory = {name: round(size / GIB, 3) for name, size in vars(plan.memory).items()}
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "data_parallel_size": plan.data_size,
        "micro_batch_size": plan.config.training.micro_batch_size,
        "recompute_granularity": parallel.recompute_granularity,
        "fits": plan.fits,
        "tokens_per_second_per_gpu": round(plan.speed, 1),
        "tflops": round(plan.tflops, 1),
        "mfu": round(plan.mfu, 4),
        "days": round(plan.days, 2),
        "gpu_hours": round(plan.gpu_hours),
        "memory_gib": {**memory, "total": round(plan.memory.total / GIB, 3)},
        "step_seconds": {
            **{name: round(seconds, 5) for name, seconds in vars(plan.step).items()},
            "total": round(plan.step.total, 5),
        },
        "overrides": plan.overrides(),
    }


_COLUMNS = (
    *("TP", "PP", "VPP", "DP", "micro", "recompute", "tokens/s/GPU", "TFLOP/s", "MFU"),
    *("GiB", "bubble", "messages", "days", "GPU-hours"),
)


def _heading(request: PlanRequest) -> str:
    training, fp8 = request.config.training, request.config.fp8
    precision = f"FP8 ({fp8.recipe})" if uses_fp8(request.config) else training.dtype
    batch, length = training.global_batch_size, request.config.model.seq_length
    convention = ADAPTER_CONVENTION if request.config.adapter.rank else CONVENTION
    return (
        f"{_describe_parameters(request)}\n"
        f"{request.gpus} x {request.gpu.name} ({request.gpu.memory_gib:.1f} GiB), {precision}, "
        f"global batch {batch:,} x {length:,}, {format_count(request.tokens)} tokens in all\n"
        f"{convention}\n"
        "All figures are predictions without failures and restarts. docs/parallelism.md compares "
        "such predictions with published runs."
    )


def _describe_parameters(request: PlanRequest) -> str:
    """How large the model is, and how much of it is trained."""
    counts, adapter = request.parameters, request.config.adapter
    text = f"{counts.model:,.0f} parameters"
    if adapter.rank:
        kind = "DoRA" if adapter.dora else "LoRA"
        text += f", frozen{' in nf4' if counts.quantized else ''}, and {counts.adapters:,.0f} of "
        text += f"an adapter ({kind}, rank {adapter.rank})"
    elif request.trained is not None:
        text += f", of which {counts.trained:,.0f} have gradients and optimizer state"
    return text


def _row(name: str, plan: LayoutPlan) -> list[str]:
    parallel, step = plan.config.parallel, plan.step
    messages = step.tensor_messages + step.pipeline_messages + step.data_messages
    return [
        name,
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(parallel.virtual_pipeline_model_parallel_size or "-"),
        str(plan.data_size),
        str(plan.config.training.micro_batch_size),
        parallel.recompute_granularity or "-",
        f"{plan.speed:,.0f}",
        f"{plan.tflops:,.0f}",
        f"{plan.mfu:.1%}",
        f"{plan.memory.total / GIB:.1f}",
        f"{step.bubble / step.total:.1%}",
        f"{messages / step.total:.1%}",
        f"{plan.days:,.1f}",
        f"{plan.gpu_hours:,.0f}",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join(lines)


def _own(plan: LayoutPlan) -> str:
    verdict = "fits" if plan.fits else f"does not fit {plan.request.gpu.memory_gib:.1f} GiB"
    return (
        f"The config's own layout, {describe_layout(plan.config)}: {plan.speed:,.0f} tokens/s/GPU, "
        f"{_gib(plan.memory.total)} GiB, {verdict}"
    )


def _details(plan: LayoutPlan) -> str:
    """Where the memory and time of a plan go, and how to train with it."""
    total, seconds = plan.memory.total, plan.step.total
    memory = [
        [MEMORY_WORDS[name], _gib(size), f"{size / total:.1%}"]
        for name, size in vars(plan.memory).items()
    ]
    time = [
        [TIME_WORDS[name], f"{part:.4f}", f"{part / seconds:.1%}"]
        for name, part in vars(plan.step).items()
    ]
    return (
        f"1: {describe_layout(plan.config)}\n\n"
        f"{_table(['memory', 'GiB', ''], memory)}\n\n"
        f"{_table(['part of a step', 'seconds', ''], [*time, ['total', f'{seconds:.4f}', '']])}\n\n"
        f"chameleon train CONFIG {' '.join(plan.overrides())}"
    )


def _too_large(result: LayoutSearchResult) -> str:
    """Layouts that would be faster but do not fit, with the memory that they need."""
    if not result.too_large:
        return ""
    limit = result.request.gpu.memory_gib
    lines = [
        f"  {plan.speed:,.0f} tokens/s/GPU: {describe_layout(plan.config)} needs "
        f"{_gib(plan.memory.total)} of {limit:.1f} GiB ({_largest(plan.memory)})"
        for plan in best_of_each(result.too_large)[:SHOWN_PROBLEMS]
    ]
    count = len(result.too_large)
    heading = f"{count:,} layouts would be faster but do not fit; the fastest of each TP x PP:"
    return "\n".join([heading, *lines])


def _refused(result: LayoutSearchResult) -> str:
    """Why the trainer refuses layouts, the most frequent reason first."""
    if not result.refused:
        return ""
    lines = [f"  {count:,} x {reason}" for reason, count in result.refused.most_common()]
    total = sum(result.refused.values())
    return "\n".join([f"The trainer refuses {total:,} layouts:", *lines[:SHOWN_PROBLEMS]])


def _largest(memory: MemoryEstimate) -> str:
    parts = largest_parts(memory)
    return ", ".join(f"{MEMORY_WORDS[name]} {_gib(size)}" for name, size in parts)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
