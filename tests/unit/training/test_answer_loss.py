"""The fine-tuning loss: labels of prompts do not count, and a batch may have no other labels."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.megatron import MegatronEngine

VOCAB_SIZE = 64
SHAPE = (2, 32)


def make_batch(number: int, answers: float) -> Batch:
    """Random tokens; about this share of the labels is in answers."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(VOCAB_SIZE, (SHAPE[0], SHAPE[1] + 1), generator=draw)
    mask = (torch.rand(SHAPE, generator=draw) < answers).float()
    positions = torch.arange(SHAPE[1]).expand(SHAPE)
    return Batch(ids[:, :-1], ids[:, 1:], mask, ids[:, 1:] < 16, positions)


def run(topology: Topology, batches: list[Batch]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The metrics of a step and the weights after it."""
    config = Config(model=ModelConfig(2, 32, 64, 4, seq_length=SHAPE[1]))
    config.training.micro_batch_size, config.training.global_batch_size = 2, 2 * len(batches)
    engine = MegatronEngine(config, VOCAB_SIZE, topology)
    metrics = engine.train_step(1, batches)
    del metrics["step_seconds"]
    return metrics, [weight.detach().clone() for _, weight in engine.named_parameters()]


def test_labels_of_prompts_change_nothing(topology: Topology) -> None:
    batches = [make_batch(number, 0.3) for number in range(3)]
    expected, weights = run(topology, batches)
    for changes, same in ((0.0, True), (1.0, False)):
        others = []
        for batch in batches:
            labels = torch.where(batch.loss_mask == changes, 7, batch.labels)
            others.append(dataclasses.replace(batch, labels=labels))
        metrics, changed = run(topology, others)
        assert (metrics == expected) is same
        assert all(map(torch.equal, weights, changed)) is same


def test_the_loss_is_the_mean_over_all_answers_of_the_step(topology: Topology) -> None:
    """It is not the mean of the micro-batches' means; one of them has no answer at all."""
    batches = [make_batch(1, 0.05), make_batch(2, 0.0), make_batch(3, 0.9)]
    whole, _ = run(topology, batches)
    parts = [run(topology, [batch])[0]["loss"] for batch in batches]
    counts = [int(batch.loss_mask.sum()) for batch in batches]
    assert parts[1] is None and 0 < counts[0] < counts[2] / 5
    expected = sum(loss * count for loss, count in zip(parts, counts, strict=True) if count)
    assert whole["loss"] == pytest.approx(expected / sum(counts), rel=1e-6)


def test_a_step_without_answers_divides_by_nothing(topology: Topology) -> None:
    metrics, weights = run(topology, [make_batch(1, 0.0), make_batch(2, 0.0)])
    assert metrics["loss"] is metrics["loss_text"] is metrics["z_loss"] is None
    assert metrics["grad_norm"] == 0 and not metrics.get("skipped")
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert math.isfinite(metrics["output_norm"])
