"""What an image tokenizer is trained on."""

from typing import Protocol

from PIL import Image


class TrainingImage(Protocol):
    """An image to train on, not yet opened."""

    @property
    def where(self) -> str:
        """What errors name."""

    @property
    def weight(self) -> float:
        """How often it is drawn relative to the others."""

    def open(self) -> Image.Image:
        """Read and decode it; raises any exception if it cannot be used, and a ``DataError`` that
        is no ``ImageError`` if a disk fails."""
