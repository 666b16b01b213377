"""``chameleon train --dry-run``: what a run would do, and its next step, done for real and dropped.

The step reads its batch, and runs forward, backward and update on the layout as it was launched, so
it finds what no check of a config finds: memory that does not suffice, a kernel that is missing, a
loss that is not finite. No file is written, nothing is locked, and nothing is kept.
"""

import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_chameleon.announce import announced
from megatron_chameleon.checkpoint.loading.beginning import describe_beginning
from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.checkpoint.state.resume import load
from megatron_chameleon.config.load import format_config
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError, TrainingError
from megatron_chameleon.model.backend import machine_problems
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.collectives import all_gather, first_message
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import create_topology
from megatron_chameleon.planner.flops import training_flops_per_token
from megatron_chameleon.training.engines.base import build_engine
from megatron_chameleon.training.faults.weights import check_loaded_weights
from megatron_chameleon.training.learning_rate import run_learning_rate
from megatron_chameleon.training.prepare import describe_run
from megatron_chameleon.training.reference.measure import batches_with_reference
from megatron_chameleon.training.resume_changes import resume_lines
from megatron_chameleon.training.run.inputs import RunInputs
from megatron_chameleon.training.run.memory_check import memory_problem
from megatron_chameleon.wording import counted, format_bytes, format_duration

LONGEST_SECONDS = 900.0
"""A step that would take longer on CPUs is not tried."""
CPU_FLOPS = 30e9
"""Of a core, optimistically."""
PASSED = "Dry run passed: config, tokenizer, data and checkpoint are ready."
MOST_RANKS = 8
"""Ranks whose memory is listed one by one."""


@dataclass(frozen=True)
class DryRun:
    """A run that is looked at."""

    inputs: RunInputs
    config: Config
    """As the run would write it."""
    launch: Launch
    world_size: int
    """Number of processes that the config was checked for."""
    warnings: Sequence[str] = ()
    """What is odd about it, a line each."""


def describe_dry_run(plan: DryRun) -> str:
    """The resolved config, what the run would do, and why this machine cannot do it, if so."""
    inputs = plan.inputs
    start = f"{describe_start(inputs)}; {plan.launch.launcher}"
    lines = [
        f"{format_config(plan.config)}\n{describe_run(inputs)}; {start}",
        *start_notes(inputs),
        *resume_lines(inputs),
        PASSED,
        *machine_notes(inputs, plan.world_size),
    ]
    return "\n".join(lines)


def describe_start(inputs: RunInputs) -> str:
    """Where the run starts, in words."""
    if inputs.start.weights and inputs.weights:
        return describe_beginning(inputs.weights, inputs.config)
    return f"resumes from {inputs.checkpoint}" if inputs.checkpoint else "starts from step 0"


def start_notes(inputs: RunInputs) -> list[str]:
    """What is unusual about the start, if anything."""
    note = inputs.start.note
    return [f"{note[0].upper()}{note[1:]}."] if note else []


def machine_notes(inputs: RunInputs, world_size: int) -> list[str]:
    """Why this machine cannot run it, a line each.

    A login node may lack what the config needs; that does not make the config wrong.
    """
    return [
        f"But this machine cannot run it: {problem.where}: {problem.what}."
        for problem in _machine_problems(inputs, world_size)
    ]


@dataclass(frozen=True)
class RankMemory:
    """The memory that one process has used at most."""

    rank: int
    host: str
    peak_bytes: int


@dataclass(frozen=True)
class TriedStep:
    """What trying a step has found."""

    text: str
    """In words, or why the step was not tried; empty if that was said already."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Of the engine; empty if the step was not tried."""
    memory: Sequence[RankMemory] = ()
    failed: bool = False
    """Whether the text is an error."""


def try_step(inputs: RunInputs, launch: Launch, world_size: int) -> TriedStep:
    """Do the step that comes next, and drop it. Every process of the job calls it.

    Args:
        inputs: From ``prepare_run``.
        launch: From ``find_launch``.
        world_size: Number of processes that the config was checked for.

    Returns:
        What was found, on every rank.

    Raises:
        TrainingError: The loss or the gradient of the step is not finite.
        ChameleonError: As in a run: the checkpoint cannot be read, or the processes do not meet.
    """
    obstacle = _find_obstacle(inputs, launch, world_size)
    if obstacle is not None and launch.launcher == "alone":
        return _not_tried(obstacle)
    prepare_megatron()
    join_process_group(launch)
    try:
        obstacle = first_message(None if obstacle is None else f": {obstacle}")
        if obstacle is not None:  # of any rank
            return _not_tried(obstacle[2:])
        return _try_step(inputs)
    finally:
        leave_process_group()


def _not_tried(obstacle: str) -> TriedStep:
    return TriedStep(f"Its next step was not tried: {obstacle}." if obstacle else "")


def _machine_problems(inputs: RunInputs, world_size: int) -> list[ConfigError]:
    problems = machine_problems(inputs.config)
    vocab_size, trained = inputs.tokenizer.vocabulary.size, inputs.with_gradient
    if lack := memory_problem(inputs.config, vocab_size, world_size, trained):
        problems.append(lack)
    return problems


