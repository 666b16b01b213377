"""Values that are not finite are found before the update on any rank, and handled as configured.

All runs are forked from one process, which imports the libraries once. The losses of two layouts
differ in their last bits, so a run is compared with one of its own layout.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_chameleon.checkpoint.convert.run import convert
from places import PROGRAMS
from run_command import TIMEOUT_SECONDS, environment

FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
BASE = {
    "training.steps": 4,
    "training.hang_seconds": 15,  # no save, resume, rollback or repeated pass may exceed it
    "checkpoint.every_steps": 2,
    "model.num_layers": 2,
}
SKIP = {"training.nonfinite": "skip"}
# The checkpoint may still be being written when the run goes back to it.
ROLLBACK = {"training.nonfinite": "rollback", "checkpoint.async_save": True}
TOLD = {"training.skip_steps": [3]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "distributed": {"training.dtype": "bf16", "parallel.use_distributed_optimizer": True},
    "tensor": {"parallel.tensor_model_parallel_size": 2},
    "interleaved": {
        "parallel.pipeline_model_parallel_size": 2,
        "parallel.virtual_pipeline_model_parallel_size": 2,
        "model.num_layers": 4,
    },
    "zero0": {"engine.name": "deepspeed", "engine.zero_stage": 0},
    "zero1": {"engine.name": "deepspeed", "engine.zero_stage": 1},
    "zero2": {"engine.name": "deepspeed", "engine.zero_stage": 2, "training.dtype": "bf16"},
    "zero3": {"engine.name": "deepspeed", "engine.zero_stage": 3},
}


def fault(kind: str, step: int = 3, **more: Any) -> dict[str, Any]:
    """A fault on rank 1. With ``once`` it does not come again when the step is replayed."""
    return {"kind": kind, "step": step, "rank": 1, "parameter": FC2, **more}


NAN, NAN_ONCE = fault("gradient"), fault("gradient", once=True)


@dataclass(frozen=True)
class Runs:
    folder: Path

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def lines(self, run: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        text = (self.folder / run / file).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def losses(self, run: str) -> list[float]:
        return [line["loss"] for line in self.lines(run)]

    def state(self, run: str, step: int) -> dict[str, Any]:
        path = self.folder / run / "checkpoints" / f"step_{step:08d}" / "state.json"
        return json.loads(path.read_text())


def jobs() -> list[tuple[str, str, dict[str, Any] | None, dict[str, Any]]]:
    """Name, run folder, fault and settings."""
    found: list[Any] = [
        ("stop", "stop", NAN, {}),
        ("killed", "killed", {**NAN_ONCE, "signal": True}, SKIP),
        ("resumed", "killed", None, SKIP),
        ("again", "killed", fault("gradient", step=5), {**SKIP, "training.steps": 5,
         "training.nonfinite_limit": 1}),
        ("killed-zero3", "killed-zero3", {**NAN_ONCE, "signal": True},
         {**LAYOUTS["zero3"], **SKIP}),
        ("resumed-zero3", "killed-zero3", None, {**LAYOUTS["zero3"], **SKIP}),
        ("told", "told", None, TOLD),
        ("told-zero3", "told-zero3", None, {**LAYOUTS["zero3"], **TOLD}),
        ("broken", "broken", fault("weight"), SKIP),
        ("healed", "healed", fault("weight", once=True), ROLLBACK),
        ("too-early", "too-early", fault("gradient", step=2), ROLLBACK),
        ("first", "first", fault("gradient", step=1),
         {**LAYOUTS["distributed"], **SKIP, "training.steps": 2, "checkpoint.every_steps": 1,
          "optimizer.lr_warmup_steps": 0}),
        ("infinite", "infinite", fault("loss"), {**LAYOUTS["zero1"], **SKIP}),
    ]  # fmt: skip
    for name, setting in LAYOUTS.items():
        kind = "loss" if name == "interleaved" else "gradient"  # rank 1 has no layer 1 of its own
        found.append((f"skip-{name}", f"skip-{name}", fault(kind), {**setting, **SKIP}))
    for name in ("fp32", "distributed", "zero3"):
        run = f"rollback-{name}"
        found.append((run, run, NAN_ONCE, {**LAYOUTS[name], **ROLLBACK}))
    return found


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    output = tmp_path_factory.mktemp("runs")
    entries = [
        {
            "name": name,
            "processes": 2,
            "config": str(tiny.config),
            "fault": planted,
            "set": {**BASE, **settings, "logging.run_dir": str(output / run)},
        }
        for name, run, planted, settings in jobs()
    ]
    (output / "jobs.json").write_text(json.dumps(entries))
    result = subprocess.run(
        [sys.executable, PROGRAMS / "train_with_faults.py", output / "jobs.json", output],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS * 2,
        env=environment(),
    )
    (output / "stdout.txt").write_text(result.stdout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return Runs(output)


def test_stop_names_rank_parameter_and_samples(runs: Runs) -> None:
    result = runs.result("stop")
    assert result["error"] == (
        f"step 3: grad_norm is nan, gradients not finite: {FC2} on rank 1, samples 18, 19, 22, 23 "
        f"(documents in {runs.folder}/stop/nonfinite.jsonl). Resume from the last checkpoint with "
        "a lower optimizer.lr, and look at output_norm and max_logit in metrics.jsonl before this "
        "step."
    )
    _, before, after = result["prints"][-1]
    assert before == after, "the weights were updated before the check"
    assert [line["step"] for line in runs.lines("stop")] == [1, 2]
    (record,) = runs.lines("stop", "nonfinite.jsonl")
    assert (record["step"], record["action"]) == (3, "stop")
    (rank,) = record["ranks"]
    assert (rank["rank"], rank["gradients"]) == (1, {FC2: [0, 1]})
    assert [sample["sample"] for sample in record["samples"]] == [18, 19, 22, 23]
    for sample in record["samples"]:
        assert all(entry["source"].endswith("tokens") for entry in sample["documents"])
        assert sum(entry["tokens"][1] - entry["tokens"][0] for entry in sample["documents"]) <= 64


@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_skip_changes_no_weight_and_no_moment(runs: Runs, layout: str) -> None:
    run = f"skip-{layout}"
    assert runs.result(run)["error"] is None
    changed = [before != after for _, before, after in runs.result(run)["prints"]]
    assert changed == [True, True, False, True]
    lines = runs.lines(run)
    assert [line.get("skipped", False) for line in lines] == [False, False, True, False]
    rates = [line["learning_rate"] for line in lines]
    assert rates[3] < rates[2], "the schedule stood still at the step whose update was left out"
    assert runs.state(run, 4)["skipped_steps"] == [3]
    (record,) = runs.lines(run, "nonfinite.jsonl")
    if layout == "interleaved":  # only the loss is bad; it is set after the gradient's path
        assert lines[2]["loss"] is None
        assert [(rank["rank"], rank["losses"]) for rank in record["ranks"]] == [(1, [0, 1, 2, 3])]
        return
    assert lines[2]["grad_norm"] is None
    assert {rank["rank"] for rank in record["ranks"] if FC2 in rank["gradients"]} == {1}


def test_an_infinite_loss(runs: Runs) -> None:
    assert runs.result("infinite")["error"] is None
    assert [line["loss"] is None for line in runs.lines("infinite")] == [False, False, True, False]
    (record,) = runs.lines("infinite", "nonfinite.jsonl")
    assert [rank["losses"] for rank in record["ranks"]] == [[0, 1]]
    assert [sample["sample"] for sample in record["samples"]] == [18, 19, 22, 23]


@pytest.mark.parametrize(
    ("run", "told"),
    [
        ("skip-fp32", "told"),
        ("killed", "told"),
        ("rollback-fp32", "told"),
        ("healed", "told"),
        ("skip-zero3", "told-zero3"),
        ("killed-zero3", "told-zero3"),
        ("rollback-zero3", "told-zero3"),
    ],
)
def test_like_a_run_that_was_told_to_skip(runs: Runs, run: str, told: str) -> None:
    assert runs.result(told)["finished"]
    assert [line["step"] for line in runs.lines(run)][:4] == [1, 2, 3, 4]
    assert runs.losses(run)[:4] == runs.losses(told)
    last = run.replace("killed", "resumed")  # weights, moments and AdamW's step after the last step
    assert runs.result(last)["prints"][-1] == runs.result(told)["prints"][-1]


@pytest.mark.parametrize("layout", ["fp32", "distributed", "zero3"])
def test_rollback_replays_and_skips(runs: Runs, layout: str) -> None:
    result = runs.result(f"rollback-{layout}")
    assert (result["error"], result["finished"]) == (None, True)
    assert [step for step, _, _ in result["prints"]] == [1, 2, 3, 3, 4]
    lines = runs.lines(f"rollback-{layout}")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line.get("skipped", False) for line in lines] == [False, False, True, False]
    assert runs.state(f"rollback-{layout}", 4)["skipped_steps"] == [3]
    assert runs.losses(f"rollback-{layout}") == runs.losses(f"skip-{layout}")


def test_what_cannot_go_on(runs: Runs) -> None:
    broken, early = runs.result("broken")["error"], runs.result("too-early")["error"]
    assert "loss is nan (first in the output of decoder.layers.1), " in broken
    assert f"weights not finite: {FC2} on rank 1, " in broken
    assert "; leaving out the update cannot repair the weights. Run the same command to" in broken
    assert "; there is no checkpoint to go back to. Start again with training.skip_steps=[2]" in (
        early
    )


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        ("stop", ["start", "save", "error"]),
        ("skip-fp32", ["start", "save", "skip", "save", "finish"]),
        ("rollback-fp32", ["start", "save", "rollback", "skip", "save", "finish"]),
        ("killed", ["start", "save", "skip", "save", "stop", "restart", "resume"]),
    ],
)
def test_each_event_has_a_line(runs: Runs, run: str, wanted: list[str]) -> None:
    # A busy machine makes a rank slow.
    events = [e for e in runs.lines(run, "events.jsonl") if e["event"] != "straggler"]
    assert [event["event"] for event in events][: len(wanted)] == wanted
    if run == "stop":
        assert events[-1]["text"] == runs.result("stop")["error"]


def test_the_limit_counts_the_whole_run(runs: Runs) -> None:
    error = runs.result("again")["error"]
    assert error.startswith("step 5: grad_norm is nan, ")
    assert "; 1 step was left out before (3), and training.nonfinite_limit is 1. " in error
    assert "Resume from a checkpoint before step 3 with a lower optimizer.lr, or raise" in error


def test_the_first_step_leaves_nothing_to_save(runs: Runs) -> None:
    assert runs.result("first")["error"] is None
    saved = [path.name for path in (runs.folder / "first" / "checkpoints").iterdir()]
    assert saved == ["step_00000002"]


def test_conversions_keep_the_skipped_steps(runs: Runs, tmp_path: Path) -> None:
    convert(runs.folder / "skip-fp32", tmp_path / "universal", "deepspeed")
    convert(tmp_path / "universal", tmp_path / "back", "megatron")
    assert json.loads((tmp_path / "back" / "state.json").read_text())["skipped_steps"] == [3]
