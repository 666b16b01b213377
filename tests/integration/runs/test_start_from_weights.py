"""A run that starts from the weights of another format has them and begins at step 1."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.config.load import load_config

LAYOUT = ["parallel.tensor_model_parallel_size=2", "parallel.use_distributed_optimizer=true"]
NO_WARMUP = "optimizer.lr_warmup_steps=0"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_starts_from_a_converted_checkpoint(tiny, chameleon, dtype: str) -> None:
    first, run = f"trained-{dtype}", f"continued-{dtype}"
    tiny.train(first, f"training.dtype={dtype}")
    folders = [tiny.folder / f"{name}-{dtype}" for name in ("hf", "weights")]
    chameleon("convert", tiny.folder / first, folders[0], "--to", "hf")
    chameleon("convert", folders[0], folders[1], "--to", "megatron")
    words = [f"training.dtype={dtype}", "training.steps=3", "training.seed=2", "--resume"]
    tiny.train(run, *words, folders[1], *LAYOUT, processes=2)
    old, new = tiny.metrics(first), tiny.metrics(run)
    assert [line["step"] for line in new] == [1, 2, 3]
    assert old[0]["loss"] - old[-1]["loss"] > 0.5, "a run that has learned nothing proves nothing"
    # not the samples that were trained on last
    assert abs(new[0]["loss"] - old[-1]["loss"]) < 0.25
    if dtype == "fp32":
        return
    # the same weights straight from the folder of the other format, bit for bit
    direct = ["--start-from", folders[0], *LAYOUT]
    tiny.train("direct", *words[:-1], *direct, processes=2)
    assert contents(tiny.folder / "direct") == contents(tiny.folder / run)


def contents(run: Path) -> list[tuple[str, bytes]]:
    """The files with tensors of a run's last checkpoint."""
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    return [(path.name, path.read_bytes()) for path in sorted(checkpoint.glob("*.distcp"))]


def test_a_config_inherits_what_it_does_not_say(tiny, chameleon, tmp_path: Path) -> None:
    """Model and tokenizer come from the weights, and stay when those are gone."""
    tiny.train("first", "training.steps=2", NO_WARMUP)
    weights, run = tmp_path / "weights", tmp_path / "run"
    chameleon("convert", tiny.folder / "first", weights, "--to", "hf")
    config = tmp_path / "train.yaml"
    text = tiny.config.read_text().split("data:")[1]
    config.write_text(f"model: {{hidden_dropout: 0.1}}\ndata:{text}")
    words = [config, f"logging.run_dir={run}", NO_WARMUP, "--start-from", weights]
    dry = chameleon("train", *words, "training.steps=2", "--dry-run", "--no-step").stdout
    assert f"path: {run}/tokenizer" in dry and not run.exists(), "a dry run leaves nothing"
    chameleon("train", *words, "training.steps=2")
    recorded = load_config(run / "config.yaml")
    assert (recorded.model.num_layers, recorded.model.seq_length) == (4, 64)
    assert recorded.model.hidden_dropout == 0.1
    assert recorded.tokenizer.path == str(run / "tokenizer")
    shutil.rmtree(weights)
    chameleon("train", *words, "training.steps=3")
    chameleon("train", *words[:3], "training.steps=4")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    found = chameleon("config", "check", config, "--start-from", tiny.folder / "first")
    assert f"vocabulary {352:,}" in found.stdout
    planned = chameleon(
        *("plan", config, f"logging.run_dir={tmp_path}/planned", "training.steps=null"),
        *("training.epochs=2", "data.stage2=[]", NO_WARMUP, "--gpus", "1", "--gpu", "h100"),
        *("--start-from", tiny.folder / "first"),
    )
    assert "tokens/s" in planned.stdout
    assert not (tmp_path / "planned").exists()
    refused = chameleon(
        *("train", config, f"logging.run_dir={tmp_path}/other", "model.num_layers=5"),
        *(NO_WARMUP, "model.hidden_size=48", "--start-from", tiny.folder / "first"),
        succeeds=False,
    )
    assert (
        "The weights have model.num_layers=4 (your config: 5), model.hidden_size=32 (your config: "
        "48). Remove them from your config"
    ) in refused.stderr


def test_an_adapter_run_is_measured_as_it_was_trained(tiny, chameleon, tmp_path: Path) -> None:
    """Its context and its data are the run's, not those of the weights beside the adapter."""
    tiny.train("whole", "training.steps=1", NO_WARMUP)
    words = ["training.steps=1", NO_WARMUP, "adapter.rank=2", "model.seq_length=32"]
    words += ["data.reset_attention=true", "--start-from", tiny.folder / "whole"]
    tiny.train("adapter", *words)
    reader = open_checkpoint(tiny.folder / "adapter")
    assert reader.config is not None and reader.config.data.reset_attention
    assert reader.config.adapter.rank == 0, "the weights that are read have the adapter in them"
    assert (reader.model.seq_length, reader.base.model.seq_length) == (32, 64)
    beside = [f"logging.run_dir={tmp_path}/second", "adapter.rank=2", NO_WARMUP]
    refused = chameleon(
        *("train", tiny.config, *beside, "--start-from", tiny.folder / "adapter"), succeeds=False
    )
    assert "must be whole" in refused.stderr and "--merge" in refused.stderr
