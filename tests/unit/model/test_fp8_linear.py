"""The emulated layers compared with the formulas of an FP8 product in float64."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.tensor_parallel.random import checkpoint
from torch import Tensor, nn

from megatron_chameleon.config.schema import Config, Fp8Config
from megatron_chameleon.model import chameleon
from megatron_chameleon.model.backend import (
    EmulatedFp8Backend,
    LocalBackend,
    ScaledDotProductAttention,
    TransformerEngineBackend,
    layer_backend,
    packs_documents,
    select_backend,
)
from megatron_chameleon.model.fp8 import E4M3, E5M2, amax, current_scale, quantise
from megatron_chameleon.model.fp8_linear import (
    EmulatedColumnParallelLinear,
    EmulatedFp8Linear,
    EmulatedRowParallelLinear,
    share_delayed_scaling,
    start_fp8_step,
)
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.megatron_setup import prepare_megatron

DELAYED = Fp8Config(format="hybrid", amax_history_len=4, emulate=True)
TENSORWISE = Fp8Config(format="hybrid", recipe="tensorwise", emulate=True)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting: Path = tmp_path_factory.mktemp("gloo") / "meeting"
    prepare_megatron()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    megatron_random.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build(fp8: Fp8Config, kind: type = EmulatedColumnParallelLinear, seed: int = 1) -> Any:
    """A layer from 32 to 48 features with random weights."""
    options: dict[str, Any] = {"bias": False, "skip_bias_add": False, "init_method": lambda w: w}
    if kind is EmulatedRowParallelLinear:
        options["input_is_parallel"] = True
    layer = kind(32, 48, config=chameleon.transformer_config(Config()), fp8=fp8, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_(0, 0.1, generator=generator)
    return layer


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient of one micro-batch."""
    x = x.clone().requires_grad_()
    y, _ = layer(x)
    weight: Any = layer.weight
    return y.detach(), *torch.autograd.grad(y, [x, weight], grad)


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return quantise(x, scale, dtype).double() / scale.double()


def formula(
    x: Tensor, weight: Tensor, grad: Tensor, scales: tuple[Tensor, Tensor, Tensor], fp8: Fp8Config
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = rounded(x, scales[0], E4M3), rounded(weight, scales[1], E4M3)
    grad = rounded(grad, scales[2], E5M2 if fp8.format == "hybrid" else E4M3)
    return x @ weight.t(), grad @ weight, grad.flatten(0, 1).t() @ x.flatten(0, 1)


# fp32 sums of up to 48 products of FP8 values, compared with float64
SUMS = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("kind", [EmulatedColumnParallelLinear, EmulatedRowParallelLinear])
@pytest.mark.parametrize("format_", ["hybrid", "e4m3"])
def test_current_scaling_quantises_input_weight_and_gradient(format_: str, kind: type) -> None:
    fp8 = Fp8Config(format=format_, recipe="tensorwise", emulate=True)
    layer = build(fp8, kind)
    x, grad = draw(2, 8, 2, 32), 1e-4 * draw(3, 8, 2, 48)
    gradient_format = E5M2 if format_ == "hybrid" else E4M3
    scales = (
        current_scale(amax(x), E4M3),
        current_scale(amax(layer.weight), E4M3),
        current_scale(amax(grad), gradient_format),
    )
    expected = formula(x, layer.weight.detach(), grad, scales, fp8)
    for found, exact in zip(step(layer, x, grad), expected, strict=True):
        torch.testing.assert_close(
            found.double() / exact.abs().amax(), exact / exact.abs().amax(), **SUMS
        )


def test_delayed_scaling_uses_the_scales_of_earlier_micro_batches() -> None:
    layer = build(DELAYED)
    forward = share_delayed_scaling([layer])
    scales = (torch.ones(()), torch.ones(()), torch.ones(()))
    largest: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(6):  # more than the history holds; the largest values do not come first
        size = (3.0, 5.0, 1.0, 0.5, 0.2, 0.1)[i]
        x, grad = size * draw(i, 8, 2, 32), size * draw(10 + i, 8, 2, 48)
        start_fp8_step(layer)
        expected = formula(x, layer.weight.detach(), grad, scales, DELAYED)
        for found, exact in zip(step(layer, x, grad), expected, strict=True):
            unit = exact.abs().amax()
            torch.testing.assert_close(found.double() / unit, exact / unit, **SUMS)
        forward.update()
        largest.append((amax(x), amax(layer.weight), amax(grad)))
        seen = [torch.stack(values).amax() for values in zip(*largest[-4:], strict=True)]
        scales = tuple(  # type: ignore[assignment]
            torch.full((), end) / value
            for end, value in zip((448.0, 448.0, 57344.0), seen, strict=True)
        )
        with torch.no_grad():
            layer.weight.mul_(0.9)


def test_the_weight_is_quantised_once_per_step() -> None:
    layer = build(DELAYED)
    forward = share_delayed_scaling([layer])
    x, grad = draw(1, 8, 2, 32), draw(2, 8, 2, 48)
    outputs = []
    for _ in range(3):
        outputs.append(step(layer, x, grad)[0])
        forward.update()
    # scale 1 in the first micro-batch; then only the input's changes, not the kept weight's
    kept = rounded(layer.weight.detach(), torch.ones(()), E4M3)
    exact = rounded(x, current_scale(amax(x), E4M3), E4M3) @ kept.t()
    torch.testing.assert_close(outputs[2].double(), exact, **SUMS)
    weight_history, input_history = forward.history[:, 1], forward.history[:, 0]
    assert weight_history.tolist() == [0.0, 0.0, 0.0, amax(layer.weight).item()]
    assert input_history.tolist() == [0.0, *3 * [amax(x).item()]]
    start_fp8_step(layer)
    changed = step(layer, x, grad)[0]
    assert not torch.equal(changed, outputs[2])


def test_evaluation_leaves_the_state_alone() -> None:
    layer = build(DELAYED)
    forward = share_delayed_scaling([layer])
    layer.eval()
    with torch.no_grad():
        layer(draw(1, 8, 2, 32))
    forward.update()
    assert forward.history.abs().sum() == 0
    assert forward.scale.tolist() == [1.0, 1.0]


def test_recomputation_repeats_the_first_scales() -> None:
    """With two micro-batches in flight, as in a pipeline, scales change before the backward."""
    states, results = [], []
    for recompute in (False, True):
        layer = build(DELAYED)
        forward = share_delayed_scaling([layer])
        pending = []
        for i in range(2):
            x = ((i + 1) * draw(i, 8, 2, 32)).requires_grad_()
            y = checkpoint(lambda t: layer(t)[0], False, x) if recompute else layer(x)[0]  # noqa: B023
            forward.update()
            pending.append((x, y))
        for i, (x, y) in enumerate(pending):
            y.backward(draw(10 + i, 8, 2, 48))
            results.append((y.detach(), x.grad))
        results.append((layer.weight.grad, layer.weight.grad))
        states.append(layer.get_extra_state())
    for direct, again in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))
    for key in ("scale", "amax_history"):
        assert torch.equal(states[0][key], states[1][key])


