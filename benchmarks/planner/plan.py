"""Compare the planner with published training speeds, run by run.

    python -W ignore -m benchmarks.planner.plan

Each run marked * set one efficiency (``megatron_chameleon/planner/gpus.py``); no other run was
used for that. The last lines compare the planner with the most that one H200 can reach.
"""

import argparse
from dataclasses import replace

from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.names import PRESETS
from megatron_chameleon.planner.gpus import GPUS
from megatron_chameleon.planner.published import (
    PublishedRun,
    median_error,
    read_published_runs,
)
from megatron_chameleon.planner.time import (
    Software,
    predict_step,
    tokens_per_second_per_gpu,
)

MEASURED_BF16_TFLOPS = 790.0
"""What large matrix products reach by themselves on one H200."""
CEILINGS = {None: 16_000, "hybrid": 22_000}
"""Tokens/s that one H200 cannot exceed with the 7B, from its measured matrix products and memory;
the key is ``fp8.format``."""


def print_runs() -> None:
    """Print one row per run, then the median errors and the largest error."""
    runs = read_published_runs()
    header = ("run", "GPUs", "source", "published", "MFU", "predicted", "error")
    rows = [header, *(_row(run) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    held_out = [run for run in runs if not run.calibration]
    print(f"\nmedian error of all {len(runs)}: {median_error(runs):.1%}")
    print(f"median error of the {len(held_out)} held out: {median_error(held_out):.1%}")
    worst = max(held_out, key=lambda run: abs(run.error()))
    print(f"largest: {worst.error():+.1%}, {worst.name} ({worst.note})")


def _row(run: PublishedRun) -> tuple[str, ...]:
    mark = " *" if run.calibration else ""
    precision = " FP8" if run.fp8 else ""
    return (
        f"{run.name}{precision}{mark}",
        f"{run.gpus} {run.gpu}",
        run.source.partition(",")[0],
        f"{run.published_speed:,.0f}",
        f"{run.published_mfu():.1%}",
        f"{run.predicted_speed():,.0f}",
        f"{run.error():+.1%}",
    )


def print_ceilings() -> None:
    """Print predictions for the 7B on one H200: below its ceilings, and near them for products."""
    for fp8, ceiling in CEILINGS.items():
        config = load_config(PRESETS / "chameleon_7b.yaml", [f"fp8.format={fp8 or 'null'}"])
        gpu = GPUS["h200"]
        step = predict_step(config, 65_536, 1, gpu)
        speed = tokens_per_second_per_gpu(config, 1, step.total)
        line = f"7B on one H200, {'FP8' if fp8 else 'bf16'}: predicted {speed:,.0f}"
        if not fp8:
            ideal = replace(gpu, bf16_efficiency=MEASURED_BF16_TFLOPS / gpu.bf16_tflops)
            step = predict_step(config, 65_536, 1, ideal, Software(fused=True))
            best = tokens_per_second_per_gpu(config, 1, step.total - step.other)
            line += f", {best:,.0f} with products at their measured speed, fused, no overhead"
        print(f"{line}; ceiling {ceiling:,} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="has no effect: this takes no time")
    parser.parse_args()
    print_runs()
    print_ceilings()


if __name__ == "__main__":
    main()
