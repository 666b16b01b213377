"""What the ranks of a job tell each other. Each of these functions is a collective."""

from typing import TypeVar

import torch

T = TypeVar("T")


def all_gather(value: T) -> list[T]:
    """Every rank's value in the order of the ranks, on every rank."""
    everywhere = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, value)
    return everywhere


def gather_on_rank_0(value: T) -> list[T] | None:
    """Every rank's value in the order of the ranks, on rank 0; None elsewhere."""
    is_first = torch.distributed.get_rank() == 0
    everywhere = [value] * torch.distributed.get_world_size() if is_first else None
    torch.distributed.gather_object(value, everywhere, dst=0)
    return everywhere


def first_message(words: str | None) -> str | None:
    """The words of the first rank that has any; None where no rank has.

    Args:
        words: This rank's, such as what went wrong.
    """
    return next((found for found in all_gather(words) if found), None)


def broadcast(value: T, source: int = 0) -> T:
    """The value of one rank, on every rank.

    Args:
        value: That of rank ``source`` counts.
        source: Who tells it.
    """
    told = [value]
    torch.distributed.broadcast_object_list(told, src=source)
    return told[0]
