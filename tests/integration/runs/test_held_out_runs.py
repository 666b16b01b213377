"""Held-out loss of real runs: what is written and said; training goes on as without it."""

import json
import math
from pathlib import Path

import pytest

from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.checkpoint.state.line import list_line
from run_command import run_chameleon
from tiny_project import TinyProject

MEASURED = "validation/"
VARYING = ("step_seconds", "tokens_per_second", "data_seconds")
STEPS = ("training.steps=8", "checkpoint.every_steps=2", "model.hidden_dropout=0.1")


@pytest.fixture(scope="module")
def held(tiny: TinyProject) -> Path:
    """The first seven documents as token files of their own."""
    documents = tiny.folder / "held.jsonl"
    lines = tiny.documents.read_text(encoding="utf-8").splitlines()[:7]
    documents.write_text("\n".join(lines) + "\n", encoding="utf-8")
    prefix = tiny.folder / "held"
    run_chameleon("preprocess", documents, "--tokenizer", tiny.tokenizer, "--output", prefix)
    return prefix


@pytest.fixture(scope="module")
def measured(tiny: TinyProject, held: Path) -> str:
    """What a run prints that measures after every third step."""
    return tiny.train("held-on", *STEPS, *settings(tiny, held), "logging.tensorboard=true").stdout


def settings(tiny: TinyProject, held: Path) -> list[str]:
    sources = f"[{{prefix: {held}}}, {{prefix: {tiny.tokens}, name: trained, image_first: 0.5}}]"
    return [
        f"data.validation.sources={sources}",
        "data.validation.every_steps=3",
        "checkpoint.keep_best=true",
        "checkpoint.keep_last=1",
    ]


def training_values(tiny: TinyProject, run: str) -> list[dict[str, object]]:
    """All that training itself measured, without times and held-out losses."""
    return [
        {k: v for k, v in record.items() if k not in VARYING and not k.startswith(MEASURED)}
        for record in tiny.metrics(run)
    ]


def test_training_is_the_same_to_the_last_bit(tiny, held, measured):
    """Also if only the second half of the run measures, after a resume between two steps."""
    tiny.train("held-off", *STEPS)
    off = training_values(tiny, "held-off")
    assert training_values(tiny, "held-on") == off
    newest = list_line(tiny.folder / "held-off" / "checkpoints")
    resumed = ["--resume", newest[0], *STEPS, *settings(tiny, held)]
    tiny.train("held-resumed", *resumed)
    again = training_values(tiny, "held-resumed")
    assert [record["step"] for record in again] == [7, 8] and again == off[6:]
    assert tiny.metrics("held-resumed")[-1] | dict.fromkeys(VARYING) == (
        tiny.metrics("held-on")[-1] | dict.fromkeys(VARYING)
    )


def test_the_best_checkpoint_is_kept_and_evaluate_loss_finds_the_same(tiny, measured):
    run = tiny.folder / "held-on"
    kept = {
        path.name: load_state(path).get("validation_loss")
        for path in list_line(run / "checkpoints")
    }
    losses = {record["step"]: record.get(f"{MEASURED}loss") for record in tiny.metrics("held-on")}
    assert kept == {"step_00000008": losses[8]}
    tensor = ["parallel.tensor_model_parallel_size=2", "training.micro_batch_size=3"]
    result = run_chameleon("evaluate-loss", run, "--json", *tensor, processes=2)
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "data.validation.sources[1]: " in warning and "is also data.stage1[0]" in warning
    found = json.loads(result.stdout)
    assert found["step"] == 8 and found["loss"] == pytest.approx(losses[8], rel=1e-6)
    assert (
        found["sources"]["held"]["tokens"]
        == found["tokens"] - found["sources"]["trained"]["tokens"]
    )


def test_what_is_written_and_said(tiny, measured):
    records = {record["step"]: record for record in tiny.metrics("held-on")}
    with_loss = [step for step, record in records.items() if f"{MEASURED}loss" in record]
    assert with_loss == [3, 6, 8]
    record = records[6]
    keys = {key.removeprefix(MEASURED) for key in record if key.startswith(MEASURED)}
    kinds = [f"{name}{kind}" for name in ("loss", "perplexity") for kind in ("", "_text", "_image")]
    assert keys == {f"{source}{kind}" for source in ("", "held/", "trained/") for kind in kinds}
    assert record[f"{MEASURED}perplexity"] == math.exp(record[f"{MEASURED}loss"])
    (line,) = [line for line in measured.splitlines() if line.startswith("step 6: held-out loss")]
    loss, text, image = (record[f"{MEASURED}loss{kind}"] for kind in ("", "_text", "_image"))
    assert f"held-out loss {loss:.4f} (text {text:.4f}, image {image:.4f}), perplexity " in line
    sources = [record[f"{MEASURED}{name}/loss"] for name in ("held", "trained")]
    assert line.endswith(f"; held {sources[0]:.4f}, trained {sources[1]:.4f}")
    events = b"".join(path.read_bytes() for path in (tiny.folder / "held-on").rglob("events.out*"))
    assert b"validation/held/loss_image" in events
