"""`chameleon serve` under many clients at once, some of them slow and some leaving in the middle.

Two minutes of 200 clients are for a machine that does nothing else:
`python -m benchmarks.serving.load`.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from places import REPOSITORY
from run_command import TIMEOUT_SECONDS, environment
from tiny_model import (
    PADDED_VOCAB_SIZE,
    model_config,
    random_tensors,
    write_checkpoint,
    write_tokenizer,
)


def test_every_answer_under_load_is_the_answer_alone(tmp_path: Path) -> None:
    config = replace(model_config(), seq_length=128)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    tensors = random_tensors(config, PADDED_VOCAB_SIZE)
    model = write_checkpoint(tmp_path / "model", config, tensors, tokenizer)
    file = tmp_path / "load.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.serving.load", str(model)]
    result = subprocess.run(
        [*command, "--clients", "20", "--seconds", "4", "--queue", "3", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(),
        cwd=REPOSITORY,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(file.read_text())
    assert found["faults"] == 0 and set(found["answers compared"]) == {"plain", "slow"}
    assert found["statuses"]["200"] > 10 and found["statuses"]["429"] > 0
    assert set(found["statuses"]) == {"200", "429"} and found["clients that left"] > 0