def _find_obstacle(inputs: RunInputs, launch: Launch, world_size: int) -> str | None:
    """Why this process cannot do the step; empty if ``describe_dry_run`` says it."""
    if launch.world_size != world_size:
        return (
            f"the layout needs {world_size} processes, and this is one; the same command under "
            "torchrun or srun tries it"
        )
    if _machine_problems(inputs, world_size):
        return ""
    steps = inputs.config.training.steps
    if steps_done(inputs) >= steps:
        return f"all {counted(steps, 'step')} are done"
    seconds = cpu_seconds(inputs, world_size)
    if seconds > LONGEST_SECONDS:
        return (
            f"it would take about {format_duration(seconds)} or more on the CPUs of this machine; "
            "the same command where the run is to train tries it"
        )
    return None


def steps_done(inputs: RunInputs) -> int:
    """Steps that were done before the one that comes next."""
    if inputs.checkpoint is None:
        return 0
    state = load_state(inputs.checkpoint)
    return 0 if state.get("optimizer") is False else int(state["step"])


def cpu_seconds(inputs: RunInputs, world_size: int) -> float:
    """How long the next step takes at least without GPUs; 0 with them."""
    if platform.has_gpu():
        return 0.0
    config = inputs.config
    samples = inputs.reader.history.batch_size(steps_done(inputs))
    tokens = samples * config.model.seq_length
    vocab_size, frozen = inputs.tokenizer.vocabulary.size, config.adapter.rank > 0
    flops = training_flops_per_token(config.model, vocab_size, frozen) * tokens
    cores = min(world_size, 64) * (os.cpu_count() or 1)  # as many as all nodes could have
    return flops / (CPU_FLOPS * cores)


def _try_step(inputs: RunInputs) -> TriedStep:
    """``try_step`` for a process that has joined its process group."""
    config = inputs.config
    topology = create_topology(config.parallel)
    with announced("building the model"):
        rate = run_learning_rate(config, inputs.reader.history)
        vocabulary = inputs.tokenizer.vocabulary
        image_ids = vocabulary.code_token_ids.tolist()
        engine = build_engine(
            *(config, vocabulary.size, topology, rate, image_ids), weights=inputs.weights
        )
    if inputs.checkpoint is not None:
        with announced(f"loading {inputs.checkpoint}"):
            load(inputs.checkpoint, engine)
        check_loaded_weights(engine.named_parameters(), inputs.checkpoint)
    if inputs.start.weights is not None:
        check_loaded_weights(engine.named_parameters(), inputs.start.weights)
    step = steps_done(inputs) + 1
    if config.training.objective == "dpo":
        batches = batches_with_reference(inputs, engine, topology, step)
    else:
        batches = inputs.reader.batches_for(step, topology.data_rank, topology.data_size)
    count = counted(len(batches), "micro-batch", "es")
    with announced(f"computing step {step}, {count} on each rank (--no-step leaves it out)"):
        metrics = engine.train_step(step, batches, update=step not in inputs.skipped_steps)
    _check_finite(step, metrics)
    memory = all_gather(RankMemory(topology.rank, socket.gethostname(), platform.peak_bytes()))
    text = (
        f"Step {step} was computed and dropped: {_describe_metrics(metrics)}, {count} on each "
        f"rank, {metrics['step_seconds']:.3g} s.\n{_describe_memory(memory)}"
    )
    return TriedStep(text, metrics, memory)


def _check_finite(step: int, metrics: Mapping[str, Any]) -> None:
    """Refuse a step that would end the run, or be left out.

    Raises:
        TrainingError: The loss or the gradient is not finite.
    """
    for name in ("loss", "grad_norm"):
        value = metrics[name]
        if value is not None and not math.isfinite(value):
            remedy = "Check the weights that the run starts from, optimizer.lr and the data"
            raise TrainingError(f"step {step}", f"{name} is {value} in the dry run", remedy)


def _describe_metrics(metrics: Mapping[str, Any]) -> str:
    def number(key: str) -> str:
        value = metrics[key]
        return "-" if value is None else f"{value:.4f}"

    return (
        f"loss {number('loss')} (text {number('loss_text')}, image {number('loss_image')}), grad "
        f"norm {number('grad_norm')}"
    )


def _describe_memory(ranks: list[RankMemory]) -> str:
    kind = "GPU memory" if platform.has_gpu() else "memory of the process"
    total = platform.gpu_memory_bytes()
    of_all = f", of {format_bytes(total)}" if total else ""
    if len(ranks) == 1:
        return f"Peak {kind}: {format_bytes(ranks[0].peak_bytes)}{of_all}."
    if len(ranks) <= MOST_RANKS:
        each = ", ".join(f"rank {r.rank} {format_bytes(r.peak_bytes)}" for r in ranks)
        return f"Peak {kind}: {each}{of_all}."
    low, high = (pick(ranks, key=lambda rank: rank.peak_bytes) for pick in (min, max))
    return (
        f"Peak {kind} of {len(ranks)} ranks: {format_bytes(low.peak_bytes)} (rank {low.rank} on "
        f"{low.host}) to {format_bytes(high.peak_bytes)} (rank {high.rank} on {high.host}){of_all}."
    )
