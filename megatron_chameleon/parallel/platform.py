"""The one module that knows whether this machine computes on GPUs or on CPUs.

With a usable GPU ``prepare()`` does nothing. Without one it makes megatron-core 0.16 run on CPU and
gloo:

1. the two ``torch.cuda`` functions by which megatron-core asks for its device answer for the CPU;
2. its random-number tracker forks torch's CPU generator;
3. its optimizers are torch's, also where Transformer Engine or apex is installed: their kernels
   need a GPU;
4. a fixed list of its functions names the device in a literal ("cuda", "torch.cuda.FloatTensor").
   Those literals are replaced in the functions' constants. Nothing else of the functions changes,
   calls cost nothing, and a function of the list without such a literal raises: a megatron-core
   that moved its code is noticed at once.
"""

import contextlib
import importlib
import importlib.metadata
import inspect
import os
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_chameleon.errors import ConfigError

SUPPORTED_MEGATRON_CORE = "0.16."
FP8_CAPABILITY = (8, 9)
SUPPORTED_DEEPSPEED = "0.19."

_CPU_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

# module -> functions that allocate on, or compare with, a device they name themselves
_DEVICE_SITES = {
    "megatron.core.pipeline_parallel.schedules": (
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_with_interleaving",
        "forward_backward_pipelining_without_interleaving",
    ),
    "megatron.core.optimizer.optimizer": (
        "MixedPrecisionOptimizer.__init__",
        "Float16OptimizerWithFloat16Params.__init__",
        "FP32Optimizer.__init__",
    ),
    "megatron.core.optimizer.distrib_optimizer": (
        "DistributedOptimizer.__init__",
        "DistributedOptimizer._build_model_and_main_param_groups",
    ),
    "megatron.core.optimizer.clip_grads": (
        "get_grad_norm_fp32",
        "clip_grad_by_total_norm_fp32",
        "count_zeros_fp32",
    ),
    "megatron.core.transformer.utils": ("get_default_causal_mask",),
    "megatron.core.utils": ("local_multi_tensor_l2_norm",),
}


def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def device_name() -> str | None:
    """What CUDA calls the GPU that this process computes on; None on a CPU."""
    return torch.cuda.get_device_name() if has_gpu() else None


def backend() -> str:
    """The torch.distributed backend of this platform."""
    return "nccl" if has_gpu() else "gloo"


def random_generator() -> torch.Generator:
    """The generator that dropout on this device draws from."""
    if has_gpu():
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator


Step = Callable[[], None]


def recorder(generator: torch.Generator) -> Callable[[Step], Step]:
    """What turns a step into one that is recorded as a CUDA graph at its second call.

    A step works on tensors that stay where they are, and never waits for the device. Its first call
    runs it as it is, so that what is set up or compiled once is; later ones replay the graph. On a
    machine without a GPU it stays what it is. Steps of one recorder run one at a time: their graphs
    share the memory of what they compute in between.

    Args:
        generator: What the steps draw from; a replay goes on where the last call left off.
    """
    if not has_gpu():
        return lambda step: step
    pool = torch.cuda.graph_pool_handle()

    def record(step: Step) -> Step:
        calls: list[Step] = []

        def call() -> None:
            if not calls:
                calls.append(step)
            elif calls[0] is step:
                graph = torch.cuda.CUDAGraph()
                graph.register_generator_state(generator)
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    step()
                calls[0] = graph.replay
            calls[0]()

        return call

    return record


def has_transformer_engine() -> bool:
    """Whether this process computes with Transformer Engine's layers: wherever they can run."""
    if not has_gpu():
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def fp8_obstacle() -> str | None:
    """What this machine lacks for FP8 matrix products, as the end of a sentence; None: nothing."""
    if not has_gpu():
        return "needs a GPU, and this machine has none"
    capability = torch.cuda.get_device_capability()
    if capability < FP8_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"needs a GPU of compute capability 8.9, and this one has {found}"
    if not has_transformer_engine():
        return "needs Transformer Engine, and it cannot be imported here"
    return None


