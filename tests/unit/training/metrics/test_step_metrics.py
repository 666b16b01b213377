"""The monitor's metrics of a step, compared with another computation on one process."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.gradient_groups import GROUPS, group_of
from megatron_chameleon.training.engines.megatron import MegatronEngine
from megatron_chameleon.training.metrics.layers import ObservedQueries, largest_logit

VOCAB_SIZE = 96


def make_engine(topology: Topology, dtype: str = "fp32", **parallel: Any) -> MegatronEngine:
    config = Config(model=ModelConfig(3, 32, 48, 4, num_query_groups=2, seq_length=16))
    config.parallel = dataclasses.replace(config.parallel, **parallel)
    config.training.micro_batch_size, config.training.global_batch_size = 2, 4
    config.optimizer.clip_grad, config.training.dtype = 0.1, dtype
    return MegatronEngine(config, VOCAB_SIZE, topology)


def make_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(2):
        ids = torch.randint(VOCAB_SIZE, (2, 17), generator=generator)
        mask = (torch.rand(2, 16, generator=generator) < 0.7).float()
        positions = torch.arange(16).expand(2, -1)
        batches.append(Batch(ids[:, :-1], ids[:, 1:], mask, ids[:, 1:] < 24, positions))
    return batches


def outputs_of(engine: MegatronEngine, batches: list[Batch]) -> tuple[list[Tensor], list[Tensor]]:
    """The output norms of every layer, and log(Z), over both micro-batches, without an update."""
    norms: list[list[Tensor]] = [[] for _ in engine.parts[0].decoder.layers]
    hooks = [
        layer.register_forward_hook(
            lambda module, inputs, output, kept=kept: kept.append(output[0].norm(dim=-1).flatten())
        )
        for layer, kept in zip(engine.parts[0].decoder.layers, norms, strict=True)
    ]
    engine.parts[0].eval()
    with torch.no_grad():
        log_z = [
            engine.parts[0](batch.tokens, batch.position_ids, None, labels=batch.labels)[1]
            for batch in batches
        ]
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept) for kept in norms], log_z


def test_norms_of_layers_and_log_z_by_modality(topology: Topology) -> None:
    engine, batches = make_engine(topology), make_batches()
    norms, log_z = outputs_of(engine, batches)
    found = engine.train_step(1, batches)
    expected = [layer.mean().item() for layer in norms]
    assert found["layer_output_norms"] == pytest.approx(expected, rel=1e-6)
    assert found["output_norm"] == found["layer_output_norms"][-1]
    assert found["loss_tokens"] == sum(int(batch.loss_mask.sum()) for batch in batches)
    for key, of_image in (("log_z_text", False), ("log_z_image", True)):
        counted = [b.loss_mask.bool() & (b.image_mask == of_image) for b in batches]
        values = torch.cat([z[mask] for z, mask in zip(log_z, counted, strict=True)])
        assert found[key] == pytest.approx(values.mean().item(), rel=1e-6)


def test_a_step_leaves_nothing_for_the_next(topology: Topology) -> None:
    engine, batches = make_engine(topology), make_batches()
    engine.config.optimizer.lr = 0.0
    first, second = (engine.train_step(step, batches) for step in (1, 1))
    for key in ("layer_output_norms", "max_attention_logit", "log_z_text"):
        assert first[key] == pytest.approx(second[key], rel=0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_gradient_norms_of_groups_make_up_the_whole(
    topology: Topology, distributed: bool, dtype: str
) -> None:
    engine = make_engine(topology, dtype, use_distributed_optimizer=distributed)
    batches = make_batches()
    engine.compute_gradients(1, batches)
    parameters = list(engine.named_parameters())
    expected = {}
    for group in GROUPS:
        gradients = [p.main_grad.flatten() for name, p in parameters if group_of(name) == group]
        expected[f"grad_norm_{group}"] = torch.cat(gradients).norm().item()
    engine.monitor.finish_step(0.0)
    engine.optimizer.prepare_grads()
    whole = engine.optimizer.get_grad_norm()
    found = engine.train_step(1, batches)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(whole, rel=1e-6)
    total = sum(found[key] ** 2 for key in expected) ** 0.5
    assert total == pytest.approx(whole, rel=1e-6)
    assert found["grad_norm"] > 0.2  # it was clipped


def test_gradients_that_the_optimizer_keeps_apart_are_counted(topology: Topology) -> None:
    """megatron-core's precision-aware optimizer keeps them in bf16, and not in ``.grad``."""
    engine = make_engine(topology, "bf16", use_distributed_optimizer=True)
    engine.compute_gradients(1, make_batches())
    engine.optimizer.prepare_grads()
    members = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    owned = [p for m in members for group in m.param_groups for p in group["params"]]
    assert len(owned) > 20
    for parameter in owned:
        parameter.decoupled_grad = parameter.grad.bfloat16()
        parameter.grad = None
    total = torch.cat([p.decoupled_grad.double().flatten() for p in owned]).norm().item()
    norm, of_groups = engine.gradients.norms(engine.gradients.squares())
    assert norm == pytest.approx(total, rel=1e-5)  # bf16 norms would be off by up to 4e-3
    assert min(of_groups.values()) > 0


def test_recomputation_changes_nothing(topology: Topology) -> None:
    batches = make_batches()
    plain, again = (
        make_engine(topology, recompute_granularity=kind).train_step(1, batches)
        for kind in (None, "full")
    )
    keys = ("layer_output_norms", "max_attention_logit")
    assert {k: plain[k] for k in keys} == {k: again[k] for k in keys}


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("length", [12, 3])
def test_the_largest_attention_logit(isolated: bool, length: int) -> None:
    """It is the largest of queries 2, 5, 8 and 11 and of what they see, or of all shorter ones."""
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(2, 1, 1, 1)
    positions = torch.arange(length).repeat(2, 1)
    if isolated:  # documents begin at different places in the two sequences
        for row, begin in enumerate([length // 2, length // 3]):
            hidden[row, :, begin:, :begin] = True
            positions[row, begin:] -= begin
    places = [2, 5, 8, 11] if length == 12 else [0, 1, 2]
    for seed in range(10):  # the largest of all is not always one that isolation hides
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(length, 2, 4, 8, generator=generator)
        key = torch.randn(length, 2, 2, 8, generator=generator)
        scores = torch.einsum("sbnd,tbnd->bnst", query, key.repeat_interleave(2, dim=2)) / 8**0.5
        seen = scores.masked_fill(hidden, -torch.inf)
        looked_at = ObservedQueries.of(length, query.device)
        found = largest_logit(query, key, positions if isolated else None, looked_at).item()
        assert found == pytest.approx(seen[:, :, places].max().item(), rel=1e-6)


@pytest.mark.parametrize("place", [2, 5, 8])
def test_a_query_sees_its_own_key_and_not_the_next(place: int) -> None:
    query, key = torch.zeros(12, 2, 4, 8), torch.zeros(12, 2, 2, 8)
    query[place], key[place], key[place + 1] = 1.0, 1.0, 9.0
    found = largest_logit(query, key, None, ObservedQueries.of(12, query.device)).item()
    assert found == pytest.approx(8**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("decoder.layers.0.self_attention.q_layernorm.weight", "qk_norms"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", "attention"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", "norms"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "feed_forward"),
        ("decoder.final_layernorm.weight", "norms"),
        ("embedding.word_embeddings.weight", "embedding"),
        ("output_layer.weight", "output"),
    ],
)
def test_every_parameter_has_a_group(name: str, group: str) -> None:
    assert group_of(name) == group
