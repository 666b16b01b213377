"""Notice that held-out loss rises while training loss still falls: the model begins to memorize.

The held-out loss is measured on the same documents each time, so it has no sampling noise of its
own, but it does wobble with the weights. So a rise counts from a certain size on, and only if it
lasts. This is plain arithmetic on metrics; nothing here imports torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chameleon.runs.turning import has_risen


@dataclass(frozen=True)
class HeldOutTurn:
    """What was seen when a held-out loss had turned."""

    kind: str
    """Whose loss it is: empty for all tokens, else ``text`` or ``image``."""
    step: int
    held_out_loss: float
    loss: float
    """Mean training loss since the measurement before."""
    lowest_step: int
    lowest_held_out_loss: float
    lowest_loss: float
    """Mean training loss up to the lowest held-out loss, since the measurement before it."""

    def __str__(self) -> str:
        kind = f"{self.kind} " if self.kind else ""
        return (
            f"step {self.step}: held-out {kind}loss has risen from "
            f"{self.lowest_held_out_loss:.4f} at step {self.lowest_step}, its lowest, to "
            f"{self.held_out_loss:.4f}, while training {kind}loss fell from "
            f"{self.lowest_loss:.4f} to {self.loss:.4f}"
        )


class OverfittingAlarm:
    """Watches training and held-out loss: of all tokens, and of each modality.

    A modality with few tokens can turn while the mean over all tokens still falls. It needs the
    steps in order, including those before a resume, so that a restart changes nothing.
    """

    def __init__(self) -> None:
        self._all, self._modalities = _Watch(""), [_Watch("text"), _Watch("image")]

    def observe(self, metrics: Mapping[str, Any]) -> HeldOutTurn | None:
        """Take in the metrics of a step; returns the turn if this step shows one.

        After that, the next one needs a new lowest held-out loss first. Once the loss of all tokens
        has turned, those of the modalities are no news.
        """
        turn, *others = (watch.observe(metrics) for watch in (self._all, *self._modalities))
        if turn is not None or self._all.has_turned:
            return turn
        return next(filter(None, others), None)


@dataclass(frozen=True)
class _Measured:
    step: int
    held_out_loss: float
    loss: float


class _Watch:
    """Watches the loss of one kind of tokens."""

    def __init__(self, kind: str) -> None:
        self.has_turned = False
        self._kind = kind
        self._key = f"loss_{kind}" if kind else "loss"
        self._losses: list[float] = []
        self._lowest: _Measured | None = None
        self._above = 0

    def observe(self, metrics: Mapping[str, Any]) -> HeldOutTurn | None:
        if (loss := _finite(metrics.get(self._key))) is not None:
            self._losses.append(loss)
        held_out_loss = _finite(metrics.get(f"validation/{self._key}"))
        if held_out_loss is None or not self._losses:
            return None
        mean = math.fsum(self._losses) / len(self._losses)
        now = _Measured(metrics["step"], held_out_loss, mean)
        self._losses.clear()
        if self._lowest is None or now.held_out_loss <= self._lowest.held_out_loss:
            self._lowest, self._above, self.has_turned = now, 0, False
            return None
        lowest, self._above = self._lowest, self._above + 1
        if self.has_turned or now.loss >= lowest.loss:
            return None
        if not has_risen(lowest.held_out_loss, now.held_out_loss, self._above):
            return None
        self.has_turned = True
        return HeldOutTurn(
            self._kind,
            now.step,
            now.held_out_loss,
            now.loss,
            lowest.step,
            lowest.held_out_loss,
            lowest.loss,
        )


def _finite(value: object) -> float | None:
    """The value if it is a number that is finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None
