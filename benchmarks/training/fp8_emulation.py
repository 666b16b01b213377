"""The effect of an FP8 recipe on the loss: a short run in bf16 and with each scaling, emulated.

    python -m benchmarks.training.fp8_emulation examples/digits/train.yaml --steps 200

The script prints the mean loss of the last steps, its ratio to that of bf16, and the seconds per
step. It needs no GPU. If there is one, the emulation runs on it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = {
    "bf16": ["fp8.format=null"],
    "delayed": ["fp8.format=hybrid", "fp8.emulate=true", "fp8.recipe=delayed"],
    "tensorwise": ["fp8.format=hybrid", "fp8.emulate=true", "fp8.recipe=tensorwise"],
}
LIMIT = 0.02
"""Largest relative difference of the final loss from that of bf16."""


def train(config: str, overrides: list[str], folder: Path) -> list[dict]:
    """Run ``chameleon train`` and read its metrics."""
    words = [sys.executable, "-m", "megatron_chameleon", "train", config, *overrides]
    subprocess.run([*words, f"logging.run_dir={folder}"], check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", metavar="CONFIG", help="a config of chameleon train")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--last",
        type=int,
        default=10,
        help="number of last steps over which the final loss is averaged",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", dest="values")
    args = parser.parse_args()
    common = [f"training.steps={args.steps}", "training.dtype=bf16", *args.values]
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in RUNS.items():
            records = train(args.config, [*common, *overrides], Path(folder) / name)
            losses[name] = statistics.fmean(record["loss"] for record in records[-args.last :])
            seconds = statistics.median(record["step_seconds"] for record in records)
            ratio = losses[name] / losses["bf16"]
            start = records[0]["loss"]
            print(
                f"{name:10}  loss {start:.4f} -> {losses[name]:.4f}  x bf16 {ratio:.4f}  "
                f"{seconds:.3f} s per step",
                flush=True,
            )
    worst = max(abs(loss / losses["bf16"] - 1) for loss in losses.values())
    print(f"largest difference from bf16: {worst:.2%}, limit {LIMIT:.0%}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
