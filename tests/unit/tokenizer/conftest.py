"""A small tokenizer folder: a trained text tokenizer and a random VQGAN (16 x 16 pixels)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_chameleon.tokenizer.image.stored import save_vqgan
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
from megatron_chameleon.tokenizer.text.training import train_text_tokenizer
from tiny_model import tiny_tokenizer  # noqa: F401

IMAGE_CODES = 32
TEXTS = [
    "a handwritten seven and a handwritten nine",
    "the sum of two and three is five\n    indented twice as far as two",
    "<s> IMGIMGAZ <racm3:break>",
    "<s><s>IMGIMGAZ<0x41>",
    "xIMGIMGA yIMGIMGA IMGIMGA",  # becomes a piece; with "Z" it would spell a control token
    "Zwölf Boxkämpfer jagen Viktor",
] * 30


def write_tokenizer(folder: Path) -> Path:
    train_text_tokenizer(TEXTS, folder, vocab_size=420, image_codes=IMAGE_CODES)
    torch.manual_seed(0)
    model = Vqgan(VqganConfig(16, 3, 32, [1, 1, 1], 1, 8, 8, IMAGE_CODES))
    # The initial codebook is nearly one point. Spread like the latents, it gives images different
    # codes.
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    save_vqgan(model, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Must not be changed."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def new_tokenizer_folder(tmp_path: Path) -> Path:
    """May be broken."""
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def noise() -> Callable[..., Image.Image]:
    """Makes a picture of noise."""

    def make(seed: int = 0, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Image.Image:
        shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
        rng = np.random.default_rng(seed)
        return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))

    return make
