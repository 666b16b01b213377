"""How an answer is drawn, and how its steps run on a machine."""

import hashlib
import math
from dataclasses import dataclass

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.tokenizer.common.image_form import aspect_ratio

GPU_SYNC_EVERY_TOKENS = 16
GPU_WIDTH_STEP = 256


@dataclass(frozen=True)
class GenerationOptions:
    """How to draw an answer. The defaults are the reference's, except for guidance."""

    temperature: float = 0.7
    """0 always takes the most likely token."""
    top_p: float = 0.9
    """Draw from the most likely tokens that together have at least this probability."""
    top_k: int = 0
    """Draw from this many most likely tokens; 0 draws from all."""
    repetition_penalty: float = 1.2
    """Makes text tokens that the row already has less likely: divides their positive logits, and
    multiplies negative ones. 1 changes nothing."""
    guidance: float = 1.0
    """Classifier-free guidance of image codes; 1 turns it off. The logits become
    ``without + guidance * (with - without)``, from those with and without the prompt. If
    ``guidance_image`` is set, this is the reference's text scale, which is 3.0 there."""
    guidance_image: float | None = None
    """The reference's image scale, which is 1.2 there. The logits become
    ``nothing + guidance_image * (images - nothing) + guidance * (all - images)``, from the logits
    with nothing of the prompt, with only its images, and with all of it. None is the same as
    ``guidance``."""
    max_tokens: int | None = None
    """The largest number of tokens of an answer; None allows as many as fit in the context. An
    image that does not fit is not begun."""
    images: bool = True
    """Whether the model may begin an image."""
    force: Force | None = None
    size: str | None = None
    """The shape of each image, as ``3:2`` or ``480x320`` (width and height); it gets the grid that
    is nearest to it. None lets the model choose. A tokenizer without grids draws squares alone."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer where its text contains one of them; they are not part of it."""
    seed: int = 1
    batch_size: int = 64
    """The largest number of prompts that are answered at the same time. The drawn tokens do not
    depend on it, except through rounding."""

    def check(self) -> None:
        """Refuse values outside their range.

        Raises:
            ConfigError: It names the option and its value.
        """
        image = self.guidance_image
        rules = (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("guidance", 0 <= self.guidance < math.inf, "0 or more"),
            ("guidance_image", image is None or 0 <= image < math.inf, "0 or more"),
            ("max_tokens", self.max_tokens is None or self.max_tokens > 0, "above 0"),
            ("batch_size", self.batch_size > 0, "above 0"),
        )
        for name, holds, words in rules:
            if not holds:
                value = getattr(self, name)
                raise ConfigError(name, f"{value} is not {words}", f"Use a number that is {words}")
        if self.size is not None:
            aspect_ratio(self.size)
        if "" in self.stop:
            raise ConfigError("stop", "a stop string is empty", "Give at least one character")


def seed_of(seed: int, place: int) -> int:
    """The seed of one of several answers that share a seed: its own for the first of them, and a
    hash of seed and place for the others."""
    if place == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def signed_seed(seed: int) -> int:
    """The seed as a signed number of 64 bits, as tensors and messages hold it."""
    return (seed + 2**63) % 2**64 - 2**63


@dataclass(frozen=True)
class Execution:
    """How the steps of an answer run. The drawn tokens depend on it only through rounding."""

    graph: bool = False
    """Record a step as a CUDA graph and replay it."""
    compiler: str | None = None
    """Backend of ``torch.compile`` for the layers of a step, or backend:mode, such as "inductor".
    None leaves them uncompiled."""
    sync_every_tokens: int = 1
    """How often the host waits for the device, to read new tokens and to see which rows are
    finished."""
    width_step: int = 1
    """The number of cache columns that a step reads is rounded up to a multiple of this, so that
    one graph serves many steps."""
    buckets: bool = False
    """Whether the number of rows of a step is filled up to a power of two, for the same reason."""

    @classmethod
    def on(cls, device: str, compiler: str | None = None) -> "Execution":
        """The execution that suits a device, "cuda" or "cpu"."""
        if device != "cuda":
            return cls(compiler=compiler)
        return cls(True, compiler, GPU_SYNC_EVERY_TOKENS, GPU_WIDTH_STEP, buckets=True)

    def width(self, columns: int) -> int:
        """How many columns a step reads if ``columns`` are in use."""
        return -(-columns // self.width_step) * self.width_step

    def bucket(self, rows: int) -> int:
        """How many rows a step computes if ``rows`` are in use."""
        return 1 << (rows - 1).bit_length() if self.buckets else rows

    def summary(self) -> str:
        """A line for the user, such as "steps launched one by one, layers not compiled"."""
        steps = "steps replayed as CUDA graphs" if self.graph else "steps launched one by one"
        layers = f"compiled by {self.compiler}" if self.compiler else "not compiled"
        return f"{steps}, layers {layers}"
