"""The planner's memory against the bytes that a real megatron-core model on a CPU allocates."""

from typing import Any

import pytest
import torch

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.planner import memory as plan_memory
from megatron_chameleon.training.engines.megatron import MegatronEngine
from megatron_chameleon.training.engines.objective import summed_loss

VOCAB_SIZE = 512
# The formulas leave out token ids, masks, RoPE's angles and the like.
TOLERANCE = 1e-2


def make_config(layers: int = 2, **values: Any) -> Config:
    config = Config(model=ModelConfig(layers, 64, 160, 4, seq_length=128))
    config.training.micro_batch_size = config.training.global_batch_size = 2
    for key, value in values.items():
        sections = (config.model, config.training, config.parallel, config.adapter)
        section = next(section for section in sections if hasattr(section, key))
        setattr(section, key, value)
    return config


def forward(engine: MegatronEngine) -> torch.Tensor:
    config = engine.config
    shape = config.training.micro_batch_size, config.model.seq_length
    ids = torch.randint(VOCAB_SIZE, (shape[0], shape[1] + 1))
    labels = ids[:, 1:]
    positions = torch.arange(shape[1]).expand(shape)
    batch = Batch(ids[:, :-1], labels, torch.ones(shape), labels % 2 == 0, positions)
    output = engine.parts[0](batch.tokens, batch.position_ids, None, labels=labels)
    return summed_loss(batch, output, 1e-5, engine.monitor)


def saved_bytes(config: Config, topology: Topology) -> int:
    """Bytes that autograd keeps of a forward pass: every storage once, without the weights."""
    engine = MegatronEngine(config, VOCAB_SIZE, topology)
    weights = {p.untyped_storage().data_ptr() for p in engine.parts[0].parameters()}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (
                storage  # kept alive, so that no other storage gets its address
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(engine)
    return sum(storage.nbytes() for storage in storages.values())


CASES: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "no QK-norm": {"qk_norm_groups": 0},
    "one QK-norm, dropout": {"qk_norm_groups": 1, "hidden_dropout": 0.1},
    "swin, grouped queries, bf16": {
        "norm_order": "swin",
        "num_query_groups": 2,
        "qk_norm_groups": 2,
        "dtype": "bf16",
    },
    "selective recomputation": {"recompute_granularity": "selective"},
    "adapters": {"rank": 8},
    "adapters, selective recomputation": {
        "rank": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "recompute_granularity": "selective",
    },
    "adapters, one QK-norm, dropout, bf16": {
        "rank": 4,
        "target_modules": ["v_proj", "o_proj", "down_proj"],
        "dropout": 0.1,
        "qk_norm_groups": 1,
        "dtype": "bf16",
    },
    "DoRA, swin, grouped queries": {
        "rank": 2,
        "dora": True,
        "norm_order": "swin",
        "num_query_groups": 2,
        "qk_norm_groups": 2,
    },
}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
def test_activations(topology: Topology, values: dict[str, Any]) -> None:
    """Two model sizes separate the bytes of a layer from those of the output."""
    small, large = (make_config(layers, **values) for layers in (2, 3))
    few, many = saved_bytes(small, topology), saved_bytes(large, topology)
    layer = plan_memory.layer_bytes(small, fused_norms=False)
    assert layer == pytest.approx(many - few, rel=1e-3)
    if small.adapter.rank:  # whose first layer keeps no input: nothing below it has a gradient
        return
    # after the loss, one fp32 buffer of the logits is left
    output = plan_memory.output_bytes(small, VOCAB_SIZE, logit_bytes=4, fused_norms=False)
    assert output == pytest.approx(few - 2 * (many - few), rel=TOLERANCE)


def test_full_recomputation_keeps_the_inputs_of_blocks(topology: Topology) -> None:
    values = {"recompute_granularity": "full", "recompute_num_layers": 2}
    small, large = (make_config(layers, **values) for layers in (2, 6))
    kept = saved_bytes(large, topology) - saved_bytes(small, topology)
    predicted = [plan_memory.stage_activations(config, config.model.num_layers)
                 for config in (small, large)]  # fmt: skip
    assert predicted[1] - predicted[0] == kept == 2 * 256 * 64 * 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_gradients_and_optimizer(topology: Topology, dtype: str) -> None:
    config = make_config(dtype=dtype, num_query_groups=2)
    engine = MegatronEngine(config, VOCAB_SIZE, topology)
    forward(engine).backward()
    engine.optimizer.step()
    found = plan_memory.stage_memory(config, VOCAB_SIZE, 1, 0)
    assert found.weights == sum(p.nbytes for p in engine.parts[0].parameters())
    buffers = sum(buffer.grad_data.nbytes for buffer in engine.chunks[0].buffers)
    assert found.gradients == pytest.approx(buffers, rel=TOLERANCE)  # the buffers are padded
    inner = engine.optimizer.optimizer
    state = sum(t.nbytes for s in inner.state.values() for t in s.values() if t.numel() > 1)
    if dtype == "bf16":
        state += sum(p.nbytes for group in inner.param_groups for p in group["params"])
    assert found.optimizer == state


def test_stages_of_a_pipeline() -> None:
    """The first stage keeps all micro-batches in flight; the last one has the logits."""
    config = make_config(8, pipeline_model_parallel_size=4, global_batch_size=16)
    first, last = (plan_memory.stage_memory(config, VOCAB_SIZE, 4, stage) for stage in (0, 3))
    assert first.activations == 4 * last.activations
    assert first.logits == 0 < last.logits
    assert plan_memory.predict_memory(config, VOCAB_SIZE, 4) == max(
        first, last, key=lambda memory: memory.total
    )
    # p stages of m parts: 1 + (p - 1) / (p m) times the activations of the plain schedule
    config.parallel.virtual_pipeline_model_parallel_size = 2
    interleaved = plan_memory.stage_memory(config, VOCAB_SIZE, 4, 0)
    assert interleaved.activations == pytest.approx(first.activations * (1 + 3 / 8))


def test_every_share_is_divided_by_its_parallelism() -> None:
    whole = plan_memory.stage_memory(make_config(), VOCAB_SIZE, 1, 0)
    values = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    half = plan_memory.stage_memory(make_config(**values), VOCAB_SIZE, 2, 0)
    # both ranks have the norms and RoPE's tables
    assert half.weights == pytest.approx(whole.weights / 2, rel=0.02)
    assert half.activations == pytest.approx(whole.activations / 2, rel=0.02)
    split = make_config(use_distributed_optimizer=True)
    assert plan_memory.stage_memory(split, VOCAB_SIZE, 4, 0).optimizer == whole.optimizer / 4
