"""Train two runs of 50 steps; one of them changes its layout and engine every ten steps.

python tests/support/programs/run_elastic.py CONFIG FOLDER
"""

import sys
from pathlib import Path

import forked_command

TENSOR = "parallel.tensor_model_parallel_size=2"
PIPELINE = "parallel.pipeline_model_parallel_size=2"
LAYOUTS = (
    (2, [TENSOR, "parallel.sequence_parallel=true"]),
    (2, [PIPELINE, "training.micro_batch_size=1"]),
    (2, ["training.micro_batch_size=4"]),
    (4, [TENSOR, PIPELINE]),
    (2, ["engine.name=deepspeed", "engine.zero_stage=1"]),
)


def main() -> None:
    config, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir()
    # Runs stop early by their number of steps, not by a signal. So learning rate and stage 1 must
    # not depend on that number.
    # With twice the rate the loss moves fast enough to make 2e-5 of the rounding of fp32 sums.
    shared = [
        "optimizer.lr=0.005",
        "optimizer.lr_decay_style=constant",
        "data.stage1_tokens=15360",
    ]

    def train(run: str, steps: int, processes: int, overrides: list[str]) -> None:
        run_dir = f"logging.run_dir={folder / run}"
        words = ["train", config, run_dir, f"training.steps={steps}", *shared, *overrides]
        forked_command.run(words, folder / f"{run}.log", processes)

    train("unbroken", 50, 1, [])
    for number, (processes, overrides) in enumerate(LAYOUTS, start=1):
        train("changing", 10 * number, processes, overrides)


if __name__ == "__main__":
    main()
