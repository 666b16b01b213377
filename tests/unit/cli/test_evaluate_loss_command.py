"""``chameleon evaluate-loss`` on every format that ``generate`` takes, and its errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.tokenizer.folder import load_tokenizer
from run_command import run_chameleon
from tiny_model import tiny_checkpoint, tiny_tokenizer  # noqa: F401


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, tiny_tokenizer) -> Path:  # noqa: F811
    """Twelve documents with an image each."""
    tokenizer = load_tokenizer(tiny_tokenizer, images=False)
    v, draw = tokenizer.vocabulary, np.random.default_rng(3)
    path = tmp_path_factory.mktemp("documents") / "pairs"
    with TokenFileWriter(path, tokenizer) as writer:
        for words in range(1, 13):
            image = [v.begin_image, *draw.choice(v.code_token_ids, 16).tolist(), v.end_image]
            text = draw.integers(v.image_placeholder + 1, v.size, words).tolist()
            writer.add(np.array([v.bos, *text, *image, v.eos]), 1)
        writer.commit()
    return path


def measure(checkpoint: Path, *words: object, **options: Any) -> dict[str, Any]:
    result = run_chameleon("evaluate-loss", checkpoint, *words, "--json", **options)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_every_format_gives_the_same(tiny_checkpoint, prefix, tmp_path):  # noqa: F811
    ours = measure(tiny_checkpoint, "--data", prefix)
    assert ours["step"] == 7 and ours["checkpoint"] == str(tiny_checkpoint)
    assert ours["tokens_image"] == 12 * 16 and ours["tokens_text"] == sum(range(1, 13)) + 12 * 3
    assert ours["sources"]["pairs"]["loss"] == ours["loss"]
    run_chameleon("convert", tiny_checkpoint, tmp_path / "hf", "--to", "hf")
    exported = measure(tmp_path / "hf", "--data", prefix, "model.seq_length=64")
    for key in ("loss", "loss_text", "loss_image"):
        assert exported[key] == pytest.approx(ours[key], rel=1e-6)
    table = run_chameleon("evaluate-loss", tiny_checkpoint, "--data", prefix).stdout.splitlines()
    assert table[0].split() == ["source", "tokens", "number", "loss", "perplexity"]
    assert table[3].split()[:4] == ["pairs", "image", "192", f"{ours['loss_image']:.4f}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: --data: is missing, and the config of"),
        (["--data", "nowhere/at/all"], "error: --data[0].prefix: nowhere/at/all"),
        (["--data", "PREFIX", "--max-tokens", "0"], "error: --max-tokens: '0' is not a whole"),
        (
            ["--data", "PREFIX", "parallel.tensor_model_parallel_size=2"],
            "error: parallel: 1 process cannot be laid out as tensor 2",
        ),
        (
            ["--data", "PREFIX", "optimizer.lr=2"],
            "error: optimizer.lr=2: changes nothing about the loss of a checkpoint. Give values of",
        ),
        (["--data", "PREFIX", "model.sequence=3"], "error: model.sequence=3: Unknown key"),
        (["--data", "PREFIX", "model.seq_length=8"], "error: --data[0].prefix: an image of "),
    ],
)
def test_errors(tiny_checkpoint, prefix, words, message):  # noqa: F811
    words = [str(prefix) if word == "PREFIX" else word for word in words]
    result = run_chameleon("evaluate-loss", tiny_checkpoint, *words, succeeds=False)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert result.stderr.count("error: ") == 1
