"""What a run that trains a part of the weights needs: every byte of it counted in real engines."""

import math
from typing import Any

import pytest
import torch

from megatron_chameleon.checkpoint.names.adapters import A, adapter_tensors
from megatron_chameleon.config.finetuning import LINEAR_LAYERS
from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.names import PRESETS
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.model.tuning.selection import select_trained
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.planner.gpus import GPUS
from megatron_chameleon.planner.memory import predict_memory
from megatron_chameleon.planner.time import predict_step
from megatron_chameleon.planner.trained import NF4_BYTES, kept_layers, stage_parameters
from megatron_chameleon.training.engines.megatron import MegatronEngine
from tiny_engine import VOCAB_SIZE, batches, make_engine

LORA = {"adapter.rank": 4}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": LORA,
    "LoRA of some": LORA | {"adapter.target_modules": ["k_proj", "o_proj", "up_proj"]},
    "DoRA": LORA | {"adapter.dora": True},
    "rows of the head": {"model.train": ["lm_head[4:24]", "model.norm"]},
    "a layer": {"model.train": ["model.layers.1"]},
    "not a layer": {"model.freeze": ["model.layers.0", "model.embed_tokens", "*.q_norm"]},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"training.dtype": "bf16"},
    "distributed": {"training.dtype": "bf16", "parallel.use_distributed_optimizer": True},
    "average": {"training.dtype": "bf16", "training.ema_decay": 0.9},
    "muon": {"optimizer.name": "muon"},
}


def counted(engine: MegatronEngine) -> dict[str, int]:
    """The bytes that weights, gradients and optimizer hold after a step, tensor by tensor."""
    members = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    inner = [member.optimizer for member in members]
    state = [
        tensor
        for optimizer in inner
        for values in optimizer.state.values()
        for tensor in values.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    ]
    state += [tensor for _, tensor in engine.average.named_tensors()]
    own = {p.data_ptr() for part in engine.parts for p in part.parameters()}
    updated = [
        p for optimizer in inner for group in optimizer.param_groups for p in group["params"]
    ]
    state += [p for p in updated if p.data_ptr() not in own]  # main weights in fp32
    storages = {t.data_ptr(): t.nbytes for t in state}
    parameters = [p for part in engine.parts for p in part.parameters()]
    return {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.main_grad.nbytes for p in parameters if p.requires_grad),
        "optimizer": sum(storages.values()),
    }


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *[("LoRA", precision) for precision in PRECISIONS if precision != "muon"],
        *[(kind, "bf16") for kind in KINDS if kind != "LoRA"],
        *[(kind, "muon") for kind in ("a layer", "not a layer")],
    ],
)
def test_weights_gradients_and_optimizer_state_to_the_byte(
    topology: Topology, kind: str, precision: str
) -> None:
    engine = make_engine(topology, **KINDS[kind], **PRECISIONS[precision])
    engine.train_step(1, batches(1))
    found = predict_memory(engine.config, VOCAB_SIZE, 1, engine.selection.with_gradient)
    assert {name: getattr(found, name) for name in counted(engine)} == counted(engine)


def test_an_adapter_needs_a_fraction_of_gradients_and_optimizer_state(topology: Topology) -> None:
    found = []
    for values in ({}, LORA):
        engine = make_engine(topology, **values)
        engine.train_step(1, batches(1))
        found.append(counted(engine))
    full, lora = found
    # rank 4 is much for matrices of 32 columns; the share is that of the trained parameters
    adapters = 2 * 4 * (3 * 32 + 32 + 2 * 16 + 32 + 32 + 2 * (32 + 48) + 48 + 32)
    assert lora["gradients"] == 4 * adapters
    assert lora["optimizer"] == 8 * adapters
    whole = full["weights"] // 4
    assert (full["gradients"], full["optimizer"]) == (4 * whole, 8 * whole)
    assert lora["weights"] == 4 * (whole + adapters)


