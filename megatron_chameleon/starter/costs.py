"""What each step of ``run.sh`` will take on this machine, and what a GPU would take."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_chameleon.starter.project import Project
from megatron_chameleon.wording import counted, format_bytes, format_duration

LIBRARIES_BYTES = 700 << 20
"""What a process with PyTorch needs before it begins."""
MEASURE_SHARE = 0.2
"""Measuring the held-out loss, saving and sampling, as a share of the training's steps."""
_TEXT_PER_SECOND = 500_000
"""Characters that the text tokenizer learns from per second."""


@dataclass(frozen=True)
class Cost:
    """Of one step."""

    step: str
    seconds: float
    memory_bytes: float


def costs(project: Project) -> list[str]:
    """A table, and a sentence about GPUs."""
    found = list(_costs(project))
    if not found:
        return _on_gpus(project)
    lines = [_heading()]
    width = max(len(cost.step) for cost in found)
    for cost in found:
        lines.append(
            f"  {cost.step.ljust(width)}  {format_duration(cost.seconds):>7}  "
            f"{format_bytes(cost.memory_bytes):>9}"
        )
    total = sum(cost.seconds for cost in found)
    most = max(cost.memory_bytes for cost in found)
    lines.append(
        f"  {'together'.ljust(width)}  {format_duration(total):>7}  {format_bytes(most):>9}"
    )
    return [*lines, *_on_gpus(project)]


def _heading() -> str:
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load <= cores:
        return "What it takes here, as measured just now"
    return (
        f"What it takes here when nothing else runs, as measured just now; now the load is "
        f"{load:.0f} on {counted(cores, 'core')}, and it takes longer"
    )


def _costs(project: Project) -> Iterator[Cost]:
    speeds, looked, start = project.speeds, project.looked, project.machine.start_seconds
    if speeds.train_step is None or project.model is None:
        return
    base = float(LIBRARIES_BYTES)
    characters = sum(source.characters for source in looked.sources)
    if project.script.data:
        yield Cost("documents", 1 + sum(s.files for s in looked.sources) / 5000, base / 8)
    yield Cost(
        "text_tokenizer", start / 2 + characters / _TEXT_PER_SECOND, base / 3 + 30 * characters
    )
    if project.image is not None and speeds.image_step is not None:
        from megatron_chameleon.starter.writing.image_yaml import vqgan_config
        from megatron_chameleon.tokenizer.image.shape import activation_bytes

        kept = project.image.batch_size * activation_bytes(vqgan_config(project.image))
        decoding = _decode_seconds(project)
        seconds = start + project.image_steps * speeds.image_step + decoding
        yield Cost("image_tokenizer", seconds, base + kept)
    pictures = sum(source.pictures for source in looked.sources)
    encoding = pictures * (speeds.image_code or 0.0) + _decode_seconds(project)
    processes = len(looked.sources)
    workers = project.script.workers
    seconds = processes * 1.5 * start + (encoding + characters / 2e6) / workers
    yield Cost("tokens", seconds, base * (workers + 1))
    yield Cost(
        "train",
        start + project.length.steps * speeds.train_step * (1 + MEASURE_SHARE),
        _memory(project),
    )
    if project.script.has_held_out:
        yield Cost("measure", 2 * start, base)
    yield Cost("export", 2 * start, base)
    if project.script.prompts:
        yield Cost("generate", len(project.script.prompts) * 1.5 * start, base)
    yield Cost("report", start / 2, base / 4)


def _decode_seconds(project: Project) -> float:
    opened = sum(len(source.tally.sizes) for source in project.looked.sources)
    pictures = sum(source.pictures for source in project.looked.sources)
    return project.looked.seconds * pictures / opened if opened else 0.0


def _memory(project: Project) -> float:
    from megatron_chameleon.config.schema import Config, TrainingConfig
    from megatron_chameleon.planner.memory import GIB, RESERVED_GIB, predict_memory

    assert project.model is not None
    training = TrainingConfig(
        micro_batch_size=project.length.micro_batch, global_batch_size=project.length.global_batch
    )
    config = Config(model=project.model, training=training)
    found = predict_memory(config, project.vocabulary.size, 1)
    return max(found.total - RESERVED_GIB * GIB, 0) + LIBRARIES_BYTES


def _on_gpus(project: Project) -> list[str]:
    from megatron_chameleon.config.schema import Config, TrainingConfig
    from megatron_chameleon.planner.gpus import GPUS
    from megatron_chameleon.planner.memory import GIB, predict_memory
    from megatron_chameleon.planner.search import describe_layout
    from megatron_chameleon.planner.time import predict_step

    if project.plan is not None:
        plan = project.plan
        days = plan.step.total * project.length.steps / 86_400
        return [
            f"What the training takes on {plan.request.gpus} x {plan.request.gpu.name.upper()}, as "
            "`chameleon plan` predicts",
            f"  {describe_layout(plan.config)}: {days:,.1f} days, "
            f"{plan.memory.total / GIB:.1f} GiB on each GPU; this was not measured",
        ]
    if project.model is None:
        return []
    training = TrainingConfig(
        micro_batch_size=project.length.micro_batch,
        global_batch_size=project.length.global_batch,
        dtype="bf16",
    )
    config = Config(model=project.model, training=training)
    words = []
    for name in ("a100", "h100"):
        step = predict_step(config, project.vocabulary.size, 1, GPUS[name]).total
        seconds = project.length.steps * step
        time = f"about {format_duration(seconds)}" if seconds > 60 else "less than a minute"
        words.append(f"{time} on one {name.upper()}")
    memory = predict_memory(config, project.vocabulary.size, 1).total / GIB
    return [
        f"  On a GPU the training would take {' or '.join(words)} with {memory:.1f} GiB, as "
        "`chameleon plan` predicts; this was not measured."
    ]
