"""Draw token ids one by one: the modality state's masks, sampling, guidance, key/value cache.

Letters in tensor names: B rows of the batch, S tokens, V vocabulary, C columns of the cache.
Source of the sampling rules and defaults: paper, section 2.4, and the reference inference code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.modality import Force, ModalityState, TokenClasses


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
    ``without + guidance * (with - without)`` the prompt."""
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
        rules = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("guidance", self.guidance >= 0, "0 or more"),
            ("max_tokens", self.max_tokens is None or self.max_tokens > 0, "above 0"),
            ("batch_size", self.batch_size > 0, "above 0"),
        )
        for name, holds, words in rules:
            if not holds:
                value = getattr(self, name)
                raise ConfigError(name, f"{value} is not {words}", f"Give a number {words}")


class CachedContext:
    """A model's view of a batch that grows by columns; the cache keeps what was computed.

    A column can be hidden from a row: it is never attended to and takes no position. So rows of
    different length are padded on the left, and every row gets the positions it would have alone.

    Args:
        model: ``ChameleonForConditionalGeneration``. Its transformer and its head are called one
            after the other,
            because its own ``forward`` forbids image codes.
    """

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._visible_BC: Tensor | None = None

    def step(self, token_ids_BS: Tensor, visible_BS: Tensor) -> Tensor:
        """Append columns.

        Args:
            token_ids_BS: int64 [B, S].
            visible_BS: bool [B, S]; False hides the column from its row.

        Returns:
            Logits of the last column, fp32 [B, V].
        """
        before_BC = visible_BS[:, :0] if self._visible_BC is None else self._visible_BC
        self._visible_BC = torch.cat([before_BC, visible_BS], dim=1)
        positions_BC = self._visible_BC.long().cumsum(dim=1) - 1
        hidden_BSH = self._model.model(
            input_ids=token_ids_BS,
            attention_mask=self._visible_BC.long(),
            position_ids=positions_BC[:, before_BC.shape[1] :].clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return self._model.lm_head(hidden_BSH[:, -1]).float()

    def forget(self, rows_B: Tensor, keep_columns: int) -> None:
        """Hide all but the first columns from some rows: bool [B]."""
        assert self._visible_BC is not None
        self._visible_BC[rows_B, keep_columns:] = False


def choose(
    logits_BV: Tensor, allowed_BV: Tensor, options: GenerationOptions, generator: torch.Generator
) -> Tensor:
    """One token id for each row.

    Args:
        logits_BV: fp32 [B, V].
        allowed_BV: bool [B, V], at least one True a row.
        options: Temperature, top_k and top_p, applied in this order.
        generator: The source of randomness; unused at temperature 0.

    Returns:
        int64 [B].
    """
    logits_BV = logits_BV.masked_fill(~allowed_BV, -torch.inf)
    if options.temperature == 0:
        return logits_BV.argmax(dim=-1)
    ordered_BV, ids_BV = logits_BV.div(options.temperature).sort(dim=-1, descending=True)
    if options.top_k:
        ordered_BV[:, options.top_k :] = -torch.inf
    probabilities_BV = ordered_BV.softmax(dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    if options.top_p < 1:
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= options.top_p, 0.0)
    place_B1 = torch.multinomial(probabilities_BV, 1, generator=generator)
    return ids_BV.gather(1, place_B1)[:, 0]


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that a row has already less likely. Source: CTRL, section 4.1."""
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalised_BV, logits_BV)


class Guide:
    """The pass without the prompt: a row sees ``<s>`` and the image that it is drawing.

    Args:
        model: ``ChameleonForConditionalGeneration``.
        bos: Token id of ``<s>``.
        batch: Rows.
        device: The model's.
    """

    def __init__(self, model: Any, bos: int, batch: int, device: torch.device) -> None:
        self._context = CachedContext(model)
        start_B1 = torch.full((batch, 1), bos, device=device)
        self._logits_BV = self._context.step(start_B1, torch.ones_like(start_B1, dtype=torch.bool))

    def guide(self, logits_BV: Tensor, in_image_B: Tensor, scale: float) -> Tensor:
        """Move the logits of rows that are in an image away from those without the prompt."""
        guided_BV = self._logits_BV + scale * (logits_BV - self._logits_BV)
        return torch.where(in_image_B[:, None], guided_BV, logits_BV)

    def advance(self, token_ids_B: Tensor, in_image_B: Tensor) -> None:
        """Show the token to the rows that are in an image; the others forget the one they had."""
        self._context.forget(~in_image_B, keep_columns=1)
        self._logits_BV = self._context.step(token_ids_B[:, None], in_image_B[:, None])


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    classes: TokenClasses,
    codes_per_image: int,
    rooms: Sequence[int],
    options: GenerationOptions,
    generator: torch.Generator,
) -> list[list[int]]:
    """Answer a batch of prompts.

    Args:
        model: ``ChameleonForConditionalGeneration``, in eval mode.
        prompts: Token ids, each with ``<s>`` first; lengths may differ.
        classes: Token classes on the model's device.
        codes_per_image: Codes of one image.
        rooms: Most tokens that each answer may have.
        options: How to draw.
        generator: On the model's device.

    Returns:
        The answers' token ids, ``</s>`` included where a row reached it.
    """
    device = classes.code_V.device
    tokens_BS, visible_BS = _pad_left(prompts, classes.pad, device)
    state = ModalityState(
        classes,
        codes_per_image,
        torch.tensor(rooms, device=device),
        images=options.images,
        force=options.force,
    )
    context = CachedContext(model)
    guided = options.guidance != 1.0
    guide = Guide(model, classes.bos, len(prompts), device) if guided else None
    logits_BV = context.step(tokens_BS, visible_BS)
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter_(1, tokens_BS, True)
    seen_BV &= classes.text_V
    columns: list[Tensor] = []
    while True:
        if guide:
            logits_BV = guide.guide(logits_BV, state.in_image_B, options.guidance)
        logits_BV = penalise_repetition(logits_BV, seen_BV, options.repetition_penalty)
        tokens_B = choose(logits_BV, state.allowed(), options, generator)
        active_B = ~state.finished_B
        columns.append(torch.where(active_B, tokens_B, -1))
        state.advance(tokens_B)
        if bool(state.finished_B.all()):
            break
        seen_BV = seen_BV.scatter(1, tokens_B[:, None], True) & classes.text_V
        if guide:
            guide.advance(tokens_B, state.in_image_B)
        logits_BV = context.step(tokens_B[:, None], active_B[:, None])
    rows = torch.stack(columns, dim=1).tolist()
    return [[token_id for token_id in row if token_id >= 0] for row in rows]


def _pad_left(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and visibility, both [B, longest prompt]."""
    width = max(len(prompt) for prompt in prompts)
    rows = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    visible = [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(visible, device=device)
