"""What the ranks of a job find out together."""

import torch


def first_of_ranks(words: str | None) -> str | None:
    """The words of the first rank that has any; None where no rank has. A collective.

    Args:
        words: This rank's, such as what went wrong.
    """
    everywhere: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, words)
    return next((found for found in everywhere if found), None)


def gather_on_first(value: object) -> list | None:
    """Every rank's value in the order of the ranks, on rank 0; None elsewhere. A collective."""
    is_first = torch.distributed.get_rank() == 0
    everywhere: list | None = [None] * torch.distributed.get_world_size() if is_first else None
    torch.distributed.gather_object(value, everywhere, dst=0)
    return everywhere
