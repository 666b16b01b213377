"""A model for the engine whose logits are random numbers, over a vocabulary of a few tokens."""

import time

import torch
from torch import Tensor

from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.cached_model import Attend
from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.tokenizer.common.grids import Shapes
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary, control_names

CODES_PER_IMAGE = 3
NAMES = ["<s>", "<pad>", "</s>", "<unk>", *control_names(4), "a", "b", "c"]
VOCABULARY = Vocabulary.from_tokens(NAMES)
CLASSES = TokenClasses(VOCABULARY)
FORM = ImageForm(VOCABULARY, CODES_PER_IMAGE)

SHAPED = Vocabulary.from_tokens(
    ["<s>", "<pad>", "</s>", "<unk>", *control_names(4, Shapes(12, 4)), "a", "b", "c"]
)
SHAPED_FORM = ImageForm(SHAPED, 9)


class RandomModel:
    """``CachedModel`` of one layer. It prefers what the rules forbid as often as what they allow.

    Args:
        seed: Of the numbers.
        endless: Whether it never prefers the end of an answer.

    Attributes:
        broken: What the last row's keys, values and a logit become in the next call.
        error: What the next call raises.
        seconds: How long a call takes.
    """

    classes, form = CLASSES, FORM
    device, dtype = torch.device("cpu"), torch.float32
    num_layers, num_key_heads, head_dim, context_tokens = 1, 2, 4, 40

    def __init__(self, seed: int = 1, *, endless: bool = False) -> None:
        self._generator, self._endless = torch.Generator().manual_seed(seed), endless
        self.broken: float | None = None
        self.error: Exception | None = None
        self.seconds = 0.0

    def hidden(
        self, token_ids_RS: Tensor, positions_RS: Tensor, last_R: Tensor, attend: Attend
    ) -> Tensor:
        time.sleep(self.seconds)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        rows, tokens = token_ids_RS.shape
        assert int(positions_RS.max()) < self.context_tokens
        states = torch.randn(3, rows, 2, tokens, 4, generator=self._generator)
        whole = rows
        if self.broken is not None:
            states[:, -1], whole = self.broken, rows - 1
        attended = attend(0, *states)
        assert attended.shape == states[0].shape
        assert attended[:whole].isfinite().all(), "nothing comes from another row"
        return attended[:, 0, 0]

    def logits(self, last_RH: Tensor, codes_only: bool = False) -> Tensor:
        count = len(self.classes.code_token_ids) if codes_only else len(self.classes.code_V)
        logits = self._scale(last_RH) * torch.randn(len(last_RH), count, generator=self._generator)
        if self._endless and not codes_only:
            logits[:, self.classes.eos] = -100
        if self.broken is not None:
            logits[-1, 0], self.broken = self.broken, None
        return logits

    def _scale(self, last_RH: Tensor) -> Tensor | int:
        """How large the logits are."""
        return 3

    def decoder(self, **settings) -> ContinuousDecoder:
        return ContinuousDecoder(self, self.classes, self.form, **settings)


class ShapedModel(RandomModel):
    """A model whose images have any shape, and whose logits may be huge: all of them may be equal,
    and what is forbidden may be preferred by far."""

    classes, form, context_tokens = TokenClasses(SHAPED), SHAPED_FORM, 90

    def _scale(self, last_RH: Tensor) -> Tensor:
        kinds = torch.tensor([0.0, 1e-30, 3.0, 1e4, 1e30])
        return kinds[torch.randint(len(kinds), (len(last_RH), 1), generator=self._generator)]
