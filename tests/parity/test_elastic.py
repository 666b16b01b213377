"""A run that changes its layout and engine every ten steps, compared with one that does not."""

import json
import subprocess
import sys

import pytest

from places import PROGRAMS
from run_command import environment

# The project promises this for the losses: the order of fp32 sums differs between layouts.
TOLERANCE = 1e-5
CHAIN = PROGRAMS / "run_elastic.py"


def test_losses_are_those_of_a_run_that_never_changes(tiny) -> None:
    command = [sys.executable, CHAIN, tiny.config, tiny.folder / "elastic"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    unbroken, changing = (
        [json.loads(line) for line in (tiny.folder / "elastic" / run / "metrics.jsonl").open()]
        for run in ("unbroken", "changing")
    )
    assert [record["step"] for record in changing] == list(range(1, 51))
    assert changing[-1]["loss"] < 0.8 * changing[0]["loss"], "the run must learn"
    for key in ("loss", "loss_text", "loss_image"):
        expected = [record[key] for record in unbroken]
        assert [record[key] for record in changing] == pytest.approx(expected, rel=TOLERANCE), key
    keys = ("consumed_samples", "learning_rate")
    assert [[r[k] for k in keys] for r in changing] == [[r[k] for k in keys] for r in unbroken]
    said = (tiny.folder / "elastic" / "changing.log").read_text()
    assert "parallel.pipeline_model_parallel_size 1 -> 2" in said, "a resumed run says what changed"
    assert "engine.name megatron -> deepspeed" in said
