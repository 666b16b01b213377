"""Weight gradients that the matrix product itself adds to ``main_grad``, and what reads them.

Transformer Engine's layers do so on a GPU. Layers of the same protocol stand in here: what their
backward pass returns for the weight is a dummy, full of NaN, that nobody may use.
"""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.model import chameleon
from megatron_chameleon.model.backend import LocalBackend
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.megatron import MegatronEngine
from megatron_chameleon.training.faults.nonfinite_origin import watch_gradients

VOCAB_SIZE = 96


class AddingProduct(torch.autograd.Function):
    """x W^T, whose backward pass adds to ``main_grad``.

    Source: ``_Linear.backward``, transformer_engine/pytorch/module/linear.py.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        weight.main_grad.add_(grad.flatten(0, -2).t() @ x.flatten(0, -2))
        weight.grad_added_to_main_grad = True
        return grad @ weight, torch.full_like(weight, torch.nan)


class AddingLinear(nn.Module):
    fuse_wgrad_accumulation = False

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if self.fuse_wgrad_accumulation:
            return AddingProduct.apply(input, weight)
        return super()._forward_impl(input, weight, **options)  # type: ignore[misc]


class AddingColumnLinear(AddingLinear, ColumnParallelLinear): ...


class AddingRowLinear(AddingLinear, RowParallelLinear): ...


class AddingBackend(LocalBackend):
    def column_parallel_linear(self) -> type:
        return AddingColumnLinear

    def row_parallel_linear(self) -> type:
        return AddingRowLinear


@pytest.fixture(autouse=True)
def adding_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chameleon, "select_backend", lambda config: AddingBackend())


def make_engine(topology: Topology, fused: bool, **parallel: Any) -> MegatronEngine:
    config = Config(model=ModelConfig(2, 32, 48, 4, seq_length=16))
    config.parallel = dataclasses.replace(config.parallel, **parallel)
    config.training.micro_batch_size, config.training.global_batch_size = 1, 2
    config.fusion.gradient_accumulation_fusion = fused
    return MegatronEngine(config, VOCAB_SIZE, topology)


def make_batches(broken: int | None = None) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(3):
        ids = torch.randint(VOCAB_SIZE, (1, 17), generator=generator)
        mask = torch.ones(1, 16) * (torch.inf if number == broken else 1.0)
        positions = torch.arange(16).expand(1, -1)
        batches.append(Batch(ids[:, :-1], ids[:, 1:], mask, ids[:, 1:] < 24, positions))
    return batches


@pytest.mark.parametrize(
    "parallel",
    [{}, {"use_distributed_optimizer": True}, {"recompute_granularity": "full"}],
    ids=["plain", "distributed", "recompute"],
)
def test_losses_and_norms_are_those_of_unfused_layers(
    topology: Topology, parallel: dict[str, Any]
) -> None:
    plain, fused = (make_engine(topology, fused, **parallel) for fused in (False, True))
    told = [m for m in fused.parts[0].modules() if getattr(m, "fuse_wgrad_accumulation", False)]
    assert len(told) == 2 * 4  # megatron-core's own output layer is not among them
    for step in range(1, 4):
        expected, found = (engine.train_step(step, make_batches()) for engine in (plain, fused))
        names = [name for name in expected if name.startswith(("loss", "grad_norm"))]
        assert len(names) > 8
        for name in names:
            assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    for (name, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_the_guard_finds_the_micro_batch_that_broke_a_buffer(topology: Topology) -> None:
    engine = make_engine(topology, fused=True)
    batches = make_batches(broken=1)
    with watch_gradients(engine) as found:
        engine.repeat_pass(1, batches)
    assert found["output_layer.weight"] == [1]  # it has a gradient per micro-batch
    assert found["decoder.layers.1.mlp.linear_fc2.weight"] == [1]  # the buffer stays broken
    with watch_gradients(engine) as found:
        engine.repeat_pass(1, make_batches())
    assert not found
