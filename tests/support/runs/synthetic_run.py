"""A run folder as training writes it, with metrics from formulas: it costs no training."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

CONFIG = """
model: {num_layers: 2}
tokenizer: {path: nowhere/tokenizer}
data:
  stage1:
  - {prefix: nowhere/pairs, weight: 3.0}
  - {prefix: nowhere/text, weight: 1.0, name: prose}
  stage2:
  - {prefix: nowhere/quality}
  stage1_fraction: 0.75
  stage2_share: 0.5
training: {steps: 400, global_batch_size: 8}
"""


def record(step: int, turn: int, batch: int = 8) -> dict[str, object]:
    """The line of a step of a run whose held-out loss is lowest at the step ``turn``."""
    random = np.random.default_rng(step)
    fall = 1.2 + 5 * math.exp(-step / 40) - step / 2000
    values: dict[str, object] = {
        "step": step,
        "loss": fall + 0.05 * random.normal(),
        "loss_text": 0.6 * fall + 0.05 * random.normal(),
        "loss_image": 1.3 * fall + 0.05 * random.normal(),
        "z_loss": 1e-4,
        "grad_norm": 0.6 + 0.05 * random.random() + 2 * math.exp(-step / 20),
        "learning_rate": 1e-3 * min(1, step / 40) * (1 - step / 500),
        "consumed_samples": batch * step,
        "consumed_tokens": 128 * batch * step,
        "trained_tokens": 120 * batch * step,
        "tokens_per_second": 9000 + 500 * random.normal(),
        "mfu": None,
        "output_norm": 40 * (1 - math.exp(-step / 100)),
        "max_logit": 15 + random.random(),
        "step_seconds": 0.11,
        "layer_output_norms": [1.0, 2.0],
    }
    if step % 20 == 0:
        held_out = 1.4 + 5 * math.exp(-min(step, turn) / 40) + 1.5e-3 * max(0, step - turn)
        values |= {
            "validation/loss": held_out,
            "validation/loss_text": 0.7 * held_out,
            "validation/loss_image": 1.2 * held_out,
            "validation/perplexity": math.exp(held_out),
            "validation/pairs/loss": 1.1 * held_out,
            "validation/prose/loss": 0.8 * held_out,
        }
    return values


def write_run(folder: Path, steps: int = 400, turn: int = 160, batch: int = 8) -> Path:
    """Write the run folder; returns it."""
    folder.mkdir(parents=True)
    lines = (json.dumps(record(step, turn, batch)) + "\n" for step in range(1, steps + 1))
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.yaml").write_text(CONFIG.replace("size: 8", f"size: {batch}"))
    environment = {"git_commit": "a" * 40, "git_dirty": True, "packages": {"torch": "2"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "command.txt").write_text("train a.yaml\ntrain a.yaml\n")
    events = [
        {"time": "2026-01-02T03:04:05Z", "event": "start", "step": 0, "host": "n1", "text": "go"},
        {"time": "2026-01-02T04:04:05Z", "event": "restart", "step": 250, "host": "n2"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    alarm = {"step": 300, "output_norm": 50.0, "since_step": 100, "since_output_norm": 10.0}
    (folder / "alarms.jsonl").write_text(
        json.dumps({**alarm, "loss": 1.0, "since_loss": 2.0}) + "\n"
    )
    checkpoint = folder / "checkpoints" / "step_00000200"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    for step in (100, 200, 400):
        write_sample(folder / "samples" / f"step_{step:08d}", step)
    return folder


def write_sample(folder: Path, step: int) -> None:
    """Write the samples of a step: a text and a picture."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(step)
    pixels = (random.random((8, 8, 3)) * 255).astype(np.uint8)
    Image.fromarray(pixels).resize((600, 300)).save(folder / "0_0.png")
    parts = [{"type": "text", "text": f"at {step}"}, {"type": "image", "image": "0_0.png"}]
    line = {"prompt": {"text": "Draw a three.", "image": None, "force": None}, "content": parts}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
