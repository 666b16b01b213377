"""Runs that are killed at random moments: ``kill_training.py`` with few kills."""

import subprocess
import sys

import pytest

from places import PROGRAMS
from run_command import environment

SCRIPT = PROGRAMS / "kills" / "kill_training.py"


@pytest.mark.parametrize(
    "words", [("--processes", "2"), ("--async-save",)], ids=["synchronous", "asynchronous"]
)
def test_a_killed_run_ends_like_the_unbroken_one(words: tuple[str, ...]) -> None:
    command = [sys.executable, SCRIPT, "--kills", "4", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "every run ended with the unbroken one's losses" in result.stdout
