"""Draw one token id per row: each row by its own settings and from its own uniform number.

    settings = RowSettings.of([GenerationOptions(top_p=0.9), GenerationOptions(temperature=0)])
    tokens_B = draw(logits_BV, settings, uniforms(seeds_B, counts_B))

A token is found by inverting a cumulative distribution, so a row needs one uniform number, and its
token does not depend on the rows beside it. A row without top_k and top_p adds up its tokens in
the order of their ids. A row with one of them adds them up from the most likely one on, and equally
likely ones in the order of their ids.

Nothing here waits for a GPU, and shapes are fixed, so that a CUDA graph can hold it. On a CPU,
reading a value costs nothing, so sorting stops as soon as the likely tokens suffice.

Letters in tensor names: B rows of the batch, V vocabulary (within an image, only its codes), K the
most likely tokens, N blocks of W weights.
"""

import numpy as np
import torch
from torch import Tensor

from megatron_chameleon.inference.engine.row_settings import NO_LIMIT, RowSettings

BLOCK = 256
"""Many weights are added up by blocks, and one by one only within the block that is hit."""
FEW = 4096
"""So many logits are sorted at once, and their weights added up one by one."""
CANDIDATES = (128, 2048)
"""How many of more logits are sorted on a CPU before all of them are."""
BELOW = 1 - 2**-52
"""The product with this is smaller, for every number that is not denormal."""
_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as a signed number


def reading_is_free(device: torch.device) -> bool:
    """Whether the host can look at values without waiting, and choose what to compute."""
    return device.type == "cpu"


def draw(logits_BV: Tensor, settings: RowSettings, uniform_B: Tensor) -> Tensor:
    """Draw the index of one logit per row, by temperature, top_k and top_p, in this order.

    Args:
        logits_BV: fp32 [B, V]; -inf is never drawn. Each row has a larger one.
        settings: Of the B rows.
        uniform_B: Numbers in [0, 1); fp64 has the finest steps.

    Returns:
        int64 [B].
    """
    kind, tokens_B = settings.kind, None
    if kind.free:
        weights = _Weights(logits_BV, logits_BV.amax(1, keepdim=True), settings.temperature_B1)
        tokens_B = weights.place(uniform_B[:, None] * weights.total_B1)[:, 0]
    if kind.filtered:
        chosen_B = _draw_filtered(logits_BV, settings, uniform_B[:, None])
        tokens_B = _either(settings.filtered_B, chosen_B, tokens_B)
    if kind.greedy:
        tokens_B = _either(settings.greedy_B, _largest(logits_BV), tokens_B)
    assert tokens_B is not None, "there are no rows"
    return tokens_B


def uniforms(seeds_B: Tensor, counts_B: Tensor) -> Tensor:
    """A number in [0, 1) for token ``counts_B`` of an answer with seed ``seeds_B``: fp64 [B].

    Both are int64 [B]. It is SplitMix64 with the seed's own output as its start, so that the
    numbers of neighbouring seeds have nothing in common. Source: Steele et al. 2014, section 5.
    """
    mixed_B = _split_mix(_split_mix(seeds_B) + counts_B * _GAMMA)
    return ((mixed_B >> 11) & (2**53 - 1)).double() * 2.0**-53


