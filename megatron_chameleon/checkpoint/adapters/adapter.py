"""A trained adapter, whatever wrote it, and what it makes of the weights that it belongs to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_chameleon.checkpoint.names.adapters import MAGNITUDE, A, B
from megatron_chameleon.config.finetuning import AdapterConfig
from megatron_chameleon.errors import CheckpointError


@dataclass(frozen=True)
class Pair:
    """The adapter of one weight.

    Attributes:
        low: A [rank, in]; how to read it.
        high: B [out, rank]; how to read it.
        scale: Factor of B A.
        magnitude: [out], the length of each row of the weight (DoRA); None without it.
        transposed: Whether the weight is [in, out], as that of an embedding.
        weight: A weight that came with the adapter and takes the place of the base's; None: none.
    """

    low: Callable[[], Tensor]
    high: Callable[[], Tensor]
    scale: float
    magnitude: Callable[[], Tensor] | None = None
    transposed: bool = False
    weight: Callable[[], Tensor] | None = None

    def merge(self, weight: Tensor) -> Tensor:
        """The weight with its adapter, in the weight's dtype; the sum is computed in fp32 or wider.

        Args:
            weight: [out, in].
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        own = weight if self.weight is None else self.weight()
        delta = self.high().to(wide) @ self.low().to(wide)
        merged = own.to(wide) + self.scale * (delta.T if self.transposed else delta)
        if self.magnitude is not None:
            length = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
            merged = merged * (self.magnitude().to(wide)[:, None] / length)
        return merged.to(weight.dtype)


@dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    Attributes:
        where: The folder it comes from.
        config: Its rank, alpha, dropout, layers, and whether it is DoRA's.
        pairs: By the Hugging Face name of the weight, such as
            ``model.layers.3.self_attn.q_proj.weight``.
        base: Where the weights were that it was trained on; None if the files don't say.
    """

    where: str
    config: AdapterConfig
    pairs: Mapping[str, Pair]
    base: str | None

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of one weight's adapter by ``A``, ``B`` and, with DoRA, ``MAGNITUDE``."""
        pair = self.pairs[name]
        found = {A: pair.low(), B: pair.high()}
        return found if pair.magnitude is None else {**found, MAGNITUDE: pair.magnitude()}

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights with their adapters, where they have one.

        Args:
            tensors: By their Hugging Face names.
        """
        return {
            name: self.pairs[name].merge(tensor) if name in self.pairs else tensor
            for name, tensor in tensors.items()
        }

    def check(self, shapes: Iterable[tuple[str, tuple[int, ...]]], base: str) -> None:
        """Whether each part fits the weight that it belongs to.

        Args:
            shapes: Name and shape of every weight of the base.
            base: For errors.

        Raises:
            CheckpointError: A weight is missing or has another shape.
        """
        known = dict(shapes)
        remedy = "Use the weights that the adapter was trained on"
        for name, pair in self.pairs.items():
            if name not in known:
                what = f"it adapts {name}, which {base} does not have"
                raise CheckpointError(self.where, what, remedy)
            found = (pair.high().shape[0], pair.low().shape[1])
            found = found[::-1] if pair.transposed else found
            if found != tuple(known[name]):
                what = f"its adapter of {name} is for a matrix {list(found)}, and {base} has "
                raise CheckpointError(self.where, what + f"{list(known[name])}", remedy)
