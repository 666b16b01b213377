"""How an answer is drawn, and how the drawing runs on a machine."""

from dataclasses import dataclass

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.modality import Force

GPU_SYNC_EVERY_TOKENS = 16
GPU_WIDTH_STEP = 256


@dataclass(frozen=True)
class GenerationOptions:
    """How to draw an answer. The defaults are the reference's, guidance apart."""

    temperature: float = 0.7
    """0 takes the likeliest token each time."""
    top_p: float = 0.9
    """Draw from the likeliest tokens that have at least this probability together."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 from all."""
    repetition_penalty: float = 1.2
    """Divides the logits of text tokens that the row already has; 1 changes nothing."""
    guidance: float = 1.0
    """Classifier-free guidance of image codes; 1 is off. The logits become
    ``without + guidance * (with - without)`` the prompt. With ``guidance_image`` it is the
    reference's text scale, 3.0 there."""
    guidance_image: float | None = None
    """The reference's image scale, 1.2 there: ``nothing + guidance_image * (images - nothing) +
    guidance * (all - images)``, logits with nothing of the prompt, with its images alone, and with
    all of it. None is the same as ``guidance``."""
    max_tokens: int | None = None
    """Tokens of an answer; None fills the context. An image that does not fit is not begun."""
    images: bool = True
    """Whether the model may begin an image."""
    force: Force | None = None
    seed: int = 1
    batch_size: int = 64
    """Prompts that are answered together. The drawn numbers depend on it."""

    def check(self) -> None:
        """Refuse values that have no meaning.

        Raises:
            ConfigError: It names the value.
        """
        image = self.guidance_image
        rules = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("guidance", self.guidance >= 0, "0 or more"),
            ("guidance_image", image is None or image >= 0, "0 or more"),
            ("max_tokens", self.max_tokens is None or self.max_tokens > 0, "above 0"),
            ("batch_size", self.batch_size > 0, "above 0"),
        )
        for name, holds, words in rules:
            if not holds:
                value = getattr(self, name)
                raise ConfigError(name, f"{value} is not {words}", f"Give a number {words}")


@dataclass(frozen=True)
class Execution:
    """How the steps of an answer run. The drawn tokens do not depend on it, but for rounding."""

    graph: bool = False
    """Record a step as a CUDA graph and replay it."""
    compiler: str | None = None
    """Backend of ``torch.compile`` for the layers of a step, or backend:mode, such as "inductor";
    None: as they are."""
    sync_every_tokens: int = 1
    """How often the host waits to see which rows are finished, and new tokens come out."""
    width_step: int = 1
    """Columns of the cache that a step reads are rounded up to a multiple of this, so that one
    graph serves many steps."""

    @classmethod
    def on(cls, device: str, compiler: str | None = None) -> "Execution":
        """What suits a device: "cuda" or "cpu"."""
        if device != "cuda":
            return cls(compiler=compiler)
        return cls(True, compiler, GPU_SYNC_EVERY_TOKENS, GPU_WIDTH_STEP)

    def width(self, columns: int) -> int:
        """Columns that a step reads where ``columns`` are in use."""
        return -(-columns // self.width_step) * self.width_step

    def summary(self) -> str:
        """For the user: "steps launched one by one, layers as they are"."""
        steps = "steps replayed as CUDA graphs" if self.graph else "steps launched one by one"
        layers = f"compiled by {self.compiler}" if self.compiler else "as they are"
        return f"{steps}, layers {layers}"
