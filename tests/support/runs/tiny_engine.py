"""A megatron-core engine with a tiny model in this process, its batches, and its checkpoints.

For tests of what an engine computes and saves, with the fixture ``topology``.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.state.save import Saver
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.tokenizer.folder import fingerprint
from megatron_chameleon.training.engines.megatron import MegatronEngine
from tiny_model import VOCAB_SIZE


def make_engine(
    topology: Topology, weights: CheckpointReader | None = None, **values: Any
) -> MegatronEngine:
    """An engine of two layers with grouped queries.

    Args:
        topology: Of this process alone.
        weights: A model to begin with, whose sizes the engine then has.
        values: Of the config, by ``section.key``.
    """
    config = Config(model=ModelConfig(2, 32, 48, 4, 2, seq_length=16))
    if weights is not None:
        config.model = replace(weights.model)
    config.training.steps, config.training.global_batch_size = 9, 2
    config.optimizer.lr, config.optimizer.lr_decay_style = 1e-2, "constant"
    config.checkpoint.keep_last = 9
    for key, value in values.items():
        section, name = key.split(".")
        assert hasattr(getattr(config, section), name), key
        setattr(getattr(config, section), name, value)
    return MegatronEngine(config, VOCAB_SIZE, topology, weights=weights)


def batches(step: int, weight: float = 1.0) -> list[Batch]:
    """The two micro-batches of a step, whose tokens count so much in the loss."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for _ in range(2):
        ids = torch.randint(VOCAB_SIZE, (1, 17), generator=generator)
        places, mask = torch.arange(16).expand(1, -1), torch.full((1, 16), weight)
        found.append(Batch(ids[:, :-1], ids[:, 1:], mask, ids[:, 1:] < 24, places))
    return found


def train(engine: MegatronEngine, first: int, last: int) -> None:
    """Do the steps from ``first`` to ``last``."""
    for step in range(first, last + 1):
        assert "skipped" not in engine.train_step(step, batches(step))


def save(engine: MegatronEngine, folder: Path, step: int, tokenizer: Path) -> Path:
    """Save a checkpoint as a run does, and return its folder."""
    entries = {"vocab_size": VOCAB_SIZE, "tokenizer_fingerprint": fingerprint(tokenizer)}
    engine.config.tokenizer.path = str(tokenizer)
    with Saver(folder, engine, lambda saved: None) as saver:
        saver.save(step, entries | engine.average.state_entries())
    return folder / f"step_{step:08d}"
