"""QLoRA: frozen matrices in 4 bits, compared with bitsandbytes' own functions and with a model
whose weights are the numbers that the packed ones stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.checkpoint.names.adapters import is_adapter
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.config.checks.adapters import check_adapter
from megatron_chameleon.config.schema import Config
from megatron_chameleon.model import backend
from megatron_chameleon.model.backend import machine_problems
from megatron_chameleon.model.quantized.linear import quantized_layers
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.planner.memory import predict_memory
from megatron_chameleon.training.engines.megatron import MegatronEngine
from tiny_engine import VOCAB_SIZE, batches, make_engine, save, train

NF4 = {"adapter.rank": 4, "adapter.quantize": "nf4"}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"training.dtype": "bf16"},
    "DoRA": {"adapter.dora": True},
    "some layers, recomputed": {
        "adapter.target_modules": ["v_proj", "down_proj"],
        "parallel.recompute_granularity": "full",
    },
}


def weights(engine: MegatronEngine) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in engine.named_parameters()}


def whole(engine: MegatronEngine) -> dict[str, Tensor]:
    """The matrices that the packed ones stand for, by their names."""
    (part,) = engine.parts
    names = {id(module): name for name, module in part.named_modules()}
    return {f"{names[id(m)]}.weight": m.whole_weight() for m in quantized_layers(part)}


def test_packed_matrices_are_those_of_bitsandbytes(topology: Topology) -> None:
    plain = weights(make_engine(topology, **{"adapter.rank": 4}))
    engine = make_engine(topology, **NF4)
    found, packed = whole(engine), weights(engine)
    assert len(found) == 2 * 4
    for name, matrix in found.items():
        numbers, state = functional.quantize_4bit(
            plain[name], quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(packed[name], numbers)
        assert torch.equal(matrix, functional.dequantize_4bit(numbers, state))
        # 16 values for numbers that are normally distributed leave a tenth or more, not a rounding
        assert 0.05 < (matrix - plain[name]).abs().mean() / plain[name].abs().mean() < 0.4
    for name in plain.keys() - found.keys():  # embedding, head, norms, adapters
        assert torch.equal(packed[name], plain[name])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_a_model_with_the_numbers_of_the_packed_one(
    topology: Topology, kind: str
) -> None:
    engine = make_engine(topology, **NF4, **KINDS[kind])
    plain = make_engine(topology, **{"adapter.rank": 4}, **KINDS[kind])
    with torch.no_grad():
        parameters = dict(plain.named_parameters())
        for name, matrix in whole(engine).items():
            parameters[name].copy_(matrix)
        for part in plain.parts:  # whose lengths of rows are those of other weights
            for module in part.modules():
                if hasattr(module, "reset_magnitude"):
                    module.reset_magnitude()
        if KINDS[kind].get("adapter.dora"):
            plain.optimizer.reload_model_params()
    for step in (1, 2, 3):
        mine, other = (e.train_step(step, batches(step)) for e in (engine, plain))
        # bitsandbytes computes the same product of the same numbers
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    trained = {n: w for n, w in weights(engine).items() if is_adapter(n)}
    assert trained
    for name, weight in weights(plain).items():
        if name in trained:
            torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_holds_the_adapter_alone_and_resumes_bit_for_bit(
    topology: Topology, tmp_path: Path, tiny_tokenizer: Path
) -> None:
    base = make_engine(topology)
    train(base, 1, 1)
    reader = open_checkpoint(save(base, tmp_path / "base", 1, tiny_tokenizer))
    engine = make_engine(topology, reader, **NF4)
    train(engine, 1, 2)
    folder = save(engine, tmp_path / "run", 2, tiny_tokenizer)
    stored = TrainingCheckpoint(folder)
    assert stored.tensors and all(is_adapter(name) for name in stored.tensors)
    assert all("_adapter." in name for name in stored.optimizer_tensors if "layers" in name)
    assert torch.uint8 not in {tensor.dtype for tensor in stored.tensors.values()}
    train(engine, 3, 4)
    again = make_engine(topology, reader, **NF4)
    again.restore(folder, 2)
    train(again, 3, 4)
    found = weights(again)
    assert all(torch.equal(w, found[name]) for name, w in weights(engine).items())
    # The checkpoint does not depend on the quantization: without it, the run goes on.
    plain = make_engine(topology, reader, **{"adapter.rank": 4})
    plain.restore(folder, 2)
    train(plain, 3, 3)


def test_the_planner_counts_its_bytes(topology: Topology) -> None:
    engine = make_engine(topology, **NF4, **{"training.dtype": "bf16"})
    (part,) = engine.parts
    packed = {id(layer.weight): layer.packed_bytes() for layer in quantized_layers(part)}
    found = sum(packed.get(id(p), p.nbytes) for p in part.parameters())
    # Each matrix has tables of 16 and 256 values of its own and an offset, which are not counted,
    # and the scales of the last, shorter block.
    tables = len(packed) * 4 * (16 + 256 + 1)
    planned = predict_memory(engine.config, VOCAB_SIZE, 1).weights
    assert 0 <= found - planned - tables <= len(packed) * 4


def test_matrices_wait_in_main_memory(topology: Topology) -> None:
    """A model that moves to a device leaves the matrices behind that are not set."""
    engine = make_engine(topology, **NF4)
    layer = next(quantized_layers(engine.parts[0]))
    fresh = type(layer)(
        32, 64, config=layer.config, init_method=None, bias=False, skip_bias_add=False,
        **({"input_is_parallel": True} if hasattr(layer, "input_is_parallel") else {}),
    )  # fmt: skip
    fresh.to("meta")
    assert fresh.weight.device.type == "cpu"
    fresh.quantize(torch.randn(64, 32))
    assert fresh.to("meta").weight.device.type == "meta"


def test_what_it_does_not_go_with(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.adapter.quantize = "nf4"
    assert [str(problem) for problem in check_adapter(config)] == [
        "adapter.quantize: nf4 is set, but adapter.rank is 0: there is no adapter. Set "
        "adapter.rank, or remove it."
    ]
    config.adapter.rank = 4
    assert not list(check_adapter(config)) and not machine_problems(config)
    config.fp8.format, config.engine.name, config.engine.zero_stage = "hybrid", "deepspeed", 3
    assert [str(problem) for problem in check_adapter(config)] == [
        "adapter.quantize: nf4, but fp8.format is hybrid, and a matrix has one format. Set it to "
        "none, or fp8.format to null.",
        "adapter.quantize: nf4, but engine.zero_stage 3 splits the weights, and packed ones cannot "
        "be. Set engine.zero_stage to 2, or use engine.name=megatron.",
    ]
    config.fp8.format, config.parallel.tensor_model_parallel_size = None, 2
    (split, _) = check_adapter(config)
    assert str(split) == (
        "parallel.tensor_model_parallel_size: 2, but adapter.quantize is nf4: a scale is for 64 "
        "neighbours in a matrix, so a split matrix would get other numbers. Set it to 1 and use "
        "pipeline or data parallelism, or adapter.quantize=none."
    )
    monkeypatch.setattr(backend, "is_installed", lambda: False)
    assert [str(problem) for problem in machine_problems(config)] == [
        "adapter.quantize: nf4 needs bitsandbytes, which is not installed. Run pip install -c "
        "constraints.txt 'megatron_chameleon[qlora]', or set it to none."
    ]
