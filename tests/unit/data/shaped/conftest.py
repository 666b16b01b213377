"""A tokenizer folder whose pictures keep their shape, with at most 16 codes each."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.cli.main import main
from megatron_chameleon.data.token_files.reader import TokenFile, open_token_file
from megatron_chameleon.tokenizer.common.grids import Shapes
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

SIZES = [(16, 16), (64, 16), (15, 60), (50, 31), (1, 1), (300, 20)]


@pytest.fixture(scope="session")
def shaped_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shaped") / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    corpus = ["a handwritten seven", "the sum of two and three is five", "zero one four six eight"]
    train_text_tokenizer(corpus * 20, folder, vocab_size=350, image_codes=32, shapes=Shapes(16))
    return folder


@pytest.fixture(scope="session")
def shaped(shaped_folder: Path) -> Tokenizer:
    return load_tokenizer(shaped_folder)


def write_documents(folder: Path, count: int = 12) -> Path:
    """Documents and conversations with 1 to 3 pictures of several shapes each."""
    lines: list[dict[str, object]] = []
    for number in range(count):
        parts: list[dict[str, str]] = []
        for place in range(1 + number % 3):
            size = SIZES[(number + place) % len(SIZES)]
            noise = np.random.default_rng([number, place])
            pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            name = f"{number}-{place}.png"
            Image.fromarray(pixels).save(folder / name)
            parts += [{"type": "image", "image": name}]
            parts += [{"type": "text", "text": "two and three"}] if number % 2 else []
        if number % 4 == 3:
            question: dict[str, object] = {"role": "user", "content": "zero or one"}
            answer: dict[str, object] = {"role": "assistant", "content": parts}
            lines.append({"messages": [question, answer]})
        else:
            lines.append({"content": parts})
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def written_folder(shaped_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, and the token file ``tokens`` that the real command makes of them."""
    folder = tmp_path_factory.mktemp("written")
    words = ["preprocess", write_documents(folder), "--tokenizer", shaped_folder]
    main([str(word) for word in [*words, "--output", folder / "tokens", "--device", "cpu"]])
    return folder


@pytest.fixture
def written(written_folder: Path, shaped: Tokenizer, tmp_path: Path) -> TokenFile:
    """A copy of its own of that token file, in ``tmp_path``."""
    shutil.copytree(written_folder, tmp_path, dirs_exist_ok=True)
    return open_token_file(tmp_path / "tokens", shaped)
