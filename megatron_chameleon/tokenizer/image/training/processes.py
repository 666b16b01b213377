"""The processes that train one image tokenizer together, each on an equal share of every batch.

    torchrun --nproc-per-node 2 -m megatron_chameleon tokenizer image photos/ --output DIR

Everything that a step computes over its batch is computed over all shares: losses, gradients, the
discriminator's batch statistics, and what becomes of unused codes. So the result is that of one
process with the same batch, up to rounding.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megatron_chameleon.errors import ChameleonError, ConfigError
from megatron_chameleon.parallel import collectives

T = TypeVar("T")


class Processes:
    """The place of this process among those that train together.

    Args:
        rank: Of this process.
        size: Number of processes. With one, nothing is sent.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def of_job(cls) -> "Processes":
        """All processes of the job, if it has joined a process group; otherwise this one alone."""
        if not torch.distributed.is_initialized():
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process reads, writes and speaks for all."""
        return self.rank == 0

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch that cannot be shared equally.

        Raises:
            ConfigError: The batch is not a multiple of the number of processes.
        """
        if batch_size % self.size:
            nearest = -(-batch_size // self.size) * self.size
            raise ConfigError(
                "training.batch_size",
                f"{batch_size} images cannot be shared equally by {self.size} processes",
                f"Use training.batch_size={nearest}, or another number of processes",
            )

    def part(self, count: int) -> slice:
        """Where this process's part of so many items is; the parts are consecutive."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch of all processes."""
        return items[self.part(len(items))]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, without a gradient."""
        if self.size > 1:
            values = values.detach().clone()
            torch.distributed.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, without a gradient."""
        return values if self.size == 1 else self.sum(values) / self.size

    def mean_losses(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means of scalars over all processes, all in one message."""
        if self.size == 1:
            return losses
        means = self.mean(torch.stack([value.float() for value in losses.values()]))
        return dict(zip(losses, means.unbind(), strict=True))

    def highest(self, values: Sequence[int]) -> list[int]:
        """Of each number, the highest of all processes."""
        if self.size == 1:
            return list(values)
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(values, device=device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    def rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, which have equally many, in the order of their ranks."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def union(self, found: dict[int, str]) -> dict[int, str]:
        """What all processes have found, together; the first one's text wins."""
        if self.size == 1 or not self.highest([len(found)])[0]:
            return found
        parts = reversed(collectives.all_gather(found))
        return {key: text for part in parts for key, text in part.items()}

    def on_first(self, action: Callable[[], T]) -> T:
        """Run a function on the first process; returns its result on every one.

        Raises:
            ChameleonError: On every process, if the function raised one.
        """
        return action() if self.size == 1 else collectives.run_on_rank_0(action)

    def raise_together(self, error: ChameleonError | None) -> None:
        """Raise the error of the first process that has one on every process."""
        if self.size > 1:
            collectives.raise_together(error)
        elif error is not None:
            raise error

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, whose backward pass averages the gradients of all processes.

        With several processes its weights become those of the first one.
        """
        if self.size == 1:
            return module
        names = inspect.signature(DistributedDataParallel).parameters
        new = "forward_sync_buffers" in names  # the name since PyTorch 2.13
        option = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return DistributedDataParallel(module, **option)  # type: ignore[arg-type]

    def with_global_batches(self, module: T) -> T:
        """Let the batch norms of a module see the batch of all processes; changes it in place.

        torch's ``SyncBatchNorm`` does the same on GPUs, and refuses to run on CPUs.
        """
        if self.size > 1:
            _replace_norms(module)  # type: ignore[arg-type]
        return module


def _replace_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            new = GlobalBatchNorm(child.num_features).to(child.weight.device)
            new.load_state_dict(child.state_dict())
            setattr(module, name, new)
        else:
            _replace_norms(child)


class _Sum(torch.autograd.Function):
    """The sum over all processes; the gradient of each is that of the sum of all losses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total


class GlobalBatchNorm(nn.BatchNorm2d):
    """``BatchNorm2d`` over the equal shares of all processes; it has the same state."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW.float()
        if not self.training:
            return super().forward(x_BCHW)
        count = x_BCHW[:, 0].numel() * torch.distributed.get_world_size()
        mean_C = _Sum.apply(x_BCHW.sum((0, 2, 3))) / count
        centred_BCHW = x_BCHW - mean_C[:, None, None]
        variance_C = _Sum.apply(centred_BCHW.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(variance_C * count / max(count - 1, 1), self.momentum)
            self.num_batches_tracked += 1
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        return torch.addcmul(
            self.bias[:, None, None].expand_as(x_BCHW), centred_BCHW, scale_C[:, None, None]
        )
