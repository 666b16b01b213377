"""A run with WSD and a batch-size warm-up, step by step against AdamW in plain torch."""

import math

import pytest
import torch

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.schedules.batch_sizes import plan_batches, samples_before
from megatron_chameleon.training.engines.megatron import MegatronEngine

VOCAB_SIZE, LENGTH, STEPS, WARMUP, DECAY = 64, 32, 9, 3, 4
PEAK, LOWEST = 1e-2, 1e-3
SIZES = [1, 1, 2, 3, 4, 4, 4, 4, 4]  # [1, 1, 6]: one more at 2, 4 and 6 samples
RATES = [PEAK / 3, PEAK * 2 / 3, *[PEAK] * 3]  # the decay is over steps 6 to 9
RATES += [LOWEST + (PEAK - LOWEST) * (1 - math.sqrt(done / DECAY)) for done in range(DECAY)]


def make_config() -> Config:
    config = Config(model=ModelConfig(2, 32, 64, 4, seq_length=LENGTH))
    config.training.steps, config.training.global_batch_size = STEPS, 4
    config.training.rampup_batch_size = [1, 1, 6]
    values = config.optimizer
    values.lr, values.min_lr, values.lr_warmup_steps = PEAK, LOWEST, WARMUP
    values.lr_decay_style, values.lr_wsd_decay_style = "wsd", "minus_sqrt"
    values.lr_wsd_decay_steps, values.clip_grad = DECAY, 0.5
    return config


def make_batch(number: int) -> Batch:
    """One sequence of random tokens; each has another number of labels in the loss."""
    draw = torch.Generator().manual_seed(number)
    ids = (VOCAB_SIZE * torch.rand((1, LENGTH + 1), generator=draw) ** 3).long()
    mask = (torch.rand((1, LENGTH), generator=draw) < 0.1 + 0.2 * (number % 5)).float()
    return Batch(ids[:, :-1], ids[:, 1:], mask, ids[:, 1:] < 16, torch.arange(LENGTH)[None])


def mean_gradients(engine: MegatronEngine, step: int, batches: list[Batch]) -> list[torch.Tensor]:
    """The gradient of the mean over all tokens of the step, from one sequence at a time."""
    counts = [float(batch.loss_mask.sum()) for batch in batches]
    total = [torch.zeros(p.shape, dtype=torch.float64) for _, p in engine.named_parameters()]
    for batch, count in zip(batches, counts, strict=True):
        engine.compute_gradients(step, [batch])
        engine.monitor.finish_step(0.0)
        for sum_, (_, parameter) in zip(total, engine.named_parameters(), strict=True):
            sum_ += parameter.main_grad.double() * count / sum(counts)
    return total


def test_every_update_is_that_of_plain_torch(topology: Topology) -> None:
    config = make_config()
    engine = MegatronEngine(config, VOCAB_SIZE, topology)
    named = dict(engine.named_parameters())
    ours = {name: parameter.detach().double().clone() for name, parameter in named.items()}
    no_decay = {name for name in ours if name.endswith(("norm.weight", "bias"))}
    plain = [
        torch.optim.AdamW(
            [ours[name] for name in ours if (name in no_decay) is without],
            betas=(0.9, 0.95),
            eps=1e-5,
            weight_decay=0.0 if without else 0.1,
        )
        for without in (False, True)
    ]
    batches, first = plan_batches(config.training), 0
    for step, (size, rate) in enumerate(zip(SIZES, RATES, strict=True), start=1):
        assert samples_before(batches, step) == first + size
        samples = [make_batch(first + i) for i in range(size)]
        first += size
        gradients = mean_gradients(engine, step, samples)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        for parameter, gradient in zip(ours.values(), gradients, strict=True):
            parameter.grad = gradient * min(1.0, 0.5 / (norm + 1e-6))
        for optimizer in plain:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        metrics = engine.train_step(step, samples)
        assert metrics["learning_rate"] == pytest.approx(rate, rel=1e-14)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for name, parameter in named.items():
            # fp32 weights of up to 1, and updates of up to the learning rate of 1e-2
            torch.testing.assert_close(parameter.double(), ours[name], rtol=0, atol=2e-6, msg=name)