@pytest.mark.parametrize(
    ("patterns", "first"),
    [
        (["model.embed_tokens"], 0),
        (["model.layers.0.mlp"], 0),
        (["model.layers.2", "lm_head"], 2),
        (["model.layers.3.self_attn.q_norm"], 3),
        (["lm_head[4:24]"], 4),
    ],
)
def test_layers_below_the_first_trained_one_keep_nothing(patterns: list[str], first: int) -> None:
    config = Config(model=ModelConfig(4, 32, 48, 4, 2, seq_length=16, train=patterns))
    trained = select_trained(config, VOCAB_SIZE).with_gradient
    assert kept_layers(config, 0, trained) == 4 - first
    found = predict_memory(config, VOCAB_SIZE, 1, trained)
    assert (found.activations == 0) == (first == 4)
    config.parallel.pipeline_model_parallel_size = 2  # only the first stage saves it
    assert [kept_layers(config, stage, trained) for stage in (0, 1)] == [max(0, 2 - first), 2]
    config.parallel.virtual_pipeline_model_parallel_size = 2  # and there only its first part
    assert kept_layers(config, 0, trained) == 2 - min(first, 1)


@pytest.mark.parametrize("vpp", [None, 2])
def test_stages_and_ranks_share_what_is_trained(vpp: int | None) -> None:
    config = Config(model=ModelConfig(8, 32, 48, 4, 2, seq_length=16))
    config.model.train = ["model.layers.5", "model.embed_tokens", "model.norm"]
    trained = select_trained(config, VOCAB_SIZE).with_gradient
    assert trained is not None
    whole = stage_parameters(config, VOCAB_SIZE, 0, trained)
    assert whole.trained == sum(trained.values())
    config.parallel.pipeline_model_parallel_size = 2
    config.parallel.virtual_pipeline_model_parallel_size = vpp
    first, last = (stage_parameters(config, VOCAB_SIZE, stage, trained) for stage in (0, 1))
    assert first.trained + last.trained == whole.trained
    layer = whole.trained - VOCAB_SIZE * 32 - 32
    # layer 5 is in the last stage; interleaved, the first one has 0, 1, 4 and 5
    assert first.trained == VOCAB_SIZE * 32 + (layer if vpp else 0)
    config.parallel.tensor_model_parallel_size = 2
    half = stage_parameters(config, VOCAB_SIZE, 0, trained)
    norms = 2 * 32 + 2 * (4 + 2) * 8 if vpp else 0
    assert half.trained == first.trained / 2 + norms / 2


def test_tensor_parallel_ranks_share_one_matrix_of_each_adapter() -> None:
    config = Config(model=ModelConfig(2, 32, 48, 4, 2, seq_length=16))
    config.adapter.rank, config.adapter.dora = 4, True
    config.parallel.tensor_model_parallel_size = 2
    names = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}  # split by rows
    expected = 0.0
    for tensor in adapter_tensors(config.model, 4, LINEAR_LAYERS, dora=True):
        by_rows = tensor.target.rsplit(".", 1)[-1] in names
        split = by_rows if tensor.part != A else not by_rows
        expected += math.prod(tensor.shape) / (2 if split else 1)
    found = stage_parameters(config, VOCAB_SIZE, 0)
    assert found.adapters == found.trained == expected


def test_a_step_with_an_adapter_is_faster_and_sends_less() -> None:
    config = load_config(PRESETS / "chameleon_7b.yaml", ["training.dtype=bf16"])
    config.parallel.use_distributed_optimizer = True
    full = predict_step(config, 65_536, 8, GPUS["h100"])
    config.adapter.rank = 16
    lora = predict_step(config, 65_536, 8, GPUS["h100"])
    assert lora.matrices == pytest.approx(full.matrices * 2 / 3)  # no product for the weights
    assert lora.data_messages + lora.optimizer < 0.02 * (full.data_messages + full.optimizer)
    assert lora.elementwise > full.elementwise
    config.adapter.quantize = "nf4"
    qlora = predict_step(config, 65_536, 8, GPUS["h100"])
    assert lora.matrices < qlora.matrices < 1.1 * lora.matrices


def test_frozen_weights_in_four_bits() -> None:
    config = load_config(PRESETS / "chameleon_7b.yaml", ["training.dtype=bf16", "adapter.rank=16"])
    lora = predict_memory(config, 65_536, 1)
    config.adapter.quantize = "nf4"
    qlora = predict_memory(config, 65_536, 1)
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert lora.weights - qlora.weights == matrices * (2 - NF4_BYTES)
    assert (lora.gradients, lora.optimizer) == (qlora.gradients, qlora.optimizer)
    # the largest matrix is made whole for its product
    assert qlora.activations - lora.activations == 2 * 2 * 4096 * 11008
