"""The one module that knows whether this machine computes on GPUs or on CPUs.

Everything else asks here. What has to be done to compute on a CPU stands next door:
``megatron_setup.py`` for megatron-core, ``deepspeed_setup.py`` for DeepSpeed.
"""

import resource

import torch

FP8_CAPABILITY = (8, 9)


def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def copy_to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the host on the device, copied without a wait.

    A GPU fetches it from pinned memory. A copy from pageable memory would wait for what the GPU was
    given to do before.
    """
    if not has_gpu():
        return tensor
    # An expanded tensor cannot be pinned as it is, hence the contiguous copy.
    return tensor.contiguous().pin_memory().to(device(), non_blocking=True)


def device_name() -> str | None:
    """CUDA's name for the GPU that this process computes on; None on a CPU."""
    return torch.cuda.get_device_name() if has_gpu() else None


def gpu_memory_bytes() -> int | None:
    """Memory of the GPU that this process computes on; None on a CPU."""
    if not has_gpu():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def peak_bytes() -> int:
    """The most memory that this process has held so far: of its GPU, or on a CPU of the machine."""
    if has_gpu():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def distributed_backend() -> str:
    """The torch.distributed backend for this machine."""
    return "nccl" if has_gpu() else "gloo"


def random_generator() -> torch.Generator:
    """The generator that dropout on this device draws from."""
    if has_gpu():
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator


def has_transformer_engine() -> bool:
    """Whether this process computes with Transformer Engine's layers, which need a GPU."""
    if not has_gpu():
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def fp8_obstacle() -> str | None:
    """What this machine lacks for FP8 matrix products, as the end of a sentence, or None."""
    if not has_gpu():
        return "needs a GPU, and this machine has none"
    capability = torch.cuda.get_device_capability()
    if capability < FP8_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"needs a GPU of compute capability 8.9, and this one has {found}"
    if not has_transformer_engine():
        return "needs Transformer Engine, and it cannot be imported here"
    return None
