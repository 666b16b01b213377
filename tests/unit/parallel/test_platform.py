"""A machine's GPU and packages decide which configs it can train."""

import pytest
import torch
from megatron.core.extensions import transformer_engine

from megatron_chameleon.config.schema import Config, Fp8Config, ParallelConfig
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.model.backend import check_machine
from megatron_chameleon.parallel import platform


def pretend(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, has_te: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(transformer_engine, "HAVE_TE", has_te)


@pytest.mark.parametrize(
    ("capability", "has_te", "message"),
    [
        (None, True, "hybrid needs a GPU, and this machine has none."),
        ((8, 0), True, "hybrid needs a GPU of compute capability 8.9, and this one has 8.0."),
        ((9, 0), False, "hybrid needs Transformer Engine, and it cannot be imported here."),
    ],
)
def test_what_is_missing_is_said(
    capability: tuple[int, int] | None,
    has_te: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, capability, has_te)
    config = Config(fp8=Fp8Config(format="hybrid"))
    with pytest.raises(ConfigError) as caught:
        check_machine(config)
    assert str(caught.value) == (
        f"fp8.format: {message} Set fp8.emulate=true to see the recipe's effect, or run on "
        "H100/H200 with Transformer Engine."
    )
    config.fp8.emulate = True
    check_machine(config)
    check_machine(Config())


def test_a_hopper_gpu_with_transformer_engine_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), True)
    assert platform.has_transformer_engine()
    check_machine(Config(fp8=Fp8Config(format="hybrid")))


def test_transformer_engine_without_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None, True)
    assert not platform.has_transformer_engine()


def test_context_parallelism_needs_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(parallel=ParallelConfig(context_parallel_size=2))
    pretend(monkeypatch, (9, 0), False)
    with pytest.raises(ConfigError) as caught:
        check_machine(config)
    assert str(caught.value).startswith(
        "parallel.context_parallel_size: 2 needs a GPU with Transformer Engine, and this machine "
        "has none. Set it to 1"
    )
    pretend(monkeypatch, (9, 0), True)
    check_machine(config)
