"""On a CPU only device literals change, and a megatron-core that has changed is noticed."""

import types

import megatron.core
import pytest
import torch
from megatron.core import optimizer, utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as base_optimizer

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.parallel import megatron_setup


def names_a_device() -> torch.Tensor:
    return torch.zeros([2], device="cuda")


def names_no_device() -> int:
    return 3


def test_literals_are_replaced_also_in_nested_functions() -> None:
    def outer() -> str:
        def inner() -> tuple[str, ...]:
            return ("torch.cuda.FloatTensor", "untouched")

        return inner()[0]

    code, count = megatron_setup._with_cpu_literals(outer.__code__)
    assert count == 1
    assert types.FunctionType(code, {})() == "torch.FloatTensor"


def test_a_function_runs_on_the_cpu_afterwards() -> None:
    module = types.ModuleType("sample")
    module.names_a_device = names_a_device  # type: ignore[attr-defined]
    megatron_setup._use_cpu_in(module, "names_a_device")
    assert names_a_device().device == torch.device("cpu")


def test_a_listed_function_without_a_device_is_refused() -> None:
    module = types.ModuleType("sample")
    module.names_no_device = names_no_device  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"sample\.names_no_device does not name a CUDA device"):
        megatron_setup._use_cpu_in(module, "names_no_device")


def test_another_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron.core, "__version__", "0.99.0")
    with pytest.raises(ConfigError, match=r"version 0\.99\.0 is installed and 0\.16\.x"):
        megatron_setup.prepare_megatron()


def test_without_a_gpu_optimizers_are_torchs_whatever_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = object()  # stands for Transformer Engine's, which runs on GPUs only
    monkeypatch.setattr(optimizer, "Adam", kernel)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
    for module, name in (
        (clip_grads, "l2_norm_impl"),
        (clip_grads, "multi_tensor_applier"),
        (clip_grads, "multi_tensor_scale_impl"),
        (base_optimizer, "multi_tensor_applier"),
        (base_optimizer, "multi_tensor_scale_impl"),
    ):
        monkeypatch.setattr(module, name, kernel)
    megatron_setup.prepare_megatron()
    assert optimizer.Adam is torch.optim.AdamW
    assert optimizer.USING_PYTORCH_OPTIMIZER
    assert not distrib_optimizer.HAVE_APEX_OR_TE
    assert not distrib_optimizer.USING_TE_OPTIMIZER
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 2.0)
    assert clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm
    clip_grads.clip_grad_by_total_norm_fp32([parameter], 1.0, 4.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0)
    copy = torch.zeros(4)
    base_optimizer._multi_tensor_copy_this_to_that([parameter.grad], [copy], torch.zeros(1))
    assert torch.equal(copy, parameter.grad)
