"""The benchmarks run and print their tables; what they measure is not looked at here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from places import REPOSITORY
from run_command import TIMEOUT_SECONDS, environment

BENCHMARKS = REPOSITORY / "benchmarks"
GPU = (
    "ceilings",
    "parity",
    "loss",
    "norm_rope",
    "train",
    "fusions",
    "whole7b",
    "shard34b",
    "generation",
    "images",
)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("training.loss", ["256 tokens x 64 fp32"]),
        ("training.monitor", ["attention logits", "together"]),
        ("planner.plan", ["Llama-2 70B FP8", "held out: "]),
        ("data.loader", ["ours, isolated", "ours, dense mask", "GPTDataset, text alone"]),
        ("data.preprocess", ["MB per CPU second", "gigatoken alone", "memory: "]),
        ("checkpoint.save", ["a step while a checkpoint is written", "for a synchronous save"]),
        ("training.train_step", ["fp32: losses of 3 steps agree", "bf16-weights"]),
        ("training.train_step --isolated", ["isolated by a dense mask", "document by document"]),
        ("serve", ["its batching", "image          3", "one by one takes", "6 requests at random"]),
        ("training.watchdogs", ["hang watch", "together", "checked before over unchecked"]),
    ],
)
def test_a_benchmark_runs(script: str, words: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *f"benchmarks.{script}".split(), "--quick"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(),
        cwd=REPOSITORY,
    )
    assert result.returncode == 0, result.stderr
    for word in words:
        assert word in result.stdout


def run_gpu(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.run", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(),
        cwd=REPOSITORY,
    )


def test_the_gpu_benchmark_runs_dry(tmp_path: Path) -> None:
    result = run_gpu("--device", "cpu", "--tiny", "--output", tmp_path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    states = {part: {row["state"] for row in found["rows"] if row["part"] == part} for part in GPU}
    for part, state in states.items():
        assert "ok" in state, part
        # a line through two noisy times may be left out; nothing else
        assert state <= {"ok", "needs a GPU", "left out"}, part
    rows = {row["name"]: row for row in found["rows"]}
    # FP8 is never replaced by something that this machine has
    fp8 = [row for name, row in rows.items() if "fp8" in name.lower()]
    assert len(fp8) > 10 and {row["state"] for row in fp8} == {"needs a GPU"}
    assert rows["layer, bf16"]["figures"]["output rms"] > 0
    curve = rows["50 training steps, bf16"]["figures"]
    assert 0 < curve["difference"] < curve["tolerance"] and curve["end"] < curve["first loss"] - 0.5
    tables = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "## shard34b" in tables and "**needs a GPU**" in tables


def test_the_gpu_benchmark_keeps_the_rows_of_a_part_that_runs_out_of_time(tmp_path: Path) -> None:
    words = ("--device", "cpu", "--tiny", "--only", "images", "--output", tmp_path)
    result = run_gpu(*words, "--seconds", 0.05)
    assert result.returncode == 1
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    ended = {row["part"] for row in rows if row["state"] == "out of time"}
    assert ended == {"ceilings", "images"}  # one that ends does not keep the next from running
    again = run_gpu(*words)
    assert again.returncode == 2
    assert "has the rows of another run. Name another folder." in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "trains"], "--only: no part is called trains. Choose from ceilings, parity"),
        (["--device", "cpu"], "--device: on a CPU the real sizes take days. Add --tiny."),
        (["--seconds", "0"], "--seconds: 0 is not above 0."),
    ],
)
def test_the_gpu_benchmark_refuses(words: list[str], message: str, tmp_path: Path) -> None:
    result = run_gpu("--output", tmp_path, *words)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_every_benchmark_is_in_the_readme() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    scripts = [p for p in BENCHMARKS.rglob("*.py") if '"__main__"' in p.read_text(encoding="utf-8")]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in scripts]
    assert len(names) > 10 and [name for name in names if name not in text] == []
