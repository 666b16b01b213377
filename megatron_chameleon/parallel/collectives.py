"""Collectives on Python objects: every rank of the job must call them."""

from collections.abc import Callable
from typing import TypeVar

import torch

from megatron_chameleon.errors import ChameleonError, ConfigError, ConfigErrors

T = TypeVar("T")


def all_gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    everywhere = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, value)
    return everywhere


def gather_on_rank_0(value: T) -> list[T] | None:
    """Every rank's value, in rank order, on rank 0; None on the others."""
    is_first = torch.distributed.get_rank() == 0
    everywhere = [value] * torch.distributed.get_world_size() if is_first else None
    torch.distributed.gather_object(value, everywhere, dst=0)
    return everywhere


def first_message(message: str | None) -> str | None:
    """The message of the first rank that has one, on every rank; None if no rank has one.

    Args:
        message: This rank's, such as what went wrong.
    """
    return next((found for found in all_gather(message) if found), None)


def broadcast(value: T, source: int = 0) -> T:
    """The value of one rank, on every rank.

    Args:
        value: Used on rank ``source`` only.
        source: The rank that sends its value.
    """
    values = [value]
    torch.distributed.broadcast_object_list(values, src=source)
    return values[0]


def raise_together(error: ChameleonError | None) -> None:
    """Raise the error of the first rank that has one on every rank.

    Without this, the other ranks would wait for that rank in their next collective.

    Args:
        error: This rank's, or None.

    Raises:
        ChameleonError: One rank has an error.
    """
    own = None
    if error is not None:
        kind = ConfigError if isinstance(error, ConfigErrors) else type(error)
        own = (kind, error.where, error.what, error.remedy)
    first = next((found for found in all_gather(own) if found), None)
    if first is not None:
        kind, *parts = first
        raise (kind(*parts) if error is None else error) from error


def run_on_rank_0(action: Callable[[], T]) -> T:
    """Run a function on rank 0; returns its result on every rank.

    Raises:
        ChameleonError: On every rank, if the function raised one.
    """
    result, failure = None, None
    if torch.distributed.get_rank() == 0:
        try:
            result = action()
        except ChameleonError as error:
            failure = error
    raise_together(failure)
    return broadcast(result)  # type: ignore[return-value]
