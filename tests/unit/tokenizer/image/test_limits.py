"""An image tokenizer's training stops before it fills the memory or writes values not finite."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_chameleon.data.tokenizer_corpus.images import find_images
from megatron_chameleon.errors import ConfigError, TrainingError
from megatron_chameleon.tokenizer.image.config import load_image_config
from megatron_chameleon.tokenizer.image.shape import activation_bytes
from megatron_chameleon.tokenizer.image.training import limits
from megatron_chameleon.tokenizer.image.training.limits import (
    FiniteLosses,
    check_fits,
)
from megatron_chameleon.tokenizer.image.training.train import train_image_tokenizer
from megatron_chameleon.tokenizer.image.training.trainer import Trainer
from megatron_chameleon.tokenizer.image.vqgan import Vqgan

CPU = torch.device("cpu")
SMALL = ["model.resolution=8", "model.ch_mult=[1,1]", "model.codebook_size=16"]
SMALL += ["training.batch_size=4", "training.steps=6", "training.discriminator_layers=0"]


def train(folder: Path, *words: str) -> None:
    Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "a.png")
    images = find_images([folder / "a.png"])
    train_image_tokenizer(images, load_image_config("digits", [*SMALL, *words]), folder / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def poison(monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    """Make a weight NaN by the update of a step, counted from 1."""
    honest = Trainer.step

    def step(trainer: Trainer, pixels: torch.Tensor, number: int) -> Any:
        result = honest(trainer, pixels, number)
        if number + 1 == at_step:
            trainer.model.decoder.conv_out.weight.data[0, 0, 0, 0] = math.nan
        return result

    monkeypatch.setattr(Trainer, "step", step)


@pytest.mark.parametrize(
    ("at_step", "problem"),
    [
        (3, r"^step 4: the losses l1 are not finite\. Use a lower training\.lr; nothing was"),
        (6, r"^step 6: the weights decoder\.conv_out\.weight are not finite\."),
    ],
)
def test_a_training_that_breaks_keeps_the_older_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int, problem: str
) -> None:
    train(tmp_path)
    before = contents(tmp_path)
    poison(monkeypatch, at_step)
    with pytest.raises(TrainingError, match=problem):
        train(tmp_path)
    assert contents(tmp_path) == before


def test_the_first_bad_step_is_named_even_if_nobody_looks_before_the_end() -> None:
    finite, one, nan = FiniteLosses(CPU), torch.tensor(1.0), torch.tensor(math.nan)
    finite.note({"l1": one, "commit": one}, 0)
    finite.check()
    finite.note({"l1": one, "commit": nan}, 1)
    finite.note({"l1": nan, "commit": nan}, 2)
    with pytest.raises(TrainingError, match=r"^step 2: the losses commit are not finite"):
        finite.check()
    with pytest.raises(TrainingError, match=r"^step 2: the losses commit are not finite"):
        finite.note({"l1": one, "commit": one, "gan": one, "disc": one}, 3)


def test_a_loss_that_joins_later_is_watched_too() -> None:
    finite, one = FiniteLosses(CPU), torch.tensor(1.0)
    finite.note({"l1": one}, 0)
    finite.note({"l1": one, "disc": torch.tensor(math.inf)}, 1)
    with pytest.raises(TrainingError, match=r"^step 2: the losses disc are not finite"):
        finite.check()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["training.batch_size=65536", "model.resolution=4096"],
            r"^training.batch_size: needs about .* of memory, and this machine has 24\.0 GiB",
        ),
        (
            ["model.z_channels=65536", "model.embed_dim=65536", "model.codebook_size=1048576"],
            r"^model: needs about .*iB of memory, and this machine has 24\.0 GiB\. Use fewer",
        ),
    ],
)
def test_what_cannot_fit_is_said_before_it_is_allocated(
    monkeypatch: pytest.MonkeyPatch, words: list[str], problem: str
) -> None:
    monkeypatch.setattr(limits, "machine_memory", lambda: 24 << 30)
    with pytest.raises(ConfigError, match=problem):
        check_fits(load_image_config("chameleon_512", words), CPU)
    check_fits(load_image_config("chameleon_512", ["training.batch_size=1"]), CPU)


def test_the_estimate_is_below_what_a_real_network_keeps() -> None:
    """Residual blocks keep most; attention, resampling and the ends of the network keep more."""
    model = load_image_config("digits").model
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    network = Vqgan(model)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(torch.zeros(4, 3, 16, 16))
    total = sum(size for place, size in kept.items() if place not in own) / 4
    assert output.reconstruction_BCHW.shape == (4, 3, 16, 16)
    assert 0.5 * total < activation_bytes(model) < total
