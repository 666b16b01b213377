"""A small but real tokenizer folder, and documents for it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_chameleon.data.token_files.reader import TokenFile, TokenFileWriter, open_token_file
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.tokenizer.image.stored import (
    FORMAT,
    IMAGE_CONFIG_FILE,
    IMAGE_WEIGHTS_FILE,
)
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

IMAGE_CODES = 32
CORPUS = ["a handwritten seven", "the sum of two and three is five", "zero one four six eight nine"]


def write_tokenizer(folder: Path, seed: int = 0) -> Path:
    train_text_tokenizer(CORPUS * 20, folder, vocab_size=340, image_codes=IMAGE_CODES)
    config = VqganConfig(
        resolution=16,
        base_channels=32,
        ch_mult=[1, 1, 1],
        num_res_blocks=1,
        z_channels=8,
        embed_dim=8,
        codebook_size=IMAGE_CODES,
    )
    torch.manual_seed(seed)
    save_file(Vqgan(config).state_dict(), folder / IMAGE_WEIGHTS_FILE)
    content = {"format": FORMAT, "model": asdict(config)}
    (folder / IMAGE_CONFIG_FILE).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., str]:
    """Writes a picture of noise and returns its name."""

    def write(name: str, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> str:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / name)
        return name

    return write


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as JSON Lines; strings are written unchanged."""

    def write(name: str, *records: object) -> Path:
        path = tmp_path / name
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def token_file(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., TokenFile]:
    """Writes documents of token ids as a token file and opens it."""

    def write(documents: list[np.ndarray], name: str = "tokens") -> TokenFile:
        with TokenFileWriter(tmp_path / name, tokenizer) as writer:
            for document in documents:
                writer.add(document, int((document == tokenizer.vocabulary.begin_image).sum()))
            writer.commit()
        return open_token_file(tmp_path / name, tokenizer)

    return write


@pytest.fixture
def numbered(tokenizer: Tokenizer) -> Callable[[list[int]], list[np.ndarray]]:
    """Makes documents of given lengths: ``<s>``, text tokens, ``</s>``."""

    def make(lengths: list[int]) -> list[np.ndarray]:
        vocabulary = tokenizer.vocabulary
        first_text = vocabulary.image_placeholder + 1
        documents, next_id = [], 0
        for length in lengths:
            text = first_text + (next_id + np.arange(length - 2)) % (vocabulary.size - first_text)
            next_id += length - 2
            documents.append(np.array([vocabulary.bos, *text, vocabulary.eos]))
        return documents

    return make
