"""A tiny project for the real command: captioned digits, tokenizer, token files, config."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklearn.datasets import load_digits

from run_command import run_chameleon

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
IMAGE_CODES = 32


@dataclass(frozen=True)
class TinyProject:
    """Everything that a training run needs, made by the real commands."""

    folder: Path
    documents: Path
    tokenizer: Path
    tokens: Path
    """Prefix of the token files."""
    config: Path

    def metrics(self, run: str) -> list[dict[str, Any]]:
        lines = (self.folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def train(
        self, run: str, *overrides: str, processes: int = 1, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """``chameleon train`` into FOLDER/run."""
        run_dir = f"logging.run_dir={self.folder / run}"
        return run_chameleon(
            "train", self.config, run_dir, *overrides, processes=processes, **options
        )


CONFIG = """
model: {{num_layers: 4, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4,
  seq_length: 64}}
tokenizer: {{path: {folder}/tokenizer}}
data:
  stage1: [{{prefix: {folder}/tokens, weight: 1.0, image_first: 0.5}}]
  stage2: [{{prefix: {folder}/tokens, weight: 1.0}}]
optimizer: {{lr: 1.0e-2, lr_warmup_steps: 2}}
training: {{steps: 20, micro_batch_size: 2, global_batch_size: 8, z_loss: 1.0e-2}}
logging: {{every_steps: 5}}
"""

IMAGE_CONFIG = """
model: {{resolution: 16, base_channels: 32, ch_mult: [1, 1, 1], num_res_blocks: 1, z_channels: 8,
  embed_dim: 8, codebook_size: {codes}}}
training: {{steps: 10, batch_size: 8, lr: 1.0e-3, holdout: 0}}
"""


def make_tiny_project(folder: Path) -> TinyProject:
    """Make 60 captioned digits, a briefly trained tokenizer, and token files."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    lines = []
    for i in range(60):
        image = Image.fromarray((digits.images[i] * 15.9).astype("uint8"))
        image.resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        text = {"type": "text", "text": f"a handwritten {WORDS[digits.target[i]]}, number {i}"}
        content = [text, {"type": "image", "image": f"{i}.png"}]
        lines.append(json.dumps({"id": str(i), "source": "digits", "content": content}) + "\n")
    documents = folder / "documents.jsonl"
    documents.write_text("".join(lines), encoding="utf-8")
    (folder / "image.yaml").write_text(IMAGE_CONFIG.format(codes=IMAGE_CODES), encoding="utf-8")
    tokenizer = folder / "tokenizer"
    sizes = ("--vocab-size", 352, "--image-codes", IMAGE_CODES)
    run_chameleon("tokenizer", "text", documents, "--output", tokenizer, *sizes)
    images = ("--config", folder / "image.yaml", "--output", tokenizer)
    run_chameleon("tokenizer", "image", documents, *images)
    tokens = folder / "tokens"
    run_chameleon("preprocess", documents, "--tokenizer", tokenizer, "--output", tokens)
    return _project_in(folder)


def copy_tiny_project(project: TinyProject, folder: Path) -> TinyProject:
    """A copy with room for runs of its own; two test files may give their runs the same name."""
    shutil.copytree(project.folder, folder, dirs_exist_ok=True)
    return _project_in(folder)


def _project_in(folder: Path) -> TinyProject:
    config = folder / "train.yaml"
    config.write_text(CONFIG.format(folder=folder), encoding="utf-8")
    documents, tokenizer, tokens = (folder / n for n in ("documents.jsonl", "tokenizer", "tokens"))
    return TinyProject(folder, documents, tokenizer, tokens, config)
