"""A key/value cache that is as simple as can be, for the tests of ``CachedModel``."""

import torch
from torch import Tensor
from torch.nn import functional


class PlainCache:
    """Keys and values of ragged rows, in one tensor a layer.

    Args:
        layers: Number of layers.
    """

    def __init__(self, layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._visible_RC = torch.empty(0)
        self._mask_R1SC = torch.empty(0)

    def begin(self, visible_RS: Tensor) -> None:
        """Prepare a pass of new columns, some of which are padding: bool [R, S]."""
        tokens = visible_RS.shape[1]
        before_RC = self._visible_RC if len(self._visible_RC) else visible_RS[:, :0]
        self._visible_RC = torch.cat((before_RC, visible_RS), dim=1)
        causal_SS = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        before_SC = torch.ones(tokens, before_RC.shape[1], dtype=torch.bool)
        mask_RSC = torch.cat((before_SC, causal_SS), dim=1) & self._visible_RC[:, None]
        alone_SC = functional.pad(torch.eye(tokens, dtype=torch.bool), (before_RC.shape[1], 0))
        self._mask_R1SC = (mask_RSC | alone_SC)[:, None]

    def attend(self, layer: int, q_RNSD: Tensor, k_RGSD: Tensor, v_RGSD: Tensor) -> Tensor:
        """An ``Attend``."""
        for stored, new in ((self._keys, k_RGSD), (self._values, v_RGSD)):
            old = stored[layer]
            stored[layer] = new.clone() if old is None else torch.cat((old, new), dim=2)
        keys, values = (
            stored[layer].repeat_interleave(q_RNSD.shape[1] // k_RGSD.shape[1], dim=1)
            for stored in (self._keys, self._values)
        )
        return functional.scaled_dot_product_attention(
            q_RNSD, keys, values, attn_mask=self._mask_R1SC
        )


def cached_logits(layers, token_ids_RS: Tensor, lengths: list[int]) -> Tensor:
    """Logits [R, S, V] of a ``CachedModel`` that reads prompts and then token by token.

    Args:
        layers: The model.
        token_ids_RS: What each row reads.
        lengths: Tokens of the prompt of each row. Before its last token, logits are NaN.
    """
    cache, rows = PlainCache(layers.num_layers), len(lengths)
    place_R = torch.tensor(lengths)
    tokens = token_ids_RS.shape[1]
    found_RSV = None

    def run(ids_RS: Tensor, positions_RS: Tensor, visible_RS: Tensor, last_R: Tensor) -> None:
        nonlocal found_RSV
        cache.begin(visible_RS)
        last_RH = layers.hidden(ids_RS, positions_RS, last_R, cache.attend)
        logits_RV = layers.logits(last_RH)
        if found_RSV is None:
            found_RSV = torch.full((rows, tokens, logits_RV.shape[1]), torch.nan)
        for row in range(rows):
            if visible_RS[row].any():
                found_RSV[row, positions_RS[row, last_R[row]]] = logits_RV[row]

    column_S = torch.arange(max(lengths))
    visible_RS = column_S < place_R[:, None]
    run(token_ids_RS[:, : max(lengths)], column_S.expand(rows, -1), visible_RS, place_R - 1)
    while (place_R < tokens).any():
        active_R = place_R < tokens
        at_R = place_R.clamp(max=tokens - 1)
        ids_R1 = token_ids_RS.gather(1, at_R[:, None])
        run(ids_R1, at_R[:, None], active_R[:, None], torch.zeros_like(at_R))
        place_R = place_R + active_R
    return found_RSV