def forbid(logits_BV: Tensor, limits_KV: Tensor, kinds_B: Tensor) -> Tensor:
    """Set the logits of tokens that may not come next to -inf.

    Whatever a broken model computes (NaN, infinities), an allowed token stays the largest.

    Args:
        logits_BV: fp32 [B, V], which is changed.
        limits_KV: fp32 [K, V], ``TokenClasses.limits_KV``.
        kinds_B: int64 [B], the row of ``limits_KV`` for each row.

    Returns:
        ``logits_BV``.
    """
    logits_BV.nan_to_num_(nan=torch.finfo(torch.float32).min)
    if reading_is_free(logits_BV.device) and bool((kinds_B == kinds_B[0]).all()):
        kinds_B = kinds_B[:1]
    # several times as fast as masked_fill, which is not vectorised on a CPU
    return torch.minimum(logits_BV, limits_KV.index_select(0, kinds_B), out=logits_BV)


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float | Tensor) -> Tensor:
    """Make tokens less likely that a row already has. Source: CTRL, section 4.1.

    Args:
        logits_BV: fp32 [B, V], which is changed.
        seen_BV: bool [B, V].
        penalty: Of all rows, or fp32 [B].

    Returns:
        ``logits_BV``.
    """
    if not isinstance(penalty, Tensor):
        if penalty == 1:
            return logits_BV
        penalty = logits_BV.new_full((len(logits_BV),), penalty)
    if reading_is_free(logits_BV.device):  # only the few that were seen
        rows, columns = seen_BV.nonzero(as_tuple=True)
        logits, penalties = logits_BV[rows, columns], penalty[rows]
        logits_BV[rows, columns] = torch.where(logits > 0, logits / penalties, logits * penalties)
        return logits_BV
    penalty_B1 = penalty[:, None]
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return logits_BV.copy_(torch.where(seen_BV, penalised_BV, logits_BV))


