"""The exponential moving average (EMA) of the weights, ``training.ema_decay``.

    with engine.ema_weights():
        ...  # the model computes with the average; afterwards with the weights again, bit for bit

The average is one more tensor of the optimizer's state, beside AdamW's moments: fp32, and split and
stored as they are, at every layout, with every engine and with the state in the host's memory.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron_chameleon.checkpoint.names.optimizer_state import AVERAGE, has_average
from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.errors import CheckpointError


def decay_after(updates: int, decay: float) -> float:
    """The share that the average keeps of itself at its next update.

    The first weights of a run are far from the later ones. So the average starts with the weights
    after the first update, as torch's ``AveragedModel`` does, and its decay grows with the number
    of weights in it, up to the config's.

    Source: TensorFlow's ``tf.train.ExponentialMovingAverage(decay, num_updates)``; diffusers'
    ``EMAModel`` has the same formula.

    Args:
        updates: Number of weights that have been averaged so far.
        decay: ``training.ema_decay``.
    """
    return min(decay, (1 + updates) / (10 + updates)) if updates else 0.0


class WeightAverage:
    """This rank's part of the average.

    Args:
        decay: ``training.ema_decay``; None: no average is kept.
        tensors: Yields torch's optimizer and each fp32 tensor of this rank that it updates.
        publish: Copies those tensors into the weights that the model computes with. A collective.

    Attributes:
        updates: Number of weights that have been averaged. The average exists from the first
            update on.
        note: What a user should know of the average after a checkpoint was loaded; empty: nothing.
    """

    def __init__(
        self,
        decay: float | None,
        tensors: Callable[[], Iterator[tuple[Optimizer, Tensor]]],
        publish: Callable[[], None],
    ) -> None:
        self._decay, self._tensors, self._publish = decay, tensors, publish
        self.updates = 0
        self.note = ""

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an update of theirs."""
        if self._decay is None:
            return
        share = 1 - decay_after(self.updates, self._decay)
        for optimizer, weight in self._tensors():
            if self.updates:
                optimizer.state[weight][AVERAGE].lerp_(weight.detach(), share)
            else:
                _prepare(optimizer)
                optimizer.state[weight][AVERAGE] = weight.detach().clone()
        self.updates += 1

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the model compute with the average; before the first update, with the weights.

        A collective, at both ends. Nothing may train or save inside.
        """
        if not self.updates:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the average and the weights, which needs memory for one tensor."""
        for optimizer, weight in self._tensors():
            average = optimizer.state[weight][AVERAGE]
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)
        self._publish()

    def state_entries(self) -> dict[str, int]:
        """What ``state.json`` says of the average."""
        return {"ema_updates": self.updates} if self.updates else {}

    def begin_restore(self, checkpoint: Path, stored: Collection[str]) -> bool:
        """Prepare for the state of a checkpoint.

        Args:
            checkpoint: A whole one, whose optimizer state is about to be loaded.
            stored: All names in it.

        Returns:
            Whether its average is to be loaded too.

        Raises:
            CheckpointError: It has an average of an unknown number of weights.
        """
        self.forget()
        if self._decay is None:
            if has_average(stored):
                dropped = "is dropped, because training.ema_decay is null"
                self.note = f"the EMA of the weights in {checkpoint} {dropped}"
            return False
        if not has_average(stored):
            self.note = f"{checkpoint} has no EMA of the weights: it begins with the next update"
            return False
        self.updates = load_state(checkpoint)["ema_updates"]
        if not self.updates:
            what = "has an EMA of the weights, but ema_updates is missing in its state.json"
            raise CheckpointError(str(checkpoint), what, "Use another checkpoint")
        for optimizer, _ in self._tensors():
            _prepare(optimizer)
        return True

    def forget(self) -> None:
        """Begin anew with the weights after the next update."""
        self.updates, self.note = 0, ""
        for optimizer, weight in self._tensors():
            optimizer.state.get(weight, {}).pop(AVERAGE, None)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the average, to check that they are finite."""
        if self.updates:
            for optimizer, weight in self._tensors():
                yield "the EMA of the weights", optimizer.state[weight][AVERAGE]


def _prepare(optimizer: Optimizer) -> None:
    """Transformer Engine's AdamW saves and loads only state whose dtype it knows."""
    dtypes = getattr(optimizer, "name_to_dtype_map", None)
    if dtypes is not None:
        dtypes[AVERAGE] = torch.float32
