"""The planner beside published training speeds, row by row.

    python -W ignore -m benchmarks.planner.plan

Rows marked * set one efficiency each (``megatron_chameleon/planner/gpus.py``); no other row was
used. The last lines compare with what one H200 can reach at most.
"""

import argparse
from dataclasses import replace

from megatron_chameleon.config.load import PRESETS, load_config
from megatron_chameleon.planner.gpus import GPUS
from megatron_chameleon.planner.published import PUBLISHED, PublishedRun, median_error
from megatron_chameleon.planner.time import (
    Software,
    predict_step,
    tokens_per_second_per_gpu,
)

MEASURED_BF16_TFLOPS = 790.0
"""Of large matrix products alone, on one H200."""
CEILINGS = {None: 16_000, "hybrid": 22_000}
"""Tokens/s that one H200 cannot pass with the 7B, by its measured products and memory."""


def print_rows() -> None:
    header = ("run", "GPUs", "source", "published", "MFU", "predicted", "error")
    rows = [header, *(_row(row) for row in PUBLISHED)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    held_out = [row for row in PUBLISHED if not row.calibration]
    print(f"\nmedian error of all {len(PUBLISHED)}: {median_error(PUBLISHED):.1%}")
    print(f"median error of the {len(held_out)} held out: {median_error(held_out):.1%}")
    worst = max(held_out, key=lambda row: abs(row.error()))
    print(f"largest: {worst.error():+.1%}, {worst.name} ({worst.note})")


def _row(row: PublishedRun) -> tuple[str, ...]:
    mark = " *" if row.calibration else ""
    precision = " FP8" if row.fp8 else ""
    return (
        f"{row.name}{precision}{mark}",
        f"{row.gpus} {row.gpu}",
        row.source.partition(",")[0],
        f"{row.tokens_per_second_per_gpu:,.0f}",
        f"{row.mfu():.1%}",
        f"{row.predict():,.0f}",
        f"{row.error():+.1%}",
    )


def print_ceilings() -> None:
    """Predictions for the 7B on one H200 must lie under its ceilings, products alone near them."""
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
    parser.add_argument("--quick", action="store_true", help="the same: it takes no time")
    parser.parse_args()
    print_rows()
    print_ceilings()


if __name__ == "__main__":
    main()