def prepare() -> None:
    """Make megatron-core usable on this machine; call it before the first of its objects is built.

    Raises:
        ConfigError: megatron-core is of a version that the CPU support was not written for.
    """
    import megatron.core

    version = megatron.core.__version__
    if not version.startswith(SUPPORTED_MEGATRON_CORE):
        raise ConfigError(
            "megatron-core",
            f"version {version} is installed and {SUPPORTED_MEGATRON_CORE}x is supported",
            f"Run pip install 'megatron-core=={SUPPORTED_MEGATRON_CORE}*'",
        )
    if not has_gpu():
        _use_torch_optimizers()
    if has_gpu() or torch.cuda.current_device is _cpu_device:
        return
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    torch.cuda.synchronize = _no_synchronize
    _install_cpu_random_tracker()
    for module, names in _DEVICE_SITES.items():
        for name in names:
            _name_cpu_in(importlib.import_module(module), name)


def check_deepspeed() -> None:
    """See that DeepSpeed is installed, in the version that the engine was tested with.

    Raises:
        ConfigError: It is missing, or of another minor version.
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
    """Let DeepSpeed use this machine and the process group there is, instead of its own.

    Call it before anything else imports deepspeed.

    Args:
        local_rank: Of this process within its node; DeepSpeed reads it from the environment.
    """
    # DeepSpeed 0.19 calls torch's older names of two collectives: a line on every call
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed.c10d_logger"
    )
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if not has_gpu():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if not has_gpu():
        # init_distributed would compile this for 44 s; only DeepSpeed's CPU inference needs it
        __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend(), verbose=False)


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _no_synchronize(device: Any = None) -> None:
    """CPU work is done when its call returns."""


def _name_cpu_in(module: types.ModuleType, qualified_name: str) -> None:
    target: Any = module
    for part in qualified_name.split("."):
        target = inspect.getattr_static(target, part)
    function = inspect.unwrap(getattr(target, "__func__", target))
    code, count = _replace_literals(function.__code__)
    if count == 0:
        raise RuntimeError(
            f"{module.__name__}.{qualified_name} names no CUDA device: "
            f"megatron-core changed; review {__name__}"
        )
    function.__code__ = code


def _replace_literals(code: types.CodeType) -> tuple[types.CodeType, int]:
    """The code with its device literals replaced, nested functions too, and their number."""
    count = 0

    def replace(constant: Any) -> Any:
        nonlocal count
        if isinstance(constant, str) and constant in _CPU_LITERALS:
            count += 1
            return _CPU_LITERALS[constant]
        if isinstance(constant, tuple):
            return tuple(replace(item) for item in constant)
        if isinstance(constant, types.CodeType):
            inner, inner_count = _replace_literals(constant)
            count += inner_count
            return inner
        return constant

    constants = tuple(replace(constant) for constant in code.co_consts)
    return code.replace(co_consts=constants), count


def _install_cpu_random_tracker() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        """megatron-core's tracker over torch's CPU generator."""

        _current_state_name: str

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} or seed {seed} is already tracked")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator:
            outer, outer_name = torch.get_rng_state(), self._current_state_name
            if outer_name != "default-rng":
                self.states_[outer_name] = outer
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(
                    outer if outer_name == "default-rng" else self.states_[outer_name]
                )
                self._current_state_name = outer_name

    megatron_random.CudaRNGStatesTracker = CpuRNGStatesTracker
    # Recomputation saves and restores both states; here the "CUDA" state is the CPU state, saved
    # twice.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _use_torch_optimizers() -> None:
    """What megatron-core falls back to where neither Transformer Engine nor apex can be imported.

    It asks for the packages only, so that on a login node, or where CUDA_VISIBLE_DEVICES is empty,
    it would take their kernels.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    optimizer.Adam, optimizer.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (base, clip_grads):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
