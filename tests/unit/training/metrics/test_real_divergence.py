"""A small run made to diverge, and healthy ones: the alarm comes before the loss says anything.

docs/stability.md has the table of larger ones.
"""

import pytest
import torch

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.megatron import MegatronEngine
from megatron_chameleon.training.metrics.divergence import DivergenceAlarm

VOCAB_SIZE = 64
SHAPE = (4, 32)


def make_config(seed: int) -> Config:
    model = ModelConfig(3, 32, 64, 4, seq_length=SHAPE[1], init_method_std=0.06)
    config = Config(model=model)
    config.training.steps, config.training.seed = 1000, seed
    config.training.micro_batch_size = config.training.global_batch_size = SHAPE[0]
    config.optimizer.lr, config.optimizer.lr_warmup_steps = 3e-3, 20
    return config


def make_batch(number: int) -> Batch:
    """Each token follows from the one before, except for a tenth, which is random."""
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randint(VOCAB_SIZE, (SHAPE[0], SHAPE[1] + 1), generator=generator)
    is_drawn = torch.rand(drawn.shape, generator=generator) < 0.1
    columns = [drawn[:, 0]]
    for place in range(1, drawn.shape[1]):
        follows = (columns[-1] * 5 + 3) % VOCAB_SIZE
        columns.append(torch.where(is_drawn[:, place], drawn[:, place], follows))
    window = torch.stack(columns, dim=1)
    labels = window[:, 1:]
    positions = torch.arange(SHAPE[1]).expand(SHAPE)
    return Batch(window[:, :-1], labels, torch.ones(SHAPE), labels < 16, positions)


def train(config: Config, topology: Topology, steps: int) -> tuple[list[int], list[float]]:
    """The steps that raise an alarm, and the losses."""
    engine, alarm = MegatronEngine(config, VOCAB_SIZE, topology), DivergenceAlarm()
    raised, losses = [], []
    for step in range(1, steps + 1):
        found = engine.train_step(step, [make_batch(1000 * config.training.seed + step)])
        losses.append(found["loss"])
        if alarm.observe(step, found["output_norm"], found["loss"]):
            raised.append(step)
    return raised, losses


def diverged_at(losses: list[float], window: int = 20) -> int | None:
    """The step at which the mean loss is 1.5 times its best value."""
    means = [sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)]
    found = (n for n, mean in enumerate(means) if mean > 1.5 * min(means[: n + 1]))
    first = next(found, None)
    return None if first is None else first + window


def test_the_alarm_comes_before_the_loss(topology: Topology) -> None:
    config = make_config(seed=1)
    config.model.qk_norm_groups, config.training.z_loss = 0, 0.0
    config.optimizer.lr, config.optimizer.lr_warmup_steps = 1.0, 200
    config.optimizer.lr_decay_style = "constant"
    config.optimizer.clip_grad = config.optimizer.weight_decay = 0.0
    raised, losses = train(config, topology, 150)
    end = diverged_at(losses)
    assert end is not None and raised and raised[0] <= 0.7 * end


@pytest.mark.parametrize("seed", [1, 2])
def test_healthy_runs_raise_nothing(topology: Topology, seed: int) -> None:
    config = make_config(seed)
    config.model.norm_order = ("pre", "swin")[seed - 1]
    raised, losses = train(config, topology, 130)
    assert raised == [] and losses[-1] < 0.5 * losses[0]
