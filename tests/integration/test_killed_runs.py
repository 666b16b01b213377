"""Runs that are killed at random moments; ``kill_training.py`` with a few kills."""

import subprocess
import sys
from pathlib import Path

import pytest
from run_command import environment

TESTS = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("kill_training.py")


@pytest.mark.parametrize(
    "words", [("--processes", "2"), ("--async-save",)], ids=["synchronous", "asynchronous"]
)
def test_a_killed_run_ends_as_the_unbroken_one(words: tuple[str, ...]) -> None:
    command = [sys.executable, SCRIPT, "--kills", "4", *words]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment(PYTHONPATH=str(TESTS))
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "every run ended with the unbroken one's losses" in result.stdout
