"""The sections of the config that only fine-tuning uses."""

from dataclasses import dataclass, field
from typing import Annotated

from megatron_chameleon.config.constraints import Above, Below, Between, OneOf, PathText

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a transformer layer, as the exported Hugging Face model names them."""
LinearLayer = Annotated[str, OneOf(*LINEAR_LAYERS)]


@dataclass
class AdapterConfig:
    """Low-rank adapters (LoRA): small matrices beside frozen weights, which alone are trained.

    Source: Hu et al., arXiv 2106.09685. Names and numbers are those of the ``peft`` library.
    """

    rank: Annotated[int, Between(0, 2**14)] = 0
    """Rank of the two matrices A [rank, in] and B [out, rank] of each linear layer; 0: no adapter,
    the model itself is trained."""
    alpha: Annotated[float, Above(0, at_most=1e6)] = 16.0
    """What the adapter adds to a layer's output is ``alpha / rank * B A x``."""
    dropout: Annotated[float, Below(0, 1)] = 0.0
    """Dropout rate of the adapters' input."""
    target_modules: list[LinearLayer] = field(default_factory=lambda: list(LINEAR_LAYERS))
    """The linear layers that get an adapter, in every transformer layer."""
    dora: bool = False
    """Also train the length of each row of the adapted weights (DoRA, arXiv 2402.09353)."""
    quantize: Annotated[str, OneOf("none", "nf4")] = "none"
    """Format of the frozen linear layers beside the adapters: none keeps that of training; nf4
    takes about 4 bits per number (QLoRA, Dettmers et al., arXiv 2305.14314), with bitsandbytes."""
    start_from: PathText | None = None
    """A folder of ``peft`` with the adapter to begin from; null: A is random and B is zero."""
    base: PathText | None = None
    """Where the frozen weights lie now, if they were moved after the run began; null: where the run
    found them."""


@dataclass
class DpoConfig:
    """Preference tuning by direct preference optimization, with ``training.objective: dpo``.

    Source: Rafailov et al., arXiv 2305.18290, equation 7.
    """

    beta: Annotated[float, Above(0, at_most=1e3)] = 0.1
    """How strongly the model is held to the reference, which are the weights that the run begins
    with: the larger, the closer it stays."""
    label_smoothing: Annotated[float, Below(0, 0.5)] = 0.0
    """Share of the pairs in which the wrong answer may have been preferred (conservative DPO)."""
    rpo_alpha: Annotated[float, Between(0, 1e3)] = 0.0
    """Weight of a further term, the mean cross-entropy over the tokens of the chosen answer. It
    keeps the chosen answers from becoming unlikely (arXiv 2404.19733)."""
