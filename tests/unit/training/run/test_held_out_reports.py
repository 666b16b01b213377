"""What a run says when held-out loss turns, before and after a restart."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_chameleon.checkpoint.state.folders import STATE_FILE, step_folder
from megatron_chameleon.cli.logs import shown_logs
from megatron_chameleon.config.schema import Config, SourceConfig, ValidationSourceConfig
from megatron_chameleon.training.metrics.stragglers import StepClock
from megatron_chameleon.training.records.events import EventLog
from megatron_chameleon.training.run.reporter import Reporter

MAIN_RANK: Any = SimpleNamespace(rank=0, world_size=1)
HELD_OUT = {2: 3.0, 4: 2.5, 6: 2.52, 8: 2.7, 10: 2.9, 12: 3.1}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.data.stage1 = [SourceConfig("trained")]
    config.data.validation.sources = [ValidationSourceConfig("held", name="a/b")]
    config.data.validation.every_steps = 2
    config.training.steps = 12
    config.logging.run_dir = str(tmp_path / "run")
    return config


def report(config: Config, first: int, last: int, capsys: Any) -> list[str]:
    """The lines that a run prints for its steps after ``first`` up to ``last``."""
    capsys.readouterr()
    with shown_logs():
        reporter = Reporter(config, 512, MAIN_RANK, first, EventLog(config, 0))
        for step in range(first + 1, last + 1):
            values = dict.fromkeys(("loss_text", "loss_image", "grad_norm", "learning_rate"), 1.0)
            values |= {"step": step, "loss": 3 - step / 10, "output_norm": 1, "step_seconds": 0.5}
            metrics: dict[str, Any] = reporter.complete(values, StepClock())
            if step in HELD_OUT:
                metrics |= {f"validation/loss{kind}": None for kind in ("_text", "_image")}
                metrics |= {"validation/loss": HELD_OUT[step], "validation/perplexity": 12345.6}
                metrics |= {"validation/a/b/loss": 1.25, "validation/a/b/loss_text": 1.0}
            reporter.end_step(step, metrics)
            assert reporter.failure is None
        reporter.close()
    return capsys.readouterr().out.splitlines()


def test_each_measurement_is_a_line(config: Config, capsys: Any) -> None:
    lines = [line for line in report(config, 0, 4, capsys) if "held-out" in line]
    assert lines == [
        f"step {step}: held-out loss {HELD_OUT[step]:.4f} (text -, image -), perplexity 1.235e+04; "
        "a/b 1.2500"
        for step in (2, 4)
    ]


@pytest.mark.parametrize("restarts", [[], [5], [7], [8], [3, 7, 9]])
def test_the_turn_is_told_once_with_the_nearest_checkpoint(
    config: Config, capsys: Any, restarts: list[int]
) -> None:
    for step in (2, 5, 9):
        folder = Path(config.logging.run_dir) / "checkpoints" / step_folder(step)
        folder.mkdir(parents=True)
        (folder / STATE_FILE).write_text("{}")
    borders = [0, *restarts, 12]
    lines = [
        line
        for first, last in itertools.pairwise(borders)
        for line in report(config, first, last, capsys)
        if "has risen" in line
    ]
    (line,) = lines
    assert line.startswith(
        "warning: step 8: held-out loss has risen from 2.5000 at step 4, its lowest, to 2.7000, "
        "while training loss fell from 2.6500 to 2.2500: "
    )
    (event,) = map(json.loads, (Path(config.logging.run_dir) / "events.jsonl").open())
    assert (event["event"], event["step"], event["lowest_step"]) == ("validation_rises", 8, 4)
    assert event["text"] == line.removeprefix("warning: ")
    assert f"nearest to step 4 is {config.logging.run_dir}/checkpoints/step_00000005 (" in line


def test_no_checkpoint_yet(config: Config, capsys: Any) -> None:
    (line,) = [line for line in report(config, 0, 12, capsys) if "has risen" in line]
    assert "no checkpoint of the run exists yet (docs/validation.md)" in line
