"""Emulated FP8 under tensor, sequence and data parallelism, compared with one process."""

import subprocess
import sys

import pytest

from megatron_chameleon.cli.main import main
from places import PROGRAMS
from run_command import TIMEOUT_SECONDS, environment

SETTINGS = ["fp8.format=hybrid", "fp8.emulate=true", "fp8.amax_history_len=4", "training.steps=6"]


def test_layers_on_two_ranks_equal_layers_on_one() -> None:
    script = PROGRAMS / "fp8_ranks.py"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*start, str(script)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("equal") == 5


LAYOUTS = {
    "tensor-sequence": [
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
    ],
    "pipeline": ["parallel.pipeline_model_parallel_size=2", "parallel.recompute_granularity=full"],
}


@pytest.fixture(scope="module")
def alone(tiny):
    runs = {"fp8-alone": SETTINGS, "fp8-off": ["training.steps=6"]}
    for run, settings in runs.items():
        main(["train", str(tiny.config), f"logging.run_dir={tiny.folder / run}", *settings])
    found, off = (tiny.metrics(run) for run in runs)
    assert off[2]["grad_norm"] != pytest.approx(found[2]["grad_norm"], rel=1e-3)  # FP8 is on
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_on_two_ranks_equals_one_process(tiny, alone, name: str) -> None:
    tiny.train(f"fp8-{name}", *SETTINGS, *LAYOUTS[name], processes=2)
    # A different order of summation sometimes moves a value to the next FP8 number, by up to 12% of
    # the value, and training amplifies that. Measured with TP 2: norms differ by 1e-4 in the first
    # steps, where FP8 itself changes them by 5e-3, and by at most 7e-3 in later steps.
    for key, first, later in (("loss", 1e-5, 5e-4), ("grad_norm", 1e-3, 3e-2)):
        expected = [record[key] for record in alone]
        found = [record[key] for record in tiny.metrics(f"fp8-{name}")]
        assert found[:3] == pytest.approx(expected[:3], rel=first, abs=0), key
        assert found == pytest.approx(expected, rel=later, abs=0), key