def trained(fp8: Fp8Config) -> Any:
    layer = build(fp8)
    forward = share_delayed_scaling([layer])
    for i in range(3):
        step(layer, draw(i, 8, 2, 32), draw(10 + i, 8, 2, 48))
        start_fp8_step(layer)
        forward.update()
    return layer


@pytest.mark.parametrize("length", [2, 4, 6])
def test_the_state_is_saved_and_adapts_to_other_lengths(length: int) -> None:
    old = trained(DELAYED)
    fp8 = Fp8Config(format="hybrid", amax_history_len=length, emulate=True)
    new = build(fp8)
    share_delayed_scaling([new])
    new.load_state_dict(old.state_dict())
    before, after = old.get_extra_state(), new.get_extra_state()
    assert torch.equal(before["scale"], after["scale"])
    assert after["amax_history"].shape == (length, 3)
    kept = min(length, 4)
    assert torch.equal(before["amax_history"][:kept], after["amax_history"][:kept])
    assert after["amax_history"][kept:].abs().sum() == 0
    if length == 4:
        data = draw(7, 8, 2, 32), draw(8, 8, 2, 48)
        for a, b in zip(step(old, *data), step(new, *data), strict=True):
            assert torch.equal(a, b)


def test_without_a_usable_state_the_scales_start_from_one() -> None:
    layer = build(Fp8Config(format="e4m3", amax_history_len=4, emulate=True))
    share_delayed_scaling([layer])
    for state in (None, torch.empty(0, dtype=torch.uint8), trained(DELAYED).get_extra_state()):
        layer.set_extra_state(state)
        assert layer.get_extra_state()["scale"].tolist() == [1.0, 1.0, 1.0]
    plain = build(TENSORWISE)
    plain.set_extra_state(trained(DELAYED).get_extra_state())
    assert plain.get_extra_state() is None


