"""The page of ``chameleon train --dry-run --html FILE``: what a run would do, before it starts.

It shows what the dry run prints, and the numbers behind it: parameters, memory and time, the
mixture, the steps, and what will be read.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from megatron_chameleon.config.load import format_config
from megatron_chameleon.config.parameters import parameter_counts
from megatron_chameleon.data.views.mixture import mixture_blocks
from megatron_chameleon.masking import mask_secrets
from megatron_chameleon.pages.charts import Chart, Line
from megatron_chameleon.pages.elements import (
    Cell,
    bar,
    cards,
    folded,
    heading,
    how,
    notes,
    preformatted,
    table,
)
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.parallel import platform
from megatron_chameleon.planner.flops import training_flops_per_token
from megatron_chameleon.planner.memory import MemoryEstimate, predict_memory
from megatron_chameleon.planner.report import MEMORY_WORDS
from megatron_chameleon.training.dry_run import (
    PASSED,
    DryRun,
    TriedStep,
    cpu_seconds,
    describe_start,
    machine_notes,
    start_notes,
    steps_done,
)
from megatron_chameleon.training.learning_rate import run_learning_rate
from megatron_chameleon.training.prepare import describe_run
from megatron_chameleon.training.resume_changes import resume_lines
from megatron_chameleon.wording import counted, format_bytes, format_count, format_duration

_MOST_POINTS = 400
"""Of a curve over the steps."""


def dry_run_page(plan: DryRun, tried: TriedStep, origin: Origin) -> str:
    """Write the page.

    Args:
        plan: The run.
        tried: Its next step; with an empty text if it was not tried.
        origin: Which command writes it, and when.
    """
    run_dir, seed = plan.config.logging.run_dir, plan.config.training.seed
    return page(
        f"Dry run of {run_dir}", _body(plan, tried), replace(origin, name=run_dir, seed=seed)
    )


def _body(plan: DryRun, tried: TriedStep) -> Iterator[str]:
    yield notes(_findings(plan, tried))
    yield cards(_numbers(plan, tried))
    yield how(f"{describe_run(plan.inputs)}; {describe_start(plan.inputs)}.")
    yield notes([("\n".join(lines), "")] if (lines := resume_lines(plan.inputs)) else [])
    odd = [(line, "warn") for line in plan.warnings]
    for title, blocks in (
        ("Possible problems", [notes(odd) if odd else how("Nothing.")]),
        ("Layout", [_layout(plan)]),
        ("Parameters", [_parameters(plan)]),
        ("Memory and time", [*_memory(plan, tried), *_time(plan, tried)]),
        ("Mixture", mixture_blocks(plan.inputs.reader)),
        ("What is read", [_files(plan)]),
        ("Steps", [*_steps(plan)]),
        ("Config", [folded("The whole config", _config(plan))]),
    ):
        yield f"<section>{heading(title)}{''.join(blocks)}</section>"


def _findings(plan: DryRun, tried: TriedStep) -> Iterator[tuple[str, str]]:
    yield PASSED, ""
    for line in start_notes(plan.inputs):
        yield line, "warn"
    for line in machine_notes(plan.inputs, plan.world_size):
        yield line, "bad"
    for line in tried.text.splitlines():
        yield line, "bad" if tried.failed else "" if tried.metrics else "warn"


def _numbers(plan: DryRun, tried: TriedStep) -> Iterator[tuple[str, str]]:
    config, size = plan.inputs.config, plan.inputs.tokenizer.vocabulary.size
    yield format_count(parameter_counts(config.model, size).total), "parameters of the model"
    yield f"{config.training.steps:,}", "steps"
    tokens = plan.inputs.reader.history.first_sample(config.training.steps)
    tokens *= config.model.seq_length
    yield format_count(tokens), "tokens in all steps, padding included"
    if config.engine.name == "megatron":
        yield format_bytes(_predicted(plan).total), "memory of a process, predicted"
    if tried.memory:
        most = max(rank.peak_bytes for rank in tried.memory)
        yield format_bytes(most), "memory of a process, measured"
    if tried.metrics:
        yield f"{tried.metrics['step_seconds']:.3g} s", "the step that was tried"


def _layout(plan: DryRun) -> str:
    config = plan.inputs.config
    parallel, training = config.parallel, config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data = plan.world_size // (tp * pp * parallel.context_parallel_size)
    size = plan.inputs.reader.history.batch_size(steps_done(plan.inputs))
    engine = config.engine.name
    if engine == "deepspeed":
        engine = f"{engine}, ZeRO {config.engine.zero_stage}"
    rows: list[tuple[str, object]] = [
        ("processes", f"{plan.world_size:,} ({plan.launch.launcher})"),
        ("engine", engine),
        ("tensor parallel (TP)", tp),
        ("sequence parallel", "on" if parallel.sequence_parallel else "off"),
        ("pipeline parallel (PP)", pp),
        ("context parallel (CP)", parallel.context_parallel_size),
        ("data parallel (DP)", data),
        ("distributed optimizer", "on" if parallel.use_distributed_optimizer else "off"),
        ("recomputation", parallel.recompute_granularity or "none"),
        ("number format", training.dtype if config.fp8.format is None else "FP8 in bf16"),
        ("micro-batch", counted(training.micro_batch_size, "sequence")),
        ("micro-batches of a rank", f"{max(1, size // (training.micro_batch_size * data)):,}"),
    ]
    return table(["what", "value"], rows, "Layout")


def _parameters(plan: DryRun) -> str:
    inputs = plan.inputs
    counts = parameter_counts(inputs.config.model, inputs.tokenizer.vocabulary.size)
    layers = counts.num_layers
    parts = (
        ("input embedding", counts.embeddings),
        ("attention", layers * counts.attention),
        ("feed-forward", layers * counts.feed_forward),
        ("norms", layers * counts.norms + counts.final_norm),
        ("QK-norms", layers * counts.qk_norms),
        ("output layer", counts.embeddings),
    )
    rows = [
        (name, f"{count:,}", Cell("", "n", _share(count / counts.total))) for name, count in parts
    ]
    total = ("all of the model", f"{counts.total:,}", "")
    heads: list[str | Cell] = ["part", Cell("parameters", "n"), Cell("share", "n")]
    return table(heads, [*rows, total], "Parameters") + how(
        f"{counted(layers, 'layer')} of width {inputs.config.model.hidden_size:,}; "
        f"{inputs.tokenizer.vocabulary.size:,} tokens in the vocabulary."
    )


def _share(share: float) -> str:
    return f"{100 * share:.1f}%{bar(share)}"


def _predicted(plan: DryRun) -> MemoryEstimate:
    inputs = plan.inputs
    size, trained = inputs.tokenizer.vocabulary.size, inputs.with_gradient
    found = predict_memory(inputs.config, size, plan.world_size, trained)
    return found if platform.has_gpu() else replace(found, reserved=0.0)


def _memory(plan: DryRun, tried: TriedStep) -> Iterator[str]:
    if plan.inputs.config.engine.name == "megatron":
        memory = _predicted(plan)
        rows = [
            (MEMORY_WORDS[name], format_bytes(size), Cell("", "n", _share(size / memory.total)))
            for name, size in dataclasses.asdict(memory).items()
            if size
        ]
        rows.append(("together", format_bytes(memory.total), Cell("")))
        heads = [Cell("part, of the process that needs most")]
        heads += [Cell("predicted", "n"), Cell("share", "n")]
        yield table(heads, rows, "Predicted memory")
        if not memory.reserved:
            yield how(
                "Without what Python and its libraries take, some hundred MiB, and on a GPU",
                "without CUDA and NCCL, some GiB.",
            )
    else:
        yield how("Memory is predicted for the megatron engine alone.")
    if tried.memory:
        rows = [
            (str(rank.rank), rank.host, Cell(format_bytes(rank.peak_bytes), "n"))
            for rank in tried.memory
        ]
        kind = "of the GPU" if platform.has_gpu() else "of the process, libraries included"
        heads = [Cell("rank"), Cell("host"), Cell(f"measured peak {kind}", "n")]
        yield table(heads, rows, "Measured memory")


def _time(plan: DryRun, tried: TriedStep) -> Iterator[str]:
    inputs, config = plan.inputs, plan.inputs.config
    done, steps = steps_done(inputs), config.training.steps
    samples = inputs.reader.history.batch_size(done)
    size, frozen = inputs.tokenizer.vocabulary.size, config.adapter.rank > 0
    flops = training_flops_per_token(config.model, size, frozen) * config.model.seq_length
    sentences = [
        f"The next step, of {counted(samples, 'sequence')}, is {samples * flops:.3g} operations in "
        "matrix products."
    ]
    if tried.metrics:
        seconds = tried.metrics["step_seconds"]
        left = inputs.reader.history.first_sample(steps) - inputs.reader.history.first_sample(done)
        sentences.append(
            f"It took {seconds:.3g} s here. At that speed the {counted(steps - done, 'step')} to "
            f"come take {format_duration(left / samples * seconds)}; a first step is often slower "
            "than those after it, and checkpoints, held-out loss and samples come on top."
        )
    elif least := cpu_seconds(inputs, plan.world_size):
        sentences.append(
            f"On the CPUs of this machine it would take {format_duration(least)} at least."
        )
    else:
        sentences.append("chameleon plan predicts its time for a type of GPU.")
    yield how(*sentences)


def _files(plan: DryRun) -> str:
    inputs = plan.inputs
    rows: list[tuple[object, ...]] = [
        (source.key, f"stage {source.stage}", *_amounts(source.corpus), source.corpus.prefix)
        for source in inputs.reader.sources
    ]
    if inputs.held_out is not None:
        rows += [
            (held.name, "held out", *_amounts(held.source.corpus), held.source.corpus.prefix)
            for held in inputs.held_out.sources
        ]
    rows.append(("tokenizer", "", "", "", plan.config.tokenizer.path))
    if inputs.beginning != "step 0":
        rows.append(("first weights", "", "", "", str(inputs.beginning)))
    heads: list[str | Cell] = [
        Cell("what", "long"),
        "used",
        Cell("documents", "n"),
        Cell("tokens", "n"),
        Cell("file or folder", "long"),
    ]
    note = "" if inputs.held_out else how("No documents are held out.")
    return table(heads, rows, "What is read") + note


def _amounts(corpus: object) -> tuple[str, str]:
    return f"{corpus.documents:,}", f"{corpus.tokens:,}"  # type: ignore[attr-defined]


def _steps(plan: DryRun) -> Iterator[str]:
    config, history = plan.inputs.config, plan.inputs.reader.history
    training, logging = config.training, config.logging
    rate = run_learning_rate(config, history)
    steps = training.steps

    def every(number: int, otherwise: str) -> str:
        return f"every {counted(number, 'step')}" if number else otherwise

    sizes = sorted({history.batch_size(0), history.batch_size(max(0, steps - 1))})
    rows = [
        ("steps", f"{steps:,}, of which {steps_done(plan.inputs):,} are done"),
        ("sequences of a step", " to ".join(f"{size:,}" for size in sizes)),
        ("tokens of a step", " to ".join(f"{s * config.model.seq_length:,}" for s in sizes)),
        ("learning rate", f"{rate.peak:g}, {rate.style}, down to {rate.lowest:g}"),
        ("warm-up", counted(rate.warmup_steps, "step")),
        ("checkpoints", every(config.checkpoint.every_steps, "only at the end")),
        ("held-out loss", _held_out(plan, every(config.data.validation.every_steps, "at the end"))),
        ("samples", every(logging.sample_every_steps, "never")),
        ("run folder", logging.run_dir),
    ]
    yield table(["what", Cell("value", "long")], rows, "Steps")
    if steps:
        x = np.unique(np.linspace(1, steps, min(steps, _MOST_POINTS)).round())
        rates = np.array([rate.at(int(step)) for step in x])
        charts = [Chart("Learning rate", [Line("", x, rates)])]
        if len(history.batches) > 1:
            batches = np.array([float(history.batch_size(int(step) - 1)) for step in x])
            charts.append(Chart("Sequences of a step", [Line("", x, batches)]))
        yield f'<div class="charts">{"".join(chart.html() for chart in charts)}</div>'


def _held_out(plan: DryRun, text: str) -> str:
    return text if plan.inputs.held_out is not None else "not measured"


def _config(plan: DryRun) -> str:
    return preformatted(mask_secrets(format_config(plan.config)))
