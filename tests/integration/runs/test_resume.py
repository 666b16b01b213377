"""A killed run resumes as if nothing had happened, and what looks like a checkpoint is whole."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from run_command import command, environment

LAYOUT = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
SETTINGS = [*LAYOUT, "checkpoint.every_steps=3", "model.hidden_dropout=0.1"]
EXACT = ("step", "loss", "loss_text", "loss_image", "z_loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def unbroken(tiny):
    tiny.train("unbroken", *SETTINGS, processes=2)
    return tiny.metrics("unbroken")


def kill_at_step(tiny, run: str, step: int) -> None:
    """Start the run and SIGKILL all of its processes once the metrics of ``step`` are written."""
    words = ("train", tiny.config, f"logging.run_dir={tiny.folder / run}", *SETTINGS)
    process = subprocess.Popen(
        command(*words, processes=2),
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tiny.folder / run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            break
        time.sleep(0.005)
    _kill_tree(process.pid)
    process.wait()


def _kill_tree(pid: int) -> None:
    """The workers, found by their parent, because torchrun gives each a session of its own."""
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue
            if int(fields[1]) == pid:
                children.append(int(entry.name))
    for victim in (pid, *children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def test_killed_and_resumed_equals_unbroken_bit_for_bit(tiny, unbroken) -> None:
    # At most 12 of the 20 steps: the signal comes a moment after the step that it waits for.
    step = random.SystemRandom().randint(4, 12)
    kill_at_step(tiny, "killed", step)
    before = len(tiny.metrics("killed"))
    assert step <= before < 20, f"killed at {before}, wanted {step}"
    result = tiny.train("killed", *SETTINGS, "--resume", "auto", processes=2)
    saved = before // 3 * 3
    # The save that follows a step may or may not have finished when the signal came.
    starts = [f"starts at step {first}" for first in (saved, saved - 3)]
    assert any(start in result.stdout for start in starts), result.stdout
    found = tiny.metrics("killed")
    assert [[r[key] for key in EXACT] for r in found] == [
        [r[key] for key in EXACT] for r in unbroken
    ]


def test_distributed_optimizer_resumes_exactly_and_at_another_layout(tiny) -> None:
    shared = ["checkpoint.every_steps=10", "checkpoint.keep_last=5"]
    distributed = [*shared, "parallel.use_distributed_optimizer=true"]
    tiny.train("distributed", *distributed, processes=2)
    checkpoint = str(tiny.folder / "distributed" / "checkpoints" / "step_00000010")
    # Each rank writes its own part of the moments, and half of the weights.
    files = {path: path.stat().st_size for path in Path(checkpoint).glob("__*.distcp")}
    of_second = sum(size for path, size in files.items() if path.name.startswith("__1_"))
    assert 0.45 < of_second / sum(files.values()) < 0.55
    tiny.train("same", *distributed, "--resume", checkpoint, processes=2)
    tiny.train("alone-resumed", *distributed, "--resume", checkpoint)
    unbroken = [record["loss"] for record in tiny.metrics("distributed")[10:]]
    assert [record["loss"] for record in tiny.metrics("same")] == unbroken
    alone = [record["loss"] for record in tiny.metrics("alone-resumed")]
    assert alone == pytest.approx(unbroken, rel=1e-5)  # sums in another order, as in tests/parity
    tiny.train("plain", *shared, "training.dtype=bf16", "--resume", checkpoint)
    rounded = [record["loss"] for record in tiny.metrics("plain")]
    # bf16 keeps 8 significant bits
    assert rounded == pytest.approx(unbroken, rel=2e-2)
    assert rounded != alone


def test_interleaved_pipeline_resumes_exactly_and_at_another_layout(tiny) -> None:
    pipeline = ["parallel.pipeline_model_parallel_size=2", "checkpoint.every_steps=10"]
    interleaved = [*pipeline, "parallel.virtual_pipeline_model_parallel_size=2"]
    keep = "checkpoint.keep_last=5"
    tiny.train("interleaved", *interleaved, keep, processes=2)
    checkpoint = str(tiny.folder / "interleaved" / "checkpoints" / "step_00000010")
    tiny.train("interleaved-same", *interleaved, "--resume", checkpoint, processes=2)
    tiny.train("interleaved-alone", "--resume", checkpoint)
    unbroken = [record["loss"] for record in tiny.metrics("interleaved")[10:]]
    assert [record["loss"] for record in tiny.metrics("interleaved-same")] == unbroken
    alone = [record["loss"] for record in tiny.metrics("interleaved-alone")]
    assert alone == pytest.approx(unbroken, rel=1e-5)  # sums in another order, as in tests/parity


def test_only_whole_checkpoints_remain(tiny, unbroken) -> None:
    folder = tiny.folder / "unbroken" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000018", "step_00000020"]
    state = json.loads((folder / "step_00000020" / "state.json").read_text())
    assert (state["step"], state["consumed_samples"]) == (20, 160)


def test_a_finished_run_has_nothing_to_do(tiny, unbroken) -> None:
    before = tiny.metrics("unbroken")
    result = tiny.train("unbroken", *SETTINGS, processes=2)
    assert "starts at step 20" in result.stdout
    assert tiny.metrics("unbroken") == before


def test_never_does_not_overwrite(tiny, unbroken) -> None:
    result = tiny.train("unbroken", "--resume", "never", succeeds=False)
    assert result.returncode == 2
    assert "already holds a run up to step_00000020. Use --resume auto" in result.stderr


def test_another_model_is_refused_with_all_differences(tiny, unbroken) -> None:
    result = tiny.train("unbroken", "model.hidden_size=64", "training.seed=5", succeeds=False)
    assert result.returncode == 2
    assert (
        "model.hidden_size=32 (your config: 64), training.seed=1 (your config: 5)" in result.stderr
    )


def test_values_changed_on_resume_take_effect(tiny) -> None:
    changed = ["training.steps=8", "optimizer.lr=5e-3", "optimizer.weight_decay=0.3"]
    tiny.train("fresh", *changed)
    tiny.train("changed", "training.steps=4")
    data = ["training.global_batch_size=4", "data.stage2=[]"]
    tiny.train("changed", *changed, *data)
    rates = {run: [r["learning_rate"] for r in tiny.metrics(run)] for run in ("fresh", "changed")}
    assert rates["changed"][:4] != rates["fresh"][:4]
    assert rates["changed"][4:] == rates["fresh"][4:]
    assert rates["changed"][4] > 0
    # Batch and mixture too, each from its first sample on.
    consumed = [record["consumed_samples"] for record in tiny.metrics("changed")]
    assert consumed == [8, 16, 24, 32, 36, 40, 44, 48]
    state = tiny.folder / "changed" / "checkpoints" / "step_00000008" / "state.json"
    history = json.loads(state.read_text())["data"]
    assert [entry["first_sample"] for entry in history["entries"]] == [0, 32]


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tiny) -> None:
    settings = ["checkpoint.every_steps=3", "checkpoint.keep_last=5"]
    tiny.train("full", *settings, "training.steps=3")
    # A limit on the file size stands in for a full disk: every write beyond it fails.
    words = ("train", tiny.config, f"logging.run_dir={tiny.folder / 'full'}", *settings)
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "limited", *command(*words)]
    result = subprocess.run(limited, capture_output=True, text=True, env=environment(), timeout=240)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error:") == 1
    assert "step_00000006: could not be saved: " in result.stderr
    assert "Free disk space and start again with --resume auto" in result.stderr
    folder = tiny.folder / "full" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step_00000003"]
    result = tiny.train("full", *settings, "training.steps=6")
    assert "starts at step 3" in result.stdout
