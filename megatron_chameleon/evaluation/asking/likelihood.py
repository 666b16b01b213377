"""How likely a model finds continuations, for multiple choice and perplexity.

    scores = score_continuations(session, [(context_ids, continuation_ids), ...])

The probabilities are over text tokens only. Image codes cannot appear inside a text, so they get no
probability, as in Hugging Face's ``ChameleonForConditionalGeneration`` and in our own decoding.
Letters in tensor names: B rows, S tokens, H hidden, N scored positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_chameleon.inference.session import Session

BATCH_TOKENS = 16_384
"""Tokens per forward pass, including padding."""
BLOCK_POSITIONS = 256
"""Positions whose logits are in memory at a time: 256 x 65,536 in fp32 take 64 MiB."""


@dataclass(frozen=True)
class ContinuationScore:
    """How likely the model finds one continuation."""

    log_likelihood: float
    """Natural logarithm of the continuation's probability, given its context."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class _SharedInputs:
    """Inputs that several pairs share, with each pair's targets. They need one forward pass."""

    inputs: tuple[int, ...]
    targets: list[tuple[int, tuple[int, ...]]]
    """Per pair: (its index, its continuation)."""


def score_continuations(
    session: "Session",
    pairs: Sequence[Pair],
    batch_tokens: int = BATCH_TOKENS,
    block_positions: int = BLOCK_POSITIONS,
    report: Callable[[dict[int, ContinuationScore]], None] = lambda scores: None,
) -> list[ContinuationScore]:
    """Score continuations, longest first; each batch is one forward pass.

    Args:
        session: The model. A pair that is longer than its context loses its beginning.
        pairs: Context and continuation as token ids, neither of them empty. Only contexts may
            contain image codes.
        batch_tokens: The most tokens per forward pass, including padding. A batch has at least one
            row.
        block_positions: Positions whose logits are in memory at a time.
        report: Called after each batch with the scores by index of the pair.

    Returns:
        One score per pair, in the order of the pairs.
    """
    scores: dict[int, ContinuationScore] = {}
    forbidden_V = torch.zeros(session.model.lm_head.weight.shape[0], dtype=torch.bool)
    vocabulary = session.tokenizer.vocabulary
    for token_ids in (vocabulary.code_token_ids, vocabulary.tokens_beside_codes):
        forbidden_V[torch.as_tensor(token_ids.copy())] = True
    forbidden_V = forbidden_V.to(session.device)
    for batch in _batches(_group_by_inputs(pairs, session.context_tokens), batch_tokens):
        found = _score_batch(session, batch, forbidden_V, block_positions)
        scores.update(found)
        report(found)
    return [scores[index] for index in range(len(pairs))]


def _group_by_inputs(pairs: Sequence[Pair], context_tokens: int) -> list[_SharedInputs]:
    """One row per distinct input, longest first. The answers A to D to a question share a row."""
    rows: dict[tuple[int, ...], _SharedInputs] = {}
    for index, (context, continuation) in enumerate(pairs):
        assert context and continuation
        kept = [*context, *continuation][-(context_tokens + 1) :]
        inputs = tuple(kept[:-1])
        target = tuple(kept[-min(len(continuation), len(inputs)) :])
        rows.setdefault(inputs, _SharedInputs(inputs, [])).targets.append((index, target))
    return sorted(rows.values(), key=lambda row: len(row.inputs), reverse=True)


def _batches(rows: Sequence[_SharedInputs], batch_tokens: int) -> Iterator[list[_SharedInputs]]:
    start = 0
    while start < len(rows):
        count = max(1, batch_tokens // len(rows[start].inputs))
        yield list(rows[start : start + count])
        start += count


@torch.inference_mode()
def _score_batch(
    session: "Session", rows: Sequence[_SharedInputs], forbidden_V: Tensor, block_positions: int
) -> dict[int, ContinuationScore]:
    width = len(rows[0].inputs)
    pad = session.tokenizer.vocabulary.pad
    # Padding is on the right, where no token of the row sees it, so it needs no mask.
    tokens_BS = torch.tensor([[*r.inputs, *[pad] * (width - len(r.inputs))] for r in rows])
    hidden_BSH = session.model.model(
        input_ids=tokens_BS.to(session.device), use_cache=False
    ).last_hidden_state
    places = [
        (row, len(rows[row].inputs) - len(target) + offset, token_id, index)
        for row in range(len(rows))
        for index, target in rows[row].targets
        for offset, token_id in enumerate(target)
    ]
    sums = {index: 0.0 for row in rows for index, _ in row.targets}
    greedy = dict.fromkeys(sums, True)
    for start in range(0, len(places), block_positions):
        block = places[start : start + block_positions]
        row_N, position_N, target_N, _ = torch.tensor(block, device=session.device).unbind(1)
        logits_NV = session.model.lm_head(hidden_BSH[row_N, position_N]).float()
        logits_NV.masked_fill_(forbidden_V, -torch.inf)
        target_N1 = target_N[:, None]
        chosen_N = logits_NV.gather(1, target_N1)[:, 0] - logits_NV.logsumexp(dim=-1)
        likeliest_N = logits_NV.argmax(dim=-1) == target_N
        found = zip(block, chosen_N.tolist(), likeliest_N.tolist(), strict=True)
        for (_, _, _, index), log_probability, likeliest in found:
            sums[index] += log_probability
            greedy[index] = greedy[index] and likeliest
    return {index: ContinuationScore(sums[index], greedy[index]) for index in sums}
