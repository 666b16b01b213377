"""Make megatron-core run on this machine.

On a GPU, ``prepare_megatron`` only checks the version. Without one it makes megatron-core 0.16 run
on the CPU, over gloo:

1. The two ``torch.cuda`` functions by which megatron-core finds its device answer for the CPU.
2. Its random-number tracker uses torch's CPU generator.
3. Its optimizers are torch's, even where Transformer Engine or apex is installed, because their
   kernels need a GPU.
4. Some of its functions name the device in a literal ("cuda", "torch.cuda.FloatTensor").
   ``_DEVICE_SITES`` lists them, and the literals are replaced in the constants of their code.
   Nothing else in the functions changes, and calls cost nothing. A listed function that has no
   such literal raises an error, so a megatron-core that has moved its code is noticed at once.
"""

import contextlib
import importlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.parallel import platform

SUPPORTED_MEGATRON_CORE = "0.16."

_CPU_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

# module -> functions that allocate on, or compare with, a device that they name in a literal
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


def prepare_megatron() -> None:
    """Make megatron-core usable on this machine. Call it before any of its objects is built.

    Raises:
        ConfigError: The CPU support was not written for the installed version of megatron-core.
    """
    import megatron.core

    version = megatron.core.__version__
    if not version.startswith(SUPPORTED_MEGATRON_CORE):
        raise ConfigError(
            "megatron-core",
            f"version {version} is installed and {SUPPORTED_MEGATRON_CORE}x is supported",
            f"Run pip install 'megatron-core=={SUPPORTED_MEGATRON_CORE}*'",
        )
    if not platform.has_gpu():
        _use_torch_optimizers()
    if platform.has_gpu() or torch.cuda.current_device is _cpu_device:
        return
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    torch.cuda.synchronize = _no_synchronize
    _install_cpu_random_tracker()
    for module, names in _DEVICE_SITES.items():
        for name in names:
            _use_cpu_in(importlib.import_module(module), name)


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _no_synchronize(device: Any = None) -> None:
    """Do nothing: work on the CPU is done when its call returns."""


def _use_cpu_in(module: types.ModuleType, qualified_name: str) -> None:
    """Replace the device literals of a function or method by those of the CPU."""
    target: Any = module
    for part in qualified_name.split("."):
        target = inspect.getattr_static(target, part)
    function = inspect.unwrap(getattr(target, "__func__", target))
    code, count = _with_cpu_literals(function.__code__)
    if count == 0:
        raise RuntimeError(
            f"{module.__name__}.{qualified_name} does not name a CUDA device: "
            f"megatron-core has changed, so review {__name__}"
        )
    function.__code__ = code


def _with_cpu_literals(code: types.CodeType) -> tuple[types.CodeType, int]:
    """The code with its device literals replaced, in nested functions too; and their number."""
    count = 0

    def replace(constant: Any) -> Any:
        nonlocal count
        if isinstance(constant, str) and constant in _CPU_LITERALS:
            count += 1
            return _CPU_LITERALS[constant]
        if isinstance(constant, tuple):
            return tuple(replace(item) for item in constant)
        if isinstance(constant, types.CodeType):
            inner, inner_count = _with_cpu_literals(constant)
            count += inner_count
            return inner
        return constant

    constants = tuple(replace(constant) for constant in code.co_consts)
    return code.replace(co_consts=constants), count


def _install_cpu_random_tracker() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        """megatron-core's tracker, on top of torch's CPU generator."""

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
    # Recomputation saves and restores both states. Here the "CUDA" state is the CPU state, which is
    # saved twice.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _use_torch_optimizers() -> None:
    """Select what megatron-core falls back to if Transformer Engine and apex are not installed.

    megatron-core only checks whether the packages can be imported. On a login node, or where
    CUDA_VISIBLE_DEVICES is empty, it would therefore select kernels that cannot run.
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
