"""The metrics of a step: each rank collects sums, and one reduction gives the run's means."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel import platform
from megatron_chameleon.training.metrics.layers import LayerMonitor
from megatron_chameleon.training.preference.loss import PAIR_SUMS, pair_means


@dataclass(frozen=True)
class StepMetrics:
    """Means over the global batch of a step; those of losses and log(Z) are over unmasked tokens.

    A value is None if there was nothing to take the mean of.
    """

    loss: float | None
    loss_text: float | None
    loss_image: float | None
    z_loss: float | None
    output_norm: float | None
    max_logit: float | None
    log_z_text: float | None
    log_z_image: float | None
    max_attention_logit: float | None
    layer_output_norms: list[float | None]
    loss_tokens: int
    """Tokens that counted in the loss."""
    pairs: Sequence[float] | None = None
    """``PAIR_SUMS`` of a step that trains preferences."""

    def values(self) -> dict[str, Any]:
        """The metrics by name. If preferences are trained, ``loss`` is that of the pairs."""
        found = {name: value for name, value in asdict(self).items() if name != "pairs"}
        if self.pairs is None:
            return found
        return found | dict.fromkeys(("loss_text", "loss_image")) | pair_means(list(self.pairs))


class StepMonitor:
    """Collects the sums of one optimizer step.

    Losses are counted on the last pipeline stage, equally on each of its tensor-parallel ranks, so
    a sum over all ranks keeps every ratio right. ``output_norm`` is the mean L2 norm of a token's
    vector before the final norm. Its growth predicts divergence long before the loss does (paper,
    section 2.3, figure 5). ``layer_output_norms`` has the same for every layer.

    Args:
        parts: This rank's parts of the model.
        copies: Number of ranks that count the same tokens: those of tensor parallelism.
    """

    SUMS = (
        *("loss", "tokens", "text", "text_tokens", "image", "image_tokens", "z"),
        *("log_z_text", "log_z_image"),
    )

    def __init__(self, parts: Sequence[nn.Module], copies: int = 1) -> None:
        self._copies = copies
        self._sums = torch.zeros(len(self.SUMS), dtype=torch.float64, device=platform.device())
        self._max_logit = torch.full(
            (1,), -torch.inf, dtype=torch.float64, device=platform.device()
        )
        self._pairs = torch.zeros(len(PAIR_SUMS), dtype=torch.float64, device=platform.device())
        self._has_pairs = torch.zeros_like(self._pairs[:1])
        self._layers = LayerMonitor(parts)
        self._losses: list[Tensor] = []
        self.last_losses: list[Tensor] = []
        """The summed cross-entropy of each of this rank's micro-batches in the last step, scalars
        on its device. Empty on ranks that do not compute the loss."""

    def observe_loss(
        self, batch: Batch, cross_entropy: Tensor, log_z: Tensor, max_logit: Tensor
    ) -> None:
        """Add one micro-batch; all tensors are [B, S]."""
        with torch.no_grad():
            masks = torch.stack([batch.loss_mask, batch.loss_mask * batch.image_mask]).double()
            values = torch.stack([cross_entropy, torch.ones_like(log_z), log_z, log_z.square()])
            # rows: cross-entropy, tokens, log(Z), its square; columns: all tokens, images
            sums = torch.einsum("vbs,mbs->vm", values.double(), masks)
            everything, image = sums[:, 0], sums[:, 1]
            text = everything - image
            self._losses.append(everything[0])
            self._sums += torch.cat(
                [everything[:2], text[:2], image[:2], everything[3:], text[2:3], image[2:3]]
            )
            self._max_logit = torch.maximum(self._max_logit, max_logit.max().double())

    def observe_pairs(self, sums: Tensor) -> None:
        """Add the ``PAIR_SUMS`` of one micro-batch, float64 [8]."""
        self._pairs = self._pairs + sums
        self._has_pairs.fill_(1)

    def finish_step(self, z_loss_weight: float) -> StepMetrics:
        """Reduce over all ranks, reset, and return the means. A collective: every rank calls it.

        Args:
            z_loss_weight: ``training.z_loss``.
        """
        layers, norm_sums = self._layers, self._layers.norm_sums
        count = len(norm_sums)
        pairs = torch.cat([self._has_pairs, self._pairs])
        sums = torch.cat([self._sums, norm_sums, layers.rows, pairs])
        largest = torch.cat([self._max_logit, layers.max_attention])
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        sizes = [len(self.SUMS), count, count, len(pairs)]
        values, norms, rows, (has_pairs, *of_pairs) = (part.tolist() for part in sums.split(sizes))
        max_logit, *attention = largest.tolist()
        self._sums.zero_()
        self._pairs = torch.zeros_like(self._pairs)
        self._has_pairs.zero_()
        self._max_logit.fill_(-torch.inf)
        layers.reset()
        self.last_losses, self._losses = self._losses, []
        named = dict(zip(self.SUMS, values, strict=True))

        def mean(total: str, tokens: str) -> float | None:
            return named[total] / named[tokens] if named[tokens] else None

        layer_norms = [norm / row if row else None for norm, row in zip(norms, rows, strict=True)]
        z_mean = mean("z", "tokens")
        return StepMetrics(
            loss=mean("loss", "tokens"),
            loss_text=mean("text", "text_tokens"),
            loss_image=mean("image", "image_tokens"),
            z_loss=None if z_mean is None else z_loss_weight * z_mean,
            output_norm=layer_norms[-1],
            max_logit=_known(max_logit),
            log_z_text=mean("log_z_text", "text_tokens"),
            log_z_image=mean("log_z_image", "image_tokens"),
            max_attention_logit=_known(max(attention)),
            layer_output_norms=layer_norms,
            loss_tokens=_whole(named["tokens"]) // self._copies,
            pairs=of_pairs if has_pairs else None,
        )


def _known(largest: float) -> float | None:
    return largest if largest > float("-inf") else None


def _whole(count: float) -> int:
    return round(count) if math.isfinite(count) else 0  # a broken mask; such a step is skipped
