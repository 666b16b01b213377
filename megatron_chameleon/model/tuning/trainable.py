"""Train a part of a model: freeze parameters, or the rows of a parameter.

A frozen parameter needs no gradient, so neither engine gives it a gradient buffer or optimizer
state. Of a parameter whose rows are partly trained, the gradients of all other rows are set to zero
before anything accumulates or measures them. With zero moments, AdamW's update of these rows is
then exactly zero. The optimizers use no weight decay for such a parameter, which would change its
frozen rows.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from megatron_chameleon.checkpoint.names.partial_state import FROZEN_ROWS
from megatron_chameleon.model.initialization import named_global_parameters
from megatron_chameleon.model.tuning.selection import Range, Selection


def set_trainable(selection: Selection, parts: Sequence[nn.Module], rank: int) -> None:
    """Freeze what is not trained. Call it before gradient buffers and optimizers exist.

    Args:
        selection: From ``select_trained``. Parameters that it does not know are left as they are.
        parts: This rank's parts of the model.
        rank: Tensor-parallel rank.
    """
    for part in parts:
        for name, parameter in named_global_parameters(part):
            ranges = selection.rows(name)
            if ranges is None:
                continue
            frozen = tuple(_others(ranges, parameter.size(0), parameter.size(0) * rank))
            if not ranges:
                parameter.requires_grad_(False)
                continue
            setattr(parameter, FROZEN_ROWS, frozen)
            if frozen:
                parameter.register_hook(partial(_without_rows, frozen))


def is_partly_trained(parameter: Tensor) -> bool:
    """Whether only some rows of the whole parameter are trained."""
    return hasattr(parameter, FROZEN_ROWS)


def _others(ranges: Sequence[Range], rows: int, offset: int) -> Iterator[Range]:
    """The rows of a rank's part that no range contains.

    Args:
        ranges: Of rows of the whole parameter, in order.
        rows: Of the rank.
        offset: The rank's first row.
    """
    begin = 0
    for first, last in ranges:
        end = min(max(first - offset, 0), rows)
        if begin < end:
            yield begin, end
        begin = min(max(last - offset, begin), rows)
    if begin < rows:
        yield begin, rows


def _without_rows(frozen: Sequence[Range], gradient: Tensor) -> Tensor:
    """A gradient with zeros in the frozen rows, also where it is not finite."""
    kept = gradient.clone()
    for first, last in frozen:
        kept[first:last] = 0
    return kept
