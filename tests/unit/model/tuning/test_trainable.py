"""Training a part of the model: what is frozen stays to the last bit, also after a resume."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.megatron import MegatronEngine
from tiny_engine import batches, make_engine, save, train

HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"
ROWS = slice(4, 24)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"training.dtype": "bf16"},
    "distributed": {"training.dtype": "bf16", "parallel.use_distributed_optimizer": True},
    "muon": {"optimizer.name": "muon"},
}
CHOICES: dict[str, dict[str, Any]] = {
    "rows": {"model.train": ["lm_head[4:24]", "model.norm"]},
    "a layer": {"model.train": ["model.layers.1"]},
    "not a layer": {"model.freeze": ["model.layers.0.mlp", "model.embed_tokens[30:]", "lm_head"]},
}


def weights(engine: MegatronEngine) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in engine.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of each weight that differ in any bit."""
    return {
        name: (weight.view(len(weight), -1) != after[name].view(len(weight), -1)).any(1)
        for name, weight in before.items()
    }


def trained_rows(engine: MegatronEngine) -> Iterator[tuple[str, Tensor]]:
    """Which rows of each weight the patterns choose."""
    for name, parameter in engine.named_parameters():
        mask = torch.zeros(len(parameter), dtype=torch.bool)
        for first, last in engine.selection.trained[name]:
            mask[first:last] = True
        yield name, mask


@pytest.mark.parametrize(
    ("choice", "optimizer"),
    [
        *[("rows", name) for name in ("fp32", "distributed")],
        *[("a layer", name) for name in ("bf16", "muon")],
        *[("not a layer", name) for name in ("fp32", "distributed")],
    ],
)
def test_only_what_is_chosen_changes_and_a_resume_changes_nothing(
    topology: Topology, tmp_path: Path, tiny_tokenizer: Path, optimizer: str, choice: str
) -> None:
    values = OPTIMIZERS[optimizer] | {"optimizer.weight_decay": 1.0, "training.ema_decay": 0.9}
    dense = make_engine(topology, **values)
    train(dense, 1, 2)
    first = save(dense, tmp_path / "dense", 2, tiny_tokenizer)

    values |= CHOICES[choice]
    engine = make_engine(topology, **values)
    engine.restore(first, 2)
    before = weights(engine)
    assert not any(rows.any() for rows in changed(weights(dense), before).values())
    train(engine, 3, 4)
    found = changed(before, weights(engine))
    for name, rows in trained_rows(engine):
        # In bf16, an update may be too small to change a weight. Not all tokens occur.
        if "training.dtype" not in values and name != EMBEDDING:
            assert torch.equal(found[name], rows), name
        assert not (found[name] & ~rows).any(), name
    assert any(rows.any() for rows in found.values())

    middle = save(engine, tmp_path / "part", 4, tiny_tokenizer)
    train(engine, 5, 6)
    again = make_engine(topology, **values)
    again.restore(middle, 4)
    train(again, 5, 6)
    assert not any(rows.any() for rows in changed(weights(engine), weights(again)).values())

    last = save(engine, tmp_path / "part", 6, tiny_tokenizer)
    whole = make_engine(topology, **(values | {"model.train": [], "model.freeze": []}))
    whole.restore(last, 6)
    after = weights(whole)
    assert not any(rows.any() for rows in changed(weights(engine), after).values())
    train(whole, 7, 7)
    assert all(rows.any() for rows in changed(after, weights(whole)).values())

    # A conversion reads zeros for the moments of what was frozen.
    reader = open_checkpoint(last)
    assert reader.has_optimizer
    exported = tmp_path / "exported"
    convert(tmp_path / "part", exported, "hf")  # it verifies all weights and settings
    assert open_checkpoint(exported).model.train == []
    for row in tensor_rows(reader.dimensions):
        moments = [m for m in reader.moments(row) if m != "ema"]
        for moment in moments:
            value = reader.read(replace(row, part=moment))
            assert value.shape == row.shape
            assert value.any() == engine.selection.is_trained(row.megatron_name, row.layer)


def test_norms_count_trained_rows_only(topology: Topology) -> None:
    dense = make_engine(topology)
    dense.compute_gradients(1, batches(1))
    gradient = dict(dense.named_parameters())[HEAD].main_grad[ROWS].clone()
    engine = make_engine(topology, **{"model.train": ["lm_head[4:24]"]})
    metrics = engine.train_step(1, batches(1))
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-6)
    assert metrics["grad_norm_output"] == metrics["grad_norm"]
    assert metrics["grad_norm_attention"] == metrics["grad_norm_embedding"] == 0
    sizes = {buffer.numel for chunk in engine.chunks for buffer in chunk.buffers}
    assert sizes == {engine.parts[0].output_layer.weight.numel()}


def test_gradients_that_are_not_finite_stop_at_frozen_rows(topology: Topology) -> None:
    engine = make_engine(topology, **{"model.train": ["lm_head[4:24]"]})
    weight = engine.parts[0].output_layer.weight
    (weight * torch.inf).sum().backward()
    gradient = weight.main_grad
    assert gradient[ROWS].isinf().any(1).all()
    assert (gradient[:4] == 0).all() and (gradient[24:] == 0).all()


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputed_layers_above_frozen_ones_are_trained(
    topology: Topology, granularity: str
) -> None:
    found = []
    for values in ({}, {"parallel.recompute_granularity": granularity}):
        engine = make_engine(topology, **values, **{"model.train": ["model.layers.1"]})
        train(engine, 1, 2)
        found.append(weights(engine))
    assert not any(rows.any() for rows in changed(*found).values())
    start = weights(make_engine(topology))
    assert changed(start, found[1])["decoder.layers.1.mlp.linear_fc2.weight"].all()


def test_a_frozen_trunk_is_not_differentiated(topology: Topology) -> None:
    values = {"model.train": ["lm_head"], "parallel.recompute_granularity": "full"}
    engine = make_engine(topology, **values)
    outputs: list[Tensor] = []
    engine.parts[0].decoder.register_forward_hook(lambda *args: outputs.append(args[2]))
    train(engine, 1, 1)
    assert not any(output.requires_grad for output in outputs)
