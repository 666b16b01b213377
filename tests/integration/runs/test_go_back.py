"""A run goes back to an older checkpoint; the same command, auto and a return then go on."""

import json
from pathlib import Path

import pytest

SETTINGS = ("checkpoint.every_steps=2", "checkpoint.keep_last=9", "model.num_layers=2")
CHANGED = ("optimizer.lr=3e-3", "checkpoint.keep_last=1")


@pytest.fixture(scope="module")
def run(tiny) -> Path:
    """A run with the checkpoints 2, 4, ... 12, which writes for TensorBoard too."""
    tiny.train("back", *SETTINGS, "training.steps=12", "logging.tensorboard=true")
    return tiny.folder / "back"


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


def logged(run: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("loss")]
    assert steps == sorted(set(steps))
    return {event.step: event.value for event in events.Scalars("loss")}


def test_going_back_restarting_and_returning(tiny, run: Path) -> None:
    folder, before = run / "checkpoints", tiny.metrics("back")
    branch = folder / "branch_0001"
    words = (*SETTINGS, *CHANGED, "logging.tensorboard=true", "--resume")
    words = (*words, str(folder / "step_00000004"))
    planned = tiny.train("back", *words, "training.steps=6", "--dry-run")
    note = (
        "the run goes back to step_00000004: 4 checkpoints (step_00000006 to step_00000012) and "
        f"the metrics after step 4 are set aside in {branch}; --resume {branch}/step_00000012 "
        "returns to them"
    )
    assert f"\nT{note[1:]}.\n" in planned.stdout
    assert steps(folder) == [2, 4, 6, 8, 10, 12], "a dry run changes nothing"

    result = tiny.train("back", *words, "training.steps=6", processes=2)
    assert note in result.stdout and "starts at step 4" in result.stdout
    assert (steps(folder), steps(branch)) == ([6], [6, 8, 10, 12])
    kept = [json.loads(line) for line in (branch / "metrics.jsonl").read_text().splitlines()]
    assert kept == before

    result = tiny.train("back", *words, "training.steps=8")
    assert "goes on from its newest checkpoint, step_00000006" in result.stdout
    assert "once more" not in result.stdout, "step 4 was pruned"
    assert "starts at step 6" in result.stdout and steps(folder) == [8]
    metrics = tiny.metrics("back")
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert metrics[:4] == before[:4] and metrics[5]["loss"] != before[5]["loss"]
    assert logged(run) == pytest.approx({line["step"]: line["loss"] for line in metrics})

    words = (*SETTINGS, "logging.tensorboard=true", "--resume", str(branch / "step_00000012"))
    result = tiny.train("back", *words, "training.steps=12")
    assert "the run goes back to branch_0001/step_00000012" in result.stdout
    assert tiny.metrics("back") == before
    assert steps(folder) == [6, 8, 10, 12] and steps(folder / "branch_0002") == [8]
    result = tiny.train("back", *words, "training.steps=13")
    assert "starts at step 12" in result.stdout
    metrics = tiny.metrics("back")
    assert logged(run) == pytest.approx({line["step"]: line["loss"] for line in metrics})


def test_a_restart_of_never_goes_on(tiny) -> None:
    words = (*SETTINGS, "--resume", "never")
    tiny.train("never", *words, "training.steps=4")
    result = tiny.train("never", *words, "training.steps=5")
    assert "starts at step 4" in result.stdout
