"""A NaN on one rank stops all ranks with its place, and does not get into a checkpoint."""

import math
import subprocess
import sys

from places import PROGRAMS
from run_command import TIMEOUT_SECONDS, environment

SCRIPT = PROGRAMS / "train_with_nan.py"


def test_a_nan_in_a_weight_of_one_rank(tiny) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    overrides = ["parallel.tensor_model_parallel_size=2", "checkpoint.every_steps=1"]
    run_dir = tiny.folder / "nan"
    result = subprocess.run(
        [sys.executable, *torchrun, SCRIPT, tiny.config, f"logging.run_dir={run_dir}", *overrides],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,  # a hang would last gloo's 30 minutes
        env=environment(),
    )
    assert result.returncode == 1  # torchrun's own code for workers that failed
    assert "exitcode  : 2" in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(
        "error: step 3: loss is nan (first in the output of decoder.layers.1), loss not finite on "
        "ranks 0, 1, weights not finite: decoder.layers.1.mlp.linear_fc2.weight on rank 1, "
        "gradients not finite: "
    )
    assert line.endswith(
        f"(documents in {run_dir}/nonfinite.jsonl). Resume from the last checkpoint with a lower "
        "optimizer.lr, and look at output_norm and max_logit in metrics.jsonl before this step."
    )
    assert len(line) < 900
    # Only the steps before were written.
    assert [record["step"] for record in tiny.metrics("nan")] == [1, 2]
    assert all(math.isfinite(record["loss"]) for record in tiny.metrics("nan"))
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == ["step_00000001", "step_00000002"]