class _Weights:
    """Weights of tokens in some order: 1 for the most likely, in proportion to probability.

    Args:
        logits_BK: fp32 [B, K].
        largest_B1: fp32 [B, 1], of each row.
        temperature_B1: fp32 [B, 1].
    """

    def __init__(self, logits_BK: Tensor, largest_B1: Tensor, temperature_B1: Tensor) -> None:
        weights_BK = (logits_BK - largest_B1).div_(temperature_B1).exp_()
        self.count = weights_BK.shape[1]
        self._blocks_BNW = _in_blocks(weights_BK, 0.0) if weights_BK.shape[1] > FEW else None
        if self._blocks_BNW is None:
            self._ends_BN = weights_BK.cumsum(-1, dtype=torch.float64)
        else:
            self._ends_BN = self._blocks_BNW.sum(-1, dtype=torch.float64).cumsum_(-1)
        self.total_B1 = self._ends_BN[:, -1:]
        """fp64 [B, 1]."""

    def place(self, wanted_B1: Tensor, *, reached: bool = False) -> Tensor:
        """The first place with more weight up to it than wanted (if ``reached``, or as much).

        Returns:
            int64 [B, 1]. Unless ``reached``, a weight of 0 is never hit, whatever the rounding.
            For weights that are NaN, it is the last place.
        """
        wanted_B1 = torch.minimum(wanted_B1, self.total_B1 * BELOW)
        block_B1 = torch.searchsorted(self._ends_BN, wanted_B1, right=not reached)
        block_B1.clamp_(max=self._ends_BN.shape[1] - 1)
        if self._blocks_BNW is None:
            return block_B1
        inside_BW, before_B1 = self._inside(self._blocks_BNW, block_B1)
        wanted_B1 = torch.minimum(wanted_B1 - before_B1, inside_BW[:, -1:] * BELOW)
        within_B1 = torch.searchsorted(inside_BW, wanted_B1, right=not reached)
        return (block_B1 * BLOCK + within_B1).clamp_(max=self.count - 1)

    def up_to(self, place_B1: Tensor) -> Tensor:
        """The weight up to a place and of it: fp64 [B, 1]."""
        if self._blocks_BNW is None:
            return self._ends_BN.gather(1, place_B1)
        inside_BW, before_B1 = self._inside(self._blocks_BNW, place_B1 // BLOCK)
        return before_B1 + inside_BW.gather(1, place_B1 % BLOCK)

    def _inside(self, blocks_BNW: Tensor, block_B1: Tensor) -> tuple[Tensor, Tensor]:
        """The cumulative weights inside a block [B, W], and the weight before it [B, 1]."""
        inside_BW = _block(blocks_BNW, block_B1).cumsum(-1, dtype=torch.float64)
        before_B1 = self._ends_BN.gather(1, (block_B1 - 1).clamp_(min=0))
        return inside_BW, before_B1.masked_fill_(block_B1 == 0, 0.0)


def _draw_filtered(logits_BV: Tensor, settings: RowSettings, uniform_B1: Tensor) -> Tensor:
    """Draw in rows with top_k or top_p; the tokens of other rows mean nothing."""
    kind = settings.kind
    if not reading_is_free(logits_BV.device) or logits_BV.numel() <= FEW:
        likely_BV, ids_BV = logits_BV.sort(stable=True, descending=True)
        weights = _Weights(likely_BV, likely_BV[:, :1], settings.temperature_B1)
        place_B1, _ = _choose_place(weights, None, settings, uniform_B1)
        return ids_BV.gather(1, place_B1)[:, 0]
    if not (kind.greedy or kind.free):
        return _draw_by_candidates(logits_BV, settings, uniform_B1)
    rows = settings.filtered_B.nonzero()[:, 0]
    tokens_B = torch.zeros(len(logits_BV), dtype=torch.int64)
    tokens_B[rows] = _draw_by_candidates(logits_BV[rows], settings.take(rows), uniform_B1[rows])
    return tokens_B


def _draw_by_candidates(logits_BV: Tensor, settings: RowSettings, uniform_B1: Tensor) -> Tensor:
    """``_draw_filtered`` on a CPU: sort only as many of the likely tokens as it takes."""
    kind, most = settings.kind, min(settings.kind.most, logits_BV.shape[1])
    total_B1 = None
    if kind.most == NO_LIMIT:
        largest_B1 = logits_BV.amax(1, keepdim=True)
        total_B1 = _Weights(logits_BV, largest_B1, settings.temperature_B1).total_B1
    tokens_B = torch.zeros(len(logits_BV), dtype=torch.int64)
    rows = torch.arange(len(logits_BV))
    at_least = 0.0
    for count in (*(few for few in CANDIDATES if few < most), most):
        if count < min(at_least, most):
            continue
        likely_BK, ids_BK = _most_likely(logits_BV, count)
        weights = _Weights(likely_BK, likely_BK[:, :1], settings.temperature_B1)
        place_B1, factor_B = _choose_place(weights, total_B1, settings, uniform_B1)
        tokens_B[rows] = _ids_at(place_B1, likely_BK, ids_BK, logits_BV)
        left = (factor_B > 1).nonzero()[:, 0]
        if count == most or not len(left):
            break
        at_least = count * float(factor_B[left].min())
        rows, logits_BV, settings = rows[left], logits_BV[left], settings.take(left)
        uniform_B1 = uniform_B1[left]
        total_B1 = None if total_B1 is None else total_B1[left]
    return tokens_B


def _choose_place(
    weights: _Weights, total_B1: Tensor | None, settings: RowSettings, uniform_B1: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw a place in the order of likelihood.

    Args:
        weights: Of the most likely tokens, in descending order.
        total_B1: The weight of the whole vocabulary; None if that is in ``weights``, or does not
            matter because every row has top_k.
        settings: Of the B rows.
        uniform_B1: Numbers in [0, 1).

    Returns:
        int64 [B, 1], and fp64 [B]: 1 or less if the row draws from no more tokens than these;
        otherwise it needs at least so many times as many, because later ones weigh less.
    """
    kind, count = settings.kind, weights.count
    kept_B1 = weights.total_B1 if total_B1 is None else total_B1
    factor_B1 = settings.top_k_B1.double() / count
    if kind.top_k:
        of_top_k_B1 = weights.up_to(settings.top_k_B1.clamp(max=count) - 1)
        kept_B1 = torch.where(factor_B1 <= 1, of_top_k_B1, kept_B1)
    if kind.top_p:
        wanted_B1 = settings.top_p_B1 * kept_B1
        # the token that completes top_p is one of them
        nucleus_B1 = weights.up_to(weights.place(wanted_B1, reached=True))
        nucleus_B1 = torch.minimum(nucleus_B1, kept_B1)
        kept_B1 = torch.where(settings.top_p_B1 < 1, nucleus_B1, kept_B1)
        unlimited_B1 = settings.top_k_B1 == NO_LIMIT
        factor_B1 = torch.where(unlimited_B1, wanted_B1 / weights.total_B1, factor_B1)
    return weights.place(uniform_B1 * kept_B1), factor_B1[:, 0]


def _most_likely(logits_BV: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """The largest logits in descending order [B, count], and where they are if that is known."""
    if count <= CANDIDATES[0]:
        return logits_BV.topk(count)
    # numpy sorts several times as fast as torch, because it sorts only values
    values = logits_BV.numpy()
    if count < values.shape[1]:
        values = np.partition(values, values.shape[1] - count)[:, -count:]
    return torch.from_numpy(np.sort(values)).flip(-1), None


def _ids_at(
    place_B1: Tensor, likely_BK: Tensor, ids_BK: Tensor | None, logits_BV: Tensor
) -> Tensor:
    """The token at a place; equally likely ones are in the order of their ids: int64 [B]."""
    drawn_B1 = likely_BK.gather(1, place_B1)
    if ids_BK is not None and likely_BK.shape[1] < logits_BV.shape[1]:
        # topk gives equal ones in any order, and may leave some out
        alone = (likely_BK == drawn_B1).sum() == len(drawn_B1)
        if alone and not (likely_BK[:, -1:] == drawn_B1).any():
            return ids_BK.gather(1, place_B1)[:, 0]
    nth_B1 = place_B1 - (likely_BK > drawn_B1).sum(-1, keepdim=True)
    same_BV = (logits_BV == drawn_B1).cumsum(-1, dtype=torch.int32)
    return torch.searchsorted(same_BV, nth_B1.int() + 1)[:, 0].clamp_(max=logits_BV.shape[1] - 1)


def _largest(logits_BV: Tensor) -> Tensor:
    """``argmax`` over blocks and then within one, because a maximum takes a tenth of its time."""
    if logits_BV.shape[1] <= FEW:
        return logits_BV.argmax(-1)
    blocks_BNW = _in_blocks(logits_BV, -torch.inf)
    block_B1 = blocks_BNW.amax(-1).argmax(-1, keepdim=True)
    return block_B1[:, 0] * BLOCK + _block(blocks_BNW, block_B1).argmax(-1)


def _in_blocks(values_BV: Tensor, fill: float) -> Tensor:
    """[B, N, W], a view if the width allows it; otherwise padded on the right."""
    if missing := -values_BV.shape[1] % BLOCK:
        values_BV = torch.nn.functional.pad(values_BV, (0, missing), value=fill)
    return values_BV.unflatten(1, (-1, BLOCK))


def _block(blocks_BNW: Tensor, block_B1: Tensor) -> Tensor:
    """One block of each row: [B, W]."""
    return blocks_BNW.gather(1, block_B1[:, :, None].expand(-1, -1, BLOCK))[:, 0]


def _either(first_B: Tensor, one_B: Tensor, other_B: Tensor | None) -> Tensor:
    return one_B if other_B is None else torch.where(first_B, one_B, other_B)


def _split_mix(state_B: Tensor) -> Tensor:
    """The output function of SplitMix64 on int64, whose products wrap as unsigned ones do."""
    mixed_B = state_B + _GAMMA
    mixed_B = (mixed_B ^ _shifted(mixed_B, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    mixed_B = (mixed_B ^ _shifted(mixed_B, 27)) * (0x94D049BB133111EB - 2**64)
    return mixed_B ^ _shifted(mixed_B, 31)


def _shifted(state_B: Tensor, bits: int) -> Tensor:
    """Shifted to the right without its sign."""
    return (state_B >> bits) & (2 ** (64 - bits) - 1)