def test_bf16_in_bf16_out() -> None:
    layer = build(TENSORWISE).bfloat16()
    x, grad = draw(2, 8, 2, 32).bfloat16(), draw(3, 8, 2, 48).bfloat16()
    found = step(layer, x, grad)
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}
    expected = formula(
        x,
        layer.weight.detach(),
        grad,
        (
            current_scale(amax(x), E4M3),
            current_scale(amax(layer.weight), E4M3),
            current_scale(amax(grad), E5M2),
        ),
        TENSORWISE,
    )
    for tensor, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor.float(), exact.bfloat16().float(), rtol=8e-3, atol=1e-6)


def config_with(**values: Any) -> Config:
    config = Config()
    config.fp8 = Fp8Config(**values)
    return config


def fp8_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, EmulatedFp8Linear)]


@pytest.fixture
def built() -> Callable[[Config], nn.Module]:
    from megatron_chameleon.parallel.topology import Topology

    topology = Topology(1, 0, 0, 1, 0, 1, 0, 1)
    return lambda config: chameleon.build_model(config, 64, topology)[0]


def test_four_products_per_layer_and_no_others(built) -> None:
    model = built(config_with(format="hybrid", emulate=True))
    names = ("self_attention.linear_proj", "self_attention.linear_qkv")
    names += ("mlp.linear_fc1", "mlp.linear_fc2")
    expected = {f"decoder.layers.{i}.{name}" for i in range(4) for name in names}
    assert set(fp8_layers(model)) == expected
    plain = built(Config())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert set(model.state_dict()) == set(plain.state_dict())
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_first_and_last_layers_stay_in_bf16(built) -> None:
    values = {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}
    config = config_with(format="e4m3", recipe="tensorwise", emulate=True, **values)
    assert {name.split(".")[2] for name in fp8_layers(built(config))} == {"1"}
    transformer, backend = chameleon.transformer_config(config), EmulatedFp8Backend(config.fp8)
    kinds = [type(layer_backend(backend, transformer, layer)) for layer in range(4)]
    assert kinds == [LocalBackend, EmulatedFp8Backend, LocalBackend, LocalBackend]


def test_the_scales_are_updated_once_per_micro_batch(built) -> None:
    model = built(config_with(format="hybrid", amax_history_len=8, emulate=True))
    tokens = torch.arange(32).reshape(2, 16) % 64
    positions = torch.arange(16).expand(2, 16)
    start_fp8_step(model)
    for _ in range(2):
        losses, *_ = model(tokens, positions, None, labels=tokens)
        losses.sum().backward()
    for name in fp8_layers(model):
        state = model.get_submodule(name).get_extra_state()
        # entries for input, weight and output gradient
        assert (state["amax_history"] > 0).sum(0).tolist() == [2, 1, 2], name
        assert (state["scale"] != 1).all()


def test_the_backend_suits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(format="hybrid")
    assert type(select_backend(config)) is LocalBackend
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: True)
    backend = select_backend(config)
    assert isinstance(backend, TransformerEngineBackend)
    assert backend.fuse_layernorm_and_linear() is False
    assert backend.column_parallel_linear() is transformer_engine.TEColumnParallelLinear
    assert backend.row_parallel_linear() is transformer_engine.TERowParallelLinear
    assert backend.layer_norm(rms_norm=True) is transformer_engine.TENorm
    assert backend.core_attention() is transformer_engine.TEDotProductAttention
    config.data.reset_attention = True  # in fp32, Transformer Engine would write out the scores
    assert select_backend(config).core_attention() is ScaledDotProductAttention
    config.training.dtype = "bf16"
    assert select_backend(config).core_attention() is transformer_engine.TEDotProductAttention
    assert packs_documents(config)
    config.fp8.emulate = True
    assert not packs_documents(config)
    assert isinstance(select_backend(config), EmulatedFp8Backend)


def test_megatron_core_gets_every_field_or_none() -> None:
    config = config_with(format="hybrid", margin=1, amax_history_len=64)
    transformer = chameleon.transformer_config(config)
    assert (transformer.fp8, transformer.fp8_recipe, transformer.fp8_margin) == (
        "hybrid",
        "delayed",
        1,
    )
    assert (transformer.fp8_amax_history_len, transformer.fp8_amax_compute_algo) == (64, "max")
    assert transformer.first_last_layers_bf16 is False
    config.fp8.emulate = True
    assert chameleon.transformer_config(config).fp8 is None
    config.fp8 = Fp8Config(format="e4m3", recipe="tensorwise", num_layers_at_end_in_bf16=2)
    transformer = chameleon.transformer_config(config)
    assert transformer.first_last_layers_bf16 is True
    assert (transformer.num_layers_at_start_in_bf16, transformer.num_layers_at_end_in_bf16) == (
        0,
        2,
    )
