"""Check that DeepSpeed is installed, and set it up for this machine."""

import importlib.metadata
import os
import warnings

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.parallel import platform

SUPPORTED_DEEPSPEED = "0.19."


def check_deepspeed() -> None:
    """Check that DeepSpeed is installed, in the version that the engine was tested with.

    Raises:
        ConfigError: It is missing, or has another minor version.
    """
    remedy = "Run pip install -c constraints.txt 'megatron_chameleon[deepspeed]'"
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError as error:
        what = "deepspeed needs the package deepspeed, which is not installed"
        raise ConfigError("engine.name", what, remedy) from error
    if not version.startswith(SUPPORTED_DEEPSPEED):
        what = f"deepspeed {version} is installed and {SUPPORTED_DEEPSPEED}x is supported"
        raise ConfigError("engine.name", what, remedy)


def prepare_deepspeed(local_rank: int) -> None:
    """Make DeepSpeed use this machine and the existing process group in place of its own.

    Call it before anything else imports deepspeed.

    Args:
        local_rank: The rank of this process within its node. DeepSpeed reads it from the
            environment.
    """
    # DeepSpeed 0.19 calls two collectives by torch's older names, which warn on every call.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed.c10d_logger"
    )
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if not platform.has_gpu():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if not platform.has_gpu():
        # init_distributed would compile this for 44 s; only DeepSpeed's inference on CPUs needs it.
        __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=platform.distributed_backend(), verbose=False)
