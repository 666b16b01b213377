"""How each row of a batch draws its tokens, in tensors that keep their addresses.

Letters in tensor names: B rows of the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_chameleon.inference.engine.options import GenerationOptions

NO_LIMIT = 2**62
"""The value of top_k for a row without one."""
_NOBODY = GenerationOptions(temperature=0, repetition_penalty=1.0)


class DrawKind(NamedTuple):
    """What the host knows about all rows. A CUDA graph of a draw serves one kind."""

    greedy: bool
    """Some rows have temperature 0."""
    free: bool
    """Some rows draw from all tokens."""
    top_k: bool
    """Some rows that are not greedy have top_k."""
    top_p: bool
    """Some rows that are not greedy have top_p."""
    most: int
    """No row with top_k or top_p draws from more tokens than this."""
    penalised: bool
    """Some rows have a repetition penalty."""

    @property
    def filtered(self) -> bool:
        """Some rows have top_k or top_p."""
        return self.top_k or self.top_p


class RowSettings:
    """How each row draws, in tensors that keep their addresses.

    Args:
        rows: Number of rows B. They take the most likely token until ``set`` is called.
        device: The device of the logits.

    Attributes:
        temperature_B1: fp32, above 0; of greedy rows 1.
        greedy_B: bool.
        top_k_B1: int64; ``NO_LIMIT`` without one.
        top_p_B1: fp64.
        penalty_B: fp32, the repetition penalty; 1 changes nothing.
        filtered_B: bool, whether the row has top_k or top_p and is not greedy.
        kind: What the host knows.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        self._options: list[GenerationOptions | None] = [None] * rows
        self.temperature_B1 = torch.ones((rows, 1), device=device)
        self.greedy_B = torch.ones(rows, dtype=torch.bool, device=device)
        self.top_k_B1 = torch.full((rows, 1), NO_LIMIT, device=device)
        self.top_p_B1 = torch.ones((rows, 1), dtype=torch.float64, device=device)
        self.penalty_B = torch.ones(rows, device=device)
        self.filtered_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.kind = self._kind()

    @classmethod
    def of(
        cls, options: Sequence[GenerationOptions], device: torch.device | str = "cpu"
    ) -> "RowSettings":
        """Settings with a row for each of these options."""
        settings = cls(len(options), device)
        settings._write(slice(None), options)
        return settings

    def set_all(self, options: Sequence[GenerationOptions]) -> None:
        """Change all rows; those beyond ``options`` become ones whose tokens nobody reads."""
        missing = len(self._options) - len(options)
        self._write(slice(None), [*options, *[None] * missing])

    def set(self, row: int, options: GenerationOptions | None) -> None:
        """Change a row; None for one whose tokens nobody reads."""
        self._write(slice(row, row + 1), [options])

    def _write(self, rows: slice, options: Sequence[GenerationOptions | None]) -> None:
        self._options[rows] = options
        written = [each or _NOBODY for each in options]
        device = self.greedy_B.device

        def column(values: list[float], to: Tensor) -> None:
            to[rows].view(-1).copy_(torch.tensor(values, dtype=to.dtype, device=device))

        largest = torch.finfo(torch.float32).max
        temperatures = [1 if _greedy(o) else min(o.temperature, largest) for o in written]
        column(temperatures, self.temperature_B1)
        column([_greedy(o) for o in written], self.greedy_B)
        column([min(o.top_k or NO_LIMIT, NO_LIMIT) for o in written], self.top_k_B1)
        column([o.top_p for o in written], self.top_p_B1)
        column([o.repetition_penalty for o in written], self.penalty_B)
        column([_filtered(o) and not _greedy(o) for o in written], self.filtered_B)
        self.kind = self._kind()

    def take(self, rows: Tensor) -> "RowSettings":
        """Copies of the settings of some rows, int64. Their ``kind`` is still that of all rows."""
        taken = RowSettings.__new__(RowSettings)
        taken.__dict__ = {
            name: value.index_select(0, rows) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return taken

    def _kind(self) -> DrawKind:
        options = [each for each in self._options if each is not None]
        drawn = [each for each in options if not _greedy(each)]
        filtered = [each for each in drawn if _filtered(each)]
        most = max((each.top_k or NO_LIMIT for each in filtered), default=1)
        return DrawKind(
            greedy=len(drawn) < len(self._options),
            free=len(filtered) < len(drawn),
            top_k=any(each.top_k for each in filtered),
            top_p=any(each.top_p < 1 for each in filtered),
            # a power of two, so that a few graphs serve all values
            most=1 << (min(most, NO_LIMIT) - 1).bit_length(),
            penalised=any(each.repetition_penalty != 1 for each in options),
        )


def _greedy(options: GenerationOptions) -> bool:
    """Also at a temperature below the smallest normal number, which no difference survives."""
    return options.temperature < torch.finfo(torch.float32).tiny


def _filtered(options: GenerationOptions) -> bool:
    return options.top_k > 0 or options.top_p < 1
