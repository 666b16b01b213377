"""Muon and the AdamW beside it, against float64 by hand; saved, resumed, converted, refused."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.convert.verify import verify
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.checkpoint.state.resume import check_fits, load
from megatron_chameleon.config.checks.engines import check_engine
from megatron_chameleon.config.schema import Config, OptimizerConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.planner.memory import predict_memory
from megatron_chameleon.tokenizer.folder import fingerprint
from megatron_chameleon.training.engines.muon import COEFFICIENTS, orthogonalize
from tiny_engine import batches, make_engine, save, train

HEADS, GROUPS, HEAD_DIM = 4, 2, 8
RATE, DECAY = 2e-2, 0.1
MUON: dict[str, Any] = {
    "optimizer.name": "muon",
    "optimizer.lr": RATE,
    "optimizer.weight_decay": DECAY,
    "optimizer.clip_grad": 0.0,
}


def polar(matrix: Tensor) -> Tensor:
    """What Newton-Schulz approximates: U V^T, from the singular value decomposition."""
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


def by_hand(matrix: Tensor, steps: int) -> Tensor:
    """The Newton-Schulz steps in float64, on the singular values alone."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for a, b, c in itertools.islice(itertools.cycle(COEFFICIENTS), steps):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


def split(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices in a fused parameter: queries, keys and values, or gate and up."""
    if "linear_qkv" in name:
        rows = torch.arange(tensor.shape[0]).unflatten(0, (GROUPS, -1))
        queries = HEADS // GROUPS * HEAD_DIM
        parts = rows.split([queries, HEAD_DIM, HEAD_DIM], dim=1)
        return [tensor[part.flatten()] for part in parts]
    return list(tensor.chunk(2)) if "linear_fc1" in name else [tensor]


def join(name: str, parts: list[Tensor]) -> Tensor:
    if "linear_qkv" in name:
        parts = [part.unflatten(0, (GROUPS, -1)) for part in parts]
        return torch.cat(parts, dim=1).flatten(0, 1)
    return torch.cat(parts)


class ByHand:
    """Muon and AdamW in float64, as the papers have them."""

    def __init__(self, values: OptimizerConfig) -> None:
        self.values, self.state, self.step = values, {}, 0

    def update(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        """The new weight, for the update number ``step``."""
        weight, gradient = weight.double(), gradient.double()
        if name.endswith(("linear_qkv.weight", "linear_proj.weight")) or "linear_fc" in name:
            return self._muon(name, weight, gradient)
        zero = torch.zeros_like(weight)
        m, v = self.state.get(name, (zero, zero))
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        self.state[name] = m, v
        decay = DECAY if name.endswith(("word_embeddings.weight", "output_layer.weight")) else 0.0
        step = m / (1 - 0.9**self.step) / ((v / (1 - 0.95**self.step)).sqrt() + 1e-5)
        return weight - RATE * decay * weight - RATE * step

    def _muon(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        values, buffer = self.values, self.state.get(name, 0.0)
        buffer = values.muon_momentum * buffer + gradient  # as Jordan et al. write it
        self.state[name] = buffer
        update = buffer
        if values.muon_use_nesterov:
            update = gradient + values.muon_momentum * buffer
        scaled = []
        for part in split(name, update):
            rows, columns = part.shape
            scale = {
                "spectral": max(rows, columns) ** 0.5,
                "unit_rms_norm": (rows / columns) ** 0.5,
                "shape_scaling": max(1, rows / columns) ** 0.5,
            }[values.muon_scale_mode]
            found = by_hand(part, values.muon_num_ns_steps)
            scaled.append(values.muon_extra_scale_factor * scale * found)
        return weight - RATE * DECAY * weight - RATE * join(name, scaled)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"optimizer.muon_use_nesterov": False, "optimizer.muon_scale_mode": "unit_rms_norm"},
        {
            "optimizer.muon_num_ns_steps": 7,
            "optimizer.muon_scale_mode": "shape_scaling",
            "optimizer.muon_extra_scale_factor": 1.0,
            "optimizer.muon_momentum": 0.5,
        },
    ],
    ids=["default", "plain", "others"],
)
def test_updates_are_those_by_hand(topology: Topology, values: dict[str, Any]) -> None:
    engine = make_engine(topology, **MUON, **values)
    hand = ByHand(engine.config.optimizer)
    muon, adamw = 0, 0
    for step in range(1, 4):
        hand.step = step
        engine.compute_gradients(step, batches(step))
        before = {
            n: (p.detach().clone(), p.main_grad.clone()) for n, p in engine.named_parameters()
        }
        train(engine, step, step)
        for name, weight in engine.named_parameters():
            old, gradient = before[name]
            change = hand.update(name, old, gradient) - old.double()
            difference = weight.detach().double() - old.double() - change
            is_matrix = "linear" in name
            muon, adamw = muon + is_matrix, adamw + (not is_matrix)
            # Weights of up to 1 change by 1e-2, so fp32 has 1e-5 of the change. Newton-Schulz
            # magnifies a rounding error of 6e-8, where a singular value is near 0, up to 500 times.
            assert difference.norm() < 1e-4 * change.norm(), (step, name)
    assert (muon, adamw) == (3 * 2 * 4, 3 * (2 * (2 + 4) + 3))  # QK-norms belong to AdamW


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8), (1, 5)])
def test_orthogonalization(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-4
    found = orthogonalize(matrix, 5)
    torch.testing.assert_close(found.double(), by_hand(matrix, 5), rtol=0, atol=1e-4)
    # 0.98 to 1.15 for singular values above 0.3% of the norm, which these have
    assert (found - polar(matrix)).norm() < 0.15 * polar(matrix).norm()
    assert torch.equal(orthogonalize(matrix, 5), found)
    medium = orthogonalize(matrix, 5, "medium")  # bf16 has 8 bits
    assert 1e-4 < (medium - found).norm() / found.norm() < 0.1
    assert torch.equal(orthogonalize(torch.zeros(shape), 5), torch.zeros(shape))


def test_the_update_has_the_size_of_adamws() -> None:
    """With the defaults; AdamW's updates have a root mean square of 0.2 to 0.4 (2502.16982)."""
    matrix = torch.randn(64, 192, generator=torch.Generator().manual_seed(2))
    values = OptimizerConfig()
    update = orthogonalize(matrix, 5) * values.muon_extra_scale_factor * 192**0.5
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_resumes_bit_for_bit_with_the_average(
    topology: Topology, tiny_tokenizer: Path, tmp_path: Path, dtype: str
) -> None:
    values = {"training.dtype": dtype, "training.ema_decay": 0.5}
    engine, resumed = (make_engine(topology, **MUON, **values) for _ in range(2))
    train(engine, 1, 2)
    save(engine, tmp_path, 2, tiny_tokenizer)
    train(engine, 3, 4)
    expected = TrainingCheckpoint(save(engine, tmp_path, 4, tiny_tokenizer))
    train(resumed, 1, 1)
    load(tmp_path / "step_00000002", resumed)
    train(resumed, 3, 4)
    found = TrainingCheckpoint(save(resumed, tmp_path / "again", 4, tiny_tokenizer))
    assert found.names == expected.names
    names = [*expected.tensors, *expected.optimizer_tensors]
    assert all(torch.equal(found.read(name), expected.read(name)) for name in names)
    parts = {name.split(".")[2] for name in names if name.endswith("linear_fc1.weight")} - {"mlp"}
    main = {"fp32_param"} if dtype == "bf16" else set()
    assert parts == {"momentum_buffer", "ema"} | main


def test_conversions_and_what_a_resume_refuses(
    topology: Topology, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    engine = make_engine(topology, **MUON)
    train(engine, 1, 2)
    source = save(engine, tmp_path, 2, tiny_tokenizer)
    assert convert(source, tmp_path / "kept", "megatron").optimizer == "Optimizer state kept."
    result = verify(source, tmp_path / "kept")
    # a weight and its moments: 7 matrices a layer have one, 6 norms of a layer and 3 others two
    assert (result.differences, result.tensors) == ([], 2 * (7 * 2 + 6 * 3) + 3 * 3)
    load(tmp_path / "kept", engine)
    assert convert(source, tmp_path / "zero", "deepspeed").optimizer == (
        "Optimizer state omitted: the DeepSpeed format cannot store it."
    )
    assert not open_checkpoint(tmp_path / "zero").has_optimizer
    config, used = dataclasses.replace(engine.config), fingerprint(tiny_tokenizer)
    check_fits(source, config, used)
    config.optimizer = dataclasses.replace(config.optimizer, name="adamw")
    with pytest.raises(CheckpointError) as error:
        check_fits(source, config, used)
    assert str(error.value) == (
        f"{source}: Its moments are those of optimizer.name=muon, not of your config's adamw. Set "
        "it in your config, or begin a new run with its weights, which `chameleon convert "
        f"{source} DST --to megatron --no-optimizer` writes."
    )
    weights = convert(source, tmp_path / "weights", "megatron", optimizer=False).destination
    check_fits(weights, config, used)  # a new run may have another optimizer


def test_what_upstream_or_muon_cannot_do_is_refused() -> None:
    config = Config()
    config.optimizer.name = "muon"
    assert list(check_engine(config)) == []
    config.parallel.use_distributed_optimizer = True
    (problem,) = check_engine(config)
    assert str(problem) == (
        "parallel.use_distributed_optimizer: true splits matrices over the data-parallel ranks, "
        "but optimizer.name is muon, which needs whole ones. Set it to false, or "
        "optimizer.name=adamw."
    )
    config.parallel.use_distributed_optimizer, config.engine.name = False, "deepspeed"
    (problem,) = check_engine(config)
    assert str(problem) == (
        "optimizer.name: muon needs whole matrices, but the deepspeed engine flattens them. Use "
        "engine.name=megatron, or adamw."
    )


def test_the_planner_counts_one_moment() -> None:
    config = Config()
    adamw = predict_memory(config, 1000, 1).optimizer
    config.optimizer.name = "muon"
    model = config.model
    matrices = model.hidden_size * (4 * model.hidden_size + 3 * model.ffn_hidden_size)
    assert adamw - predict_memory(config, 1000, 1).optimizer == 4 * model.num_layers * matrices
