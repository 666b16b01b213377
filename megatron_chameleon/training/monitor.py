"""What a step measures: sums collected on each rank, means of the whole job by one reduction."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_chameleon.data.batches import Batch
from megatron_chameleon.parallel import platform


@dataclass(frozen=True)
class StepMetrics:
    """Means over the unmasked tokens of one step's global batch; None where there were none."""

    loss: float | None
    loss_text: float | None
    loss_image: float | None
    z_loss: float | None
    output_norm: float | None
    max_logit: float | None


class Monitor:
    """Collects the sums of one optimizer step.

    Losses are counted on the last pipeline stage, equally on each of its tensor-parallel ranks, so
    that one sum over the whole job keeps every ratio right. ``output_norm`` is the mean L2 norm of
    a token's vector before the final norm, the growth of which predicts divergence long before the
    loss does (paper, section 2.3, figure 5).
    """

    SUMS = ("loss", "tokens", "text", "text_tokens", "image", "image_tokens", "z", "norm", "rows")

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._sums = torch.zeros(len(self.SUMS), dtype=torch.float64, device=platform.device())
        self._max_logit = torch.full(
            (1,), -torch.inf, dtype=torch.float64, device=platform.device()
        )
        for part in parts:
            final_norm = getattr(part.decoder, "final_layernorm", None)
            if final_norm is not None:  # on the last part of the last stage only
                final_norm.register_forward_pre_hook(self._observe_output)

    def _observe_output(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            norms = torch.linalg.vector_norm(inputs[0].detach().float(), dim=-1)
            self._add(norm=norms.sum(), rows=norms.numel())

    def observe_loss(
        self, batch: Batch, cross_entropy: Tensor, z_term: Tensor, max_logit: Tensor
    ) -> None:
        """Count one micro-batch; all tensors are [B, S], ``z_term`` is the unweighted log(Z)^2."""
        with torch.no_grad():
            text_mask = batch.loss_mask * ~batch.image_mask
            image_mask = batch.loss_mask * batch.image_mask
            self._add(
                loss=(cross_entropy * batch.loss_mask).sum(),
                tokens=batch.loss_mask.sum(),
                text=(cross_entropy * text_mask).sum(),
                text_tokens=text_mask.sum(),
                image=(cross_entropy * image_mask).sum(),
                image_tokens=image_mask.sum(),
                z=(z_term * batch.loss_mask).sum(),
            )
            self._max_logit = torch.maximum(self._max_logit, max_logit.max().double())

    def _add(self, **values: Tensor | int) -> None:
        for name, value in values.items():
            self._sums[self.SUMS.index(name)] += value

    def finish_step(self, z_loss_weight: float) -> StepMetrics:
        """Reduce over the job, reset, and return the means. A collective: every rank calls it."""
        torch.distributed.all_reduce(self._sums)
        torch.distributed.all_reduce(self._max_logit, torch.distributed.ReduceOp.MAX)
        sums = dict(zip(self.SUMS, self._sums.tolist(), strict=True))
        max_logit = self._max_logit.item()
        self._sums.zero_()
        self._max_logit.fill_(-torch.inf)

        def mean(total: str, count: str) -> float | None:
            return sums[total] / sums[count] if sums[count] else None

        z_mean = mean("z", "tokens")
        return StepMetrics(
            loss=mean("loss", "tokens"),
            loss_text=mean("text", "text_tokens"),
            loss_image=mean("image", "image_tokens"),
            z_loss=None if z_mean is None else z_loss_weight * z_mean,
            output_norm=mean("norm", "rows"),
            max_logit=max_logit if max_logit > -torch.inf else None,
        )
