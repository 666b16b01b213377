"""Loads a tokenizer folder and checks that its files belong together.

It holds text.model, vocabulary.json, image.safetensors and image.json. A Hugging Face folder that
``chameleon convert`` wrote has them too, the last two in ``image_tokenizer/``.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import open_to_read, why_no_folder
from megatron_chameleon.tokenizer.common.files import (
    IMAGE_CONFIG_FILE,
    IMAGE_WEIGHTS_FILE,
    tokenizer_file,
)
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE, Vocabulary
from megatron_chameleon.tokenizer.image.facts import (
    VQGAN,
    codes_and_grid,
    described_network,
    read_facts,
)
from megatron_chameleon.tokenizer.text.tokenizer import TEXT_MODEL_FILE, TextTokenizer

if TYPE_CHECKING:  # text alone needs no torch
    import torch

    from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer

FINGERPRINTED_FILES = (TEXT_MODEL_FILE, VOCABULARY_FILE, IMAGE_CONFIG_FILE, IMAGE_WEIGHTS_FILE)

_MODEL_FILES = (
    *("config.json", "params.json", "tokenizer.json", "adapter_config.json", "state.json"),
    *("checkpoints", "models", "model.safetensors.index.json", "consolidated.pth"),
)
"""One of these files or folders is in most folders of a model or of a run."""


@dataclass(frozen=True)
class Tokenizer:
    """Both tokenizers and the vocabulary that joins them."""

    folder: Path
    vocabulary: Vocabulary
    text: TextTokenizer
    image: "ImageTokenizer | None"
    """None if the folder was loaded without images, or has none."""
    fingerprint: str
    """Changes with any byte that could change an id (``fingerprint``)."""
    given: str = ""
    """The folder that the user named, if the files were put together from it; else empty."""

    @property
    def origin(self) -> str:
        """The folder that people know it by, for messages and for what names its tokenizer."""
        return self.given or str(self.folder)

    @property
    def network(self) -> str:
        """The name of the image tokenizer's network, such as vqgan; empty if there is none."""
        return described_network(self.folder) if self.image is not None else ""

    @property
    def drawn_codes(self) -> int:
        """The codes of a square image that can be drawn; 0 if none can, as without a decoder."""
        return self.image.codes_per_image if self.image and self.image.has_decoder else 0

    @cached_property
    def image_form(self) -> ImageForm:
        """The form in a sequence of tokens of the images that can be drawn."""
        return ImageForm(self.vocabulary, self.drawn_codes)


def load_tokenizer(
    folder: str | Path, *, images: bool | None = True, device: "str | torch.device" = "cpu"
) -> Tokenizer:
    """Load a tokenizer folder and check that its parts belong together.

    Args:
        folder: Written by ``chameleon tokenizer text`` and ``chameleon tokenizer image``.
        images: Whether the image tokenizer is needed; if not, it is neither loaded nor required to
            exist. None: it is loaded if the folder has one.
        device: Where the image tokenizer runs.

    Raises:
        DataError: If the folder or a file in it is missing, or two files contradict each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            str(folder),
            why_no_folder(folder),
            "Give a folder made by `chameleon tokenizer text` and `chameleon tokenizer image`",
        )
    if not any(os.path.lexists(folder / name) for name in FINGERPRINTED_FILES):
        raise _not_a_tokenizer(folder)
    vocabulary = Vocabulary.load(folder)
    text = TextTokenizer.load(folder)
    if tuple(text.tokens) != vocabulary.tokens:
        raise DataError(
            str(folder),
            f"{TEXT_MODEL_FILE} ({text.size} tokens) and {VOCABULARY_FILE} "
            f"({vocabulary.size} tokens) have different tokens",
            "Run `chameleon tokenizer text` again, or copy both files from the same run",
        )
    if images is None:
        images = has_image_tokenizer(folder)
    image = load_image_tokenizer(folder, vocabulary, device) if images else None
    return Tokenizer(folder, vocabulary, text, image, fingerprint(folder))


def _not_a_tokenizer(folder: Path) -> DataError:
    """The error of a folder without a vocabulary, which may be a model's or that of a run."""
    what = f"is not a tokenizer folder: it has neither {VOCABULARY_FILE} nor {TEXT_MODEL_FILE}"
    remedy = "Give a folder made by `chameleon tokenizer text` and `chameleon tokenizer image`"
    inside = folder / "tokenizer"
    if (inside / VOCABULARY_FILE).is_file():
        remedy = f"Give {inside}"
    elif any((folder / name).exists() for name in _MODEL_FILES):
        remedy = "It seems to be a model's: --tokenizer takes the tokenizer out of it, and "
        remedy += "--start-from in place of tokenizer.path does so for a run"
    return DataError(str(folder), what, remedy)


def has_image_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer folder has any file of an image tokenizer."""
    names = (IMAGE_CONFIG_FILE, IMAGE_WEIGHTS_FILE)
    return any(tokenizer_file(folder, name).is_file() for name in names)


def has_another_network(folder: str | Path) -> bool:
    """Whether a folder has an image tokenizer whose network is not Chameleon's VQGAN.

    A damaged image.json says of none; whoever loads the tokenizer finds the damage.
    """
    try:
        return has_image_tokenizer(folder) and described_network(folder) != VQGAN
    except DataError:
        return False


def codes_of_picture(folder: str | Path) -> int:
    """The codes of an image, from image.json alone.

    Raises:
        DataError: The file is missing or unreadable.
    """
    return codes_and_grid(folder)[1]


def drawn_codes(folder: str | Path) -> int:
    """As ``Tokenizer.drawn_codes``, without loading any weights.

    Raises:
        DataError: A file is unreadable.
    """
    if not has_image_tokenizer(folder):
        return 0
    facts = read_facts(folder)
    return facts.codes_per_image if facts.has_decoder else 0


def load_image_tokenizer(
    folder: str | Path,
    vocabulary: Vocabulary,
    device: "str | torch.device" = "cpu",
    dtype: str = "fp32",
) -> "ImageTokenizer":
    """Load the image tokenizer of a tokenizer folder.

    Args:
        folder: The tokenizer folder.
        vocabulary: The vocabulary of the folder.
        device: Where it runs.
        dtype: Type of the convolutions: fp32 or bf16.

    Raises:
        DataError: If a file is missing or broken, or the size of the codebook is not that of the
            vocabulary.
    """
    import torch

    from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer

    of_convolutions = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    image = ImageTokenizer.load(folder, device, of_convolutions, vocabulary.shapes)
    if image.codebook_size != vocabulary.image_codes:
        raise DataError(
            str(folder),
            f"the image tokenizer has {image.codebook_size} codes, "
            f"the vocabulary {vocabulary.image_codes}",
            f"Run `chameleon tokenizer text` again with --image-codes {image.codebook_size}, "
            f"or `chameleon tokenizer image` for {vocabulary.image_codes} codes (--from, or "
            f"model.codebook_size={vocabulary.image_codes})",
        )
    return image


def fingerprint(folder: str | Path) -> str:
    """SHA-256 (hexadecimal) over the names and bytes of the tokenizer files in a folder.

    Token files and checkpoints carry it, so that a model never gets ids from another tokenizer.
    """
    digest = hashlib.sha256()
    for name in FINGERPRINTED_FILES:
        path = tokenizer_file(folder, name)
        if path.is_file():
            with open_to_read(path) as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()
