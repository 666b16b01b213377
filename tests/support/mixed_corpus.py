"""A corpus with every kind of input, including bad documents, and a tokenizer for it."""

import gzip
import io
import json
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_chameleon.tokenizer.image.stored import (
    FORMAT,
    IMAGE_CONFIG_FILE,
    IMAGE_WEIGHTS_FILE,
)
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

IMAGE_CODES = 32
SENTENCES = ["a handwritten seven", "the sum of two and three is five", "zero one four six eight"]


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer folder: images of 16 x 16 pixels become 16 codes out of 32."""
    train_text_tokenizer(SENTENCES * 20, folder, vocab_size=330, image_codes=IMAGE_CODES)
    config = VqganConfig(
        resolution=16,
        base_channels=32,
        ch_mult=[1, 1, 1],
        num_res_blocks=1,
        z_channels=8,
        embed_dim=8,
        codebook_size=IMAGE_CODES,
    )
    torch.manual_seed(0)
    save_file(Vqgan(config).state_dict(), folder / IMAGE_WEIGHTS_FILE)
    content = {"format": FORMAT, "model": asdict(config)}
    (folder / IMAGE_CONFIG_FILE).write_text(json.dumps(content))
    return folder


def picture(seed: int) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_corpus(folder: Path, documents: int) -> list[Path]:
    """Write five files; returns their paths in order.

    About one document in 20 is bad: it is not JSON, or its image is missing, empty or not an image.

    Args:
        folder: Where to write; created if it is missing.
        documents: Documents per file; the files of texts have four times as many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.png").write_bytes(b"")
    (folder / "broken.png").write_bytes(picture(0)[:60])
    for i in range(10):
        (folder / f"{i}.png").write_bytes(picture(i))
    return [
        write_pairs(folder / "a_pairs.jsonl", documents),
        _write_texts(folder / "b_text.jsonl.gz", documents, "gzip"),
        _write_tar(folder / "c_web.tar", documents),
        _write_parquet(folder / "d_obelics.parquet", documents),
        _write_texts(folder / "e_text.jsonl.zst", documents, "zstd"),
    ]


def text_of(number: int) -> str:
    return f"number {number} " + SENTENCES[number % 3] * (number % 7)


def write_pairs(path: Path, documents: int) -> Path:
    """One picture and text per line, some with an answer; the pictures are in ``write_corpus``."""
    lines = []
    for i in range(documents):
        image = ["empty.png", "broken.png", "none.png", f"{i % 10}.png"][min(i % 61, 3)]
        content = [{"type": "image", "image": image}, {"type": "text", "text": text_of(i)}]
        kind = {"content": content}
        if i % 4 == 1:
            kind = {"prompt": content, "answer": f"{text_of(i + 1)}!"}
        line = json.dumps({"id": f"doc-{i}", "source": f"s{i % 3}", **kind})
        lines.append("" if i % 50 == 7 else line[: 30 if i % 50 == 9 else None])
    path.write_text("\n".join(lines))  # no newline at the end
    return path


def _write_texts(path: Path, documents: int, compression: str) -> Path:
    lines = (json.dumps({"text": text_of(i) * 20}) for i in range(documents * 4))
    content = "".join(line + "\n" for line in lines).encode()
    if compression == "gzip":
        path.write_bytes(gzip.compress(content, mtime=0))
    else:
        path.write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    return path


def _write_tar(path: Path, documents: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for i in range(documents):
            files = {"txt": text_of(i).encode(), "png": picture(i) if i % 23 else b"none"}
            for suffix, content in files.items():
                entry = tarfile.TarInfo(f"{i:06}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def _write_parquet(path: Path, documents: int) -> Path:
    images = [[picture(i), None, None][: 2 + i % 2] for i in range(documents)]
    texts = [[None, text_of(i), "end"][: 2 + i % 2] for i in range(documents)]
    table = pyarrow.table(
        {"images": images, "texts": texts, "id": [str(i) for i in range(documents)]}
    )
    pyarrow.parquet.write_table(table, path, row_group_size=max(documents // 5, 1))
    return path
