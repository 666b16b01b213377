"""What a measurement of the held-out loss found: losses and perplexities by source and modality."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_chameleon.training.preference.loss import PAIR_SUMS, pair_means

PREFIX = "validation/"
"""How the names of these metrics begin."""
LOSS = f"{PREFIX}loss"


@dataclass(frozen=True)
class ModalityLosses:
    """Summed cross-entropy in nats, and the number of tokens that it is summed over."""

    text: float
    text_tokens: int
    image: float
    image_tokens: int

    def __add__(self, other: "ModalityLosses") -> "ModalityLosses":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return ModalityLosses(*(a + b for a, b in pairs))

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens

    def values(self) -> Iterator[tuple[str, float | None]]:
        """Means over tokens, and their exponentials; None where there are no tokens."""
        modalities = {
            "": (self.text + self.image, self.tokens),
            "_text": (self.text, self.text_tokens),
            "_image": (self.image, self.image_tokens),
        }
        means = {
            name: total / count if count else None for name, (total, count) in modalities.items()
        }
        for name, mean in means.items():
            yield f"loss{name}", mean
        for name, mean in means.items():
            yield f"perplexity{name}", None if mean is None else _exp(mean)


@dataclass(frozen=True)
class HeldOutLosses:
    """The losses of each source, by its name."""

    sources: Mapping[str, ModalityLosses]

    @property
    def total(self) -> ModalityLosses:
        """Over the tokens of all sources."""
        return sum(self.sources.values(), ModalityLosses(0.0, 0, 0.0, 0))

    def metrics(self) -> dict[str, float | None]:
        """``validation/loss`` and so on over all sources, then ``validation/NAME/loss``."""
        found = {f"{PREFIX}{key}": value for key, value in self.total.values()}
        for name, losses in self.sources.items():
            found |= {f"{PREFIX}{name}/{key}": value for key, value in losses.values()}
        return found

    def ema_metrics(self) -> dict[str, float | None]:
        """The losses over all sources, as those of the moving average of the weights."""
        values = self.total.values()
        return {f"{PREFIX}ema_{key}": value for key, value in values if key.startswith("loss")}


@dataclass(frozen=True)
class PreferenceLosses:
    """The same of pairs of answers: ``PAIR_SUMS`` of each source, by its name."""

    sources: Mapping[str, list[float]]
    has_reference: bool = True
    """Without a reference, all values are None except the log-probabilities of the model."""

    @property
    def total(self) -> dict[str, float | None]:
        """Means over the pairs of all sources."""
        sums = [sum(values) for values in zip(*self.sources.values(), strict=True)]
        return self._means(sums)

    @property
    def pairs(self) -> dict[str, int]:
        """How many pairs each source has."""
        place = PAIR_SUMS.index("pairs")
        return {name: round(sums[place]) for name, sums in self.sources.items()}

    def means(self, source: str) -> dict[str, float | None]:
        """Means over the pairs of a source."""
        return self._means(self.sources[source])

    def without_reference(self) -> "PreferenceLosses":
        """The same where the reference is not known."""
        return replace(self, has_reference=False)

    def _means(self, sums: list[float]) -> dict[str, float | None]:
        found = pair_means(sums)
        if self.has_reference:
            return found
        return {key: v if key.endswith("_logp") else None for key, v in found.items()}

    def metrics(self) -> dict[str, float | None]:
        """``validation/loss``, ``validation/reward_accuracy`` and so on, then of each source."""
        found = {f"{PREFIX}{key}": value for key, value in self.total.items()}
        for name in self.sources:
            found |= {f"{PREFIX}{name}/{key}": value for key, value in self.means(name).items()}
        return found

    def ema_metrics(self) -> dict[str, float | None]:
        """The means over all sources, as those of the moving average of the weights."""
        return {f"{PREFIX}ema_{key}": value for key, value in self.total.items()}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
