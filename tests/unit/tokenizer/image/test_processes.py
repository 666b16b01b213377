"""Several processes train one image tokenizer as one does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from megatron_chameleon.data.tokenizer_corpus.images import find_images
from megatron_chameleon.tokenizer.image.config import load_image_config
from megatron_chameleon.tokenizer.image.training.train import train_image_tokenizer
from megatron_chameleon.tokenizer.image.training.trainer import Trainer
from run_command import run_chameleon

SMALL = ["--config", "digits", "model.resolution=8", "model.ch_mult=[1,1]"]
SMALL += ["model.codebook_size=16", "model.z_channels=8", "model.embed_dim=8"]
SMALL += ["training.batch_size=4", "training.steps=6", "training.log_every_steps=1"]
SMALL += ["training.lr=3e-4", "training.shift=0.1", "training.reseed_every_steps=2"]
SMALL += ["training.discriminator_weight=0.5", "training.discriminator_layers=1"]
SMALL += ["training.discriminator_start=1", "training.holdout=0.3", "training.cache_gib=0"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Must not be changed."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(12):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "5.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def one(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process has trained. Must not be changed."""
    folder = tmp_path_factory.mktemp("one")
    train(photos, folder, 1)
    return folder


def train(photos: Path, output: Path, processes: int, *words: str, code: int = 0) -> str:
    command = ["tokenizer", "image", photos, "--output", output, *SMALL, *words]
    ended = run_chameleon(*command, processes=processes, succeeds=False)
    assert ended.returncode == code, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.stdout + ended.stderr


def metrics(output: Path) -> list[dict[str, Any]]:
    lines = (output / "image.run" / "metrics.jsonl").read_text().splitlines()
    timed = {"seconds", "images_per_second"}
    return [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines]


def test_two_processes_train_what_one_does(photos: Path, one: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    said = train(photos, two, 2)
    assert said.count("6 steps of 4, shared by 2 processes") == 1 == said.count("step 6/6 ")
    for first, second in zip(metrics(one), metrics(two), strict=True):
        # 6 steps; fp32 sums in another order, which the discriminator magnifies
        assert first == pytest.approx(second, rel=1e-5, abs=1e-6), first["step"]
    weights = [load_file(folder / "image.safetensors") for folder in (one, two)]
    book = [found["quantize.embedding.weight"] for found in weights]
    np.testing.assert_allclose(*book, rtol=0, atol=1e-6)
    dropped = [(folder / "image.dropped.jsonl").read_text() for folder in (one, two)]
    assert dropped[0] == dropped[1] and "5.png" in dropped[0]


def test_a_killed_training_goes_on_with_another_number_of_processes(
    photos: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Trainer.step

    def step(trainer: Trainer, pixels: torch.Tensor, number: int) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return honest(trainer, pixels, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        config = load_image_config("digits", [*SMALL[2:], "training.save_minutes=1e-9"])
        with pytest.raises(KeyboardInterrupt):
            train_image_tokenizer(find_images([photos]), config, tmp_path / "out")
    assert "image.partial: continues from step 4 of 6" in train(photos, tmp_path / "out", 2)
    weights = [
        load_file(folder / "image.safetensors")["quantize.embedding.weight"]
        for folder in (one, tmp_path / "out")
    ]
    np.testing.assert_allclose(*weights, rtol=0, atol=1e-6)


def test_a_batch_that_cannot_be_shared_equally_is_refused(photos: Path, tmp_path: Path) -> None:
    said = train(photos, tmp_path / "three", 3, code=1)  # of a job
    line = "error: training.batch_size: 4 images cannot be shared equally by 3 processes. "
    assert said.count(line + "Use training.batch_size=6, or another number of processes") == 1
