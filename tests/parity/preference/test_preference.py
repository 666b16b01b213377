"""Preference tuning: the loss by hand from transformers' logits, layouts, and resuming."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image

from megatron_chameleon.checkpoint.loading.transformers_model import load_transformers, logits
from megatron_chameleon.data.token_files.reader import TokenFile, open_token_file
from megatron_chameleon.tokenizer.folder import load_tokenizer
from tests.support.run_command import run_chameleon
from tests.support.tiny_model import TEXTS, write_tokenizer

CONFIG = """
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4,
  seq_length: 128}}
tokenizer: {{path: {0}/tokenizer}}
data: {{stage1: [{{prefix: {0}/pairs}}], reset_attention: true,
  validation: {{sources: [{{prefix: {0}/held-out}}], modality_prompts: 0}}}}
optimizer: {{lr: 1.0e-3, lr_warmup_steps: 1}}
training: {{objective: dpo, steps: 4, micro_batch_size: 1, global_batch_size: 4}}
dpo: {{beta: 0.3, label_smoothing: 0.1}}
checkpoint: {{every_steps: 2}}
"""
LAYOUTS = {
    "tensor": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "pipeline": ["parallel.pipeline_model_parallel_size=2"],
    "zero": ["engine.name=deepspeed", "engine.zero_stage=2"],
    "zero3": ["engine.name=deepspeed", "engine.zero_stage=3"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, pairs of texts and pictures, and a run of one process in the folder ``one``."""
    folder = tmp_path_factory.mktemp("pairs")
    write_tokenizer(folder / "tokenizer")
    random = np.random.default_rng(1)
    for number in range(24):
        pixels = random.integers(0, 255, (8, 8, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{number}.png")
    records = []
    for number, text in enumerate([*TEXTS, *TEXTS]):
        picture = [{"type": "image", "image": f"{number}.png"}]
        chosen: Any = picture if number % 3 else text[:9]
        records.append({"prompt": text, "chosen": chosen, "rejected": text[-9:]})
    for name, lines in (("pairs", records[:16]), ("held-out", records[16:])):
        text = "".join(json.dumps(record) + "\n" for record in lines)
        (folder / f"{name}.jsonl").write_text(text)
        words = ("--tokenizer", folder / "tokenizer", "--output", folder / name)
        run_chameleon("preprocess", folder / f"{name}.jsonl", *words)
    (folder / "train.yaml").write_text(CONFIG.format(folder))
    train(folder, "one")
    return folder


def train(folder: Path, run: str, *words: object, **options: Any) -> list[dict[str, Any]]:
    run_dir = f"logging.run_dir={folder / run}"
    run_chameleon("train", folder / "train.yaml", run_dir, *words, **options)
    return read_metrics(folder, run)


def read_metrics(folder: Path, run: str) -> list[dict[str, Any]]:
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def by_hand(model: Any, file: TokenFile, bos: int) -> np.ndarray:
    """The log-probabilities of both answers of each pair, in float64: [pairs, 2]."""
    found = []
    for document in range(file.info.documents):
        ids = file.read(document).astype(np.int64)
        second = int(np.flatnonzero(ids == bos)[1])
        for begin, stop, span in zip(
            (0, second), (second, len(ids)), file.answer_spans(document).tolist(), strict=True
        ):
            own = torch.from_numpy(ids[begin:stop])[None]
            log_probs = logits(model, own).double().log_softmax(-1)[0]
            first, length = span[0] - begin, span[1]
            places = torch.arange(first, first + length)
            found.append(float(log_probs[places - 1, own[0, places]].sum()))
    return np.array(found).reshape(-1, 2)


def test_the_loss_and_the_reference_are_those_of_a_computation_by_hand(project: Path) -> None:
    checkpoint = project / "one/checkpoints/step_00000002"
    start = project / "start"
    run_chameleon("convert", checkpoint, start, "--to", "hf")
    metrics = train(project, "again", "--start-from", start, "training.steps=2")
    end = project / "end"
    run_chameleon("convert", project / "again/checkpoints/step_00000002", end, "--to", "hf")
    tokenizer = load_tokenizer(project / "tokenizer", images=False)
    file = open_token_file(project / "held-out", tokenizer)
    bos = tokenizer.vocabulary.bos
    reference, model = (by_hand(load_transformers(folder), file, bos) for folder in (start, end))
    # fp32 against another implementation in fp32: about 20 tokens of 6 nats
    tables = [np.load(path) for path in sorted((project / "again/reference").glob("*.npy"))]
    assert_allclose(tables[1], reference, rtol=2e-6)
    rewards = 0.3 * (model - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    loss = 0.9 * np.log1p(np.exp(-margin)) + 0.1 * np.log1p(np.exp(margin))
    last = metrics[-1]
    assert_allclose(last["validation/loss"], loss.mean(), rtol=2e-5)
    assert_allclose(last["validation/reward_margin"], margin.mean(), rtol=2e-4)
    assert last["validation/reward_accuracy"] == (margin > 0).mean()
    # before the first update, the model is the reference
    assert_allclose(metrics[0]["loss"], np.log(2), rtol=1e-6)
    assert metrics[0]["reward_margin"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_same(project: Path, layout: str) -> None:
    found = train(project, layout, *LAYOUTS[layout], processes=2)
    one = read_metrics(project, "one")
    for metrics, expected in zip(found, one, strict=True):
        for key in ("loss", "reward_margin", "chosen_logp", "rejected_reward", "grad_norm"):
            # sums in another order, through four updates
            assert_allclose(metrics[key], expected[key], rtol=1e-4, atol=1e-6, err_msg=key)
    assert_allclose(found[-1]["validation/loss"], one[-1]["validation/loss"], rtol=1e-4)


def test_a_resumed_run_has_the_same_reference_and_losses(project: Path) -> None:
    shutil.copytree(project / "one", project / "parts")
    shutil.rmtree(project / "parts/checkpoints/step_00000004")
    table = project / "parts/reference/0000.npy"
    written = table.stat().st_mtime_ns
    found, one = train(project, "parts"), read_metrics(project, "one")
    assert [m["loss"] for m in found] == [m["loss"] for m in one]
    assert found[-1]["validation/loss"] == one[-1]["validation/loss"]
    assert table.stat().st_mtime_ns == written
    table.write_bytes(table.read_bytes()[:-8])
    done = run_chameleon(
        *("train", project / "train.yaml", f"logging.run_dir={project / 'parts'}"),
        "training.steps=5",
        succeeds=False,
    )
    assert done.returncode == 2
    assert "does not have the reference log-probabilities of the checkpoint" in done.stderr


def test_a_dry_run_has_the_reference_of_its_step(project: Path, tmp_path: Path) -> None:
    """Before the first step both models are the same, and the loss of each pair is log 2."""
    shutil.copytree(project / "one", tmp_path / "one")
    words = ("train", project / "train.yaml", "--dry-run", f"logging.run_dir={tmp_path / 'new'}")
    assert "Step 1 was computed and dropped: loss 0.6931 " in run_chameleon(*words).stdout
    result = run_chameleon(*words, *LAYOUTS["pipeline"], processes=2)
    assert "Step 1 was computed and dropped: loss 0.6931 " in result.stdout
    assert not (tmp_path / "new").exists()
    shutil.rmtree(tmp_path / "one/checkpoints/step_00000004")
    words = (*words[:3], f"logging.run_dir={tmp_path / 'one'}")
    loss = read_metrics(project, "one")[2]["loss"]
    assert f"Step 3 was computed and dropped: loss {loss:.4f} " in run_chameleon(*words).stdout
    shutil.rmtree(tmp_path / "one/reference")
    result = run_chameleon(*words, succeeds=False)
    assert result.returncode == 2 and "reference: does not have the reference" in result.stderr


def test_evaluate_loss_measures_pairs_as_the_run_did(project: Path) -> None:
    last = read_metrics(project, "one")[-1]
    words = ("evaluate-loss", project / "one", "--json")
    found = json.loads(run_chameleon(*words).stdout)
    for key in ("loss", "reward_margin", "reward_accuracy", "chosen_logp", "rejected_logp"):
        assert found[key] == pytest.approx(last[f"validation/{key}"], rel=1e-5), key
    assert found["pairs"] == found["sources"]["held-out"]["pairs"] == 4
    # An exported folder elsewhere has no reference, so its rewards are unknown.
    away = project / "away/exported"
    run_chameleon("convert", project / "one", away, "--to", "hf")
    done = run_chameleon("evaluate-loss", away, "--data", project / "held-out")
    assert "belongs to no run that has kept a reference" in done.stderr
    header, row = done.stdout.splitlines()
    assert header.split()[:3] == ["source", "pairs", "loss"]
    logps = [f"{last[f'validation/{key}']:.4f}" for key in ("chosen_logp", "rejected_logp")]
    assert row.split() == ["held-out", "4", "-", "-", "-", *logps]


def test_the_report_has_the_rewards(project: Path) -> None:
    run_chameleon("report", project / "one", "--output", project / "report.html")
    page = (project / "report.html").read_text()
    assert "<figcaption>Reward margin" in page and "<figcaption>Reward accuracy" in page
