"""Imitate a CUDA graph on a CPU: record the operations of a function once, then repeat them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "aten._local_scalar_dense",
    "aten.item",
    "aten.is_nonzero",
    "aten.equal",
    "aten.nonzero",
    "aten.masked_select",
    "aten.multinomial",
    "aten.unique_consecutive",
}
"""Operations that give the host a number or a shape, for which it would have to wait."""


class _Recorder(TorchDispatchMode):
    def __init__(self, operations: list[tuple[Any, tuple, dict, Any]]) -> None:
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = str(func).rsplit(".", 1)[0]
        assert name not in WAITING, f"{func} waits for the device"
        assert name != "aten.where" or len(args) > 1, f"{func} of a mask alone waits"
        indices = args[1] if name in ("aten.index", "aten.index_put", "aten.index_put_") else ()
        assert all(i is None or i.dtype != torch.bool for i in indices), f"{func} by a mask waits"
        out = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, out))
        return out


class RecordedOps:
    """The first call runs the function, the second records it, and later ones replay it.

    Every operation gets the same tensors and numbers as when it was recorded, and its results are
    written to the same memory.

    Args:
        function: A function that works on tensors that stay where they are.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._operations: list[tuple[Any, tuple, dict, Any]] = []
        self._calls = 0
        self.replays = 0

    def __call__(self) -> None:
        self._calls += 1
        if self._calls == 1:
            self._function()
        elif self._calls == 2:
            with _Recorder(self._operations):
                self._function()
        else:
            self.replays += 1
            for func, args, kwargs, recorded in self._operations:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
