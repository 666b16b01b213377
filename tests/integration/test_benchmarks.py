"""The benchmarks run and print their tables; what they measure is not looked at here."""

import subprocess
import sys
from pathlib import Path

import pytest
from run_command import TIMEOUT_SECONDS, environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("loss.py", ["256 tokens x 64 fp32"]),
        ("monitor.py", ["attention logits", "together"]),
        ("plan.py", ["Llama-2 70B FP8", "held out: "]),
        ("loader.py", ["ours, the recipe's mixture", "GPTDataset, text alone"]),
        ("preprocess.py", ["MB a CPU second", "gigatoken alone", "memory: "]),
        ("save.py", ["a step while a checkpoint is written", "for a synchronous save"]),
        ("train_step.py", ["fp32: losses of 3 steps agree", "bf16-weights"]),
        ("watchdogs.py", ["hang watch", "together", "checked before over unchecked"]),
    ],
)
def test_a_benchmark_runs(script: str, words: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", BENCHMARKS / script, "--quick"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr
    for word in words:
        assert word in result.stdout


def test_every_benchmark_is_in_the_readme() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in BENCHMARKS.glob("*.py") if path.name not in text] == []
