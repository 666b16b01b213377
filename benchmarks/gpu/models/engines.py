"""Configs, engines, and batches of random or learnable sequences, without tokenizer or files."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.names import find_config
from megatron_chameleon.config.schema import Config, Fp8Config, ModelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.model import chameleon
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines import megatron as megatron_engine
from megatron_chameleon.training.engines import optimizer
from megatron_chameleon.training.engines.megatron import MegatronEngine

VOCAB_SIZE = 65_536
TINY_VOCAB_SIZE = 128
TINY_MODEL = ModelConfig(2, 64, 176, 4, seq_length=64, qk_norm_groups=1)
TINY_34B = ModelConfig(2, 128, 256, 16, 8, seq_length=64, qk_norm_groups=4)

RECIPES = {
    "bf16": None,
    "FP8 delayed": Fp8Config(format="hybrid", recipe="delayed"),
    "FP8 current": Fp8Config(format="hybrid", recipe="tensorwise"),
}


def preset_config(preset: str, tiny: bool, layers: int) -> Config:
    """A preset with another number of layers; with ``tiny``, its settings at sizes for a CPU."""
    config = load_config(find_config(preset))
    if tiny:
        config.model = dataclasses.replace(
            TINY_34B if config.model.num_query_groups else TINY_MODEL,
            norm_order=config.model.norm_order,
            hidden_dropout=config.model.hidden_dropout,
        )
    config.model.num_layers = layers
    config.optimizer.lr_decay_style = "constant"
    config.optimizer.lr_warmup_steps = 0
    config.training.steps = 10**6
    config.training.global_batch_size = config.training.micro_batch_size = 1
    return config


def with_recipe(config: Config, recipe: str) -> Config:
    """Set a config to bf16 and one of ``RECIPES``, and return it."""
    config.training.dtype = "bf16"
    config.fp8 = dataclasses.replace(RECIPES[recipe] or Fp8Config())
    return config


def vocab_size(tiny: bool) -> int:
    return TINY_VOCAB_SIZE if tiny else VOCAB_SIZE


def make_batch(ids: torch.Tensor) -> Batch:
    """Make a batch of token ids [samples, seq_length + 1]."""
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=torch.ones(tokens.shape),
        image_mask=labels % 2 == 0,
        position_ids=torch.arange(tokens.size(1)).expand(len(tokens), -1),
    )


def random_batch(vocab: int, samples: int, seq_length: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return make_batch(torch.randint(vocab, (samples, seq_length + 1), generator=generator))


def counting_batches(vocab: int, samples: int, seq_length: int, count: int) -> list[Batch]:
    """Sequences that count in strides of 1 to 8, which a model can learn within 50 steps."""
    generator = torch.Generator().manual_seed(1)
    places = torch.arange(seq_length + 1)
    batches = []
    for _ in range(count):
        start = torch.randint(vocab, (samples, 1), generator=generator)
        stride = torch.randint(1, 9, (samples, 1), generator=generator)
        batches.append(make_batch((start + stride * places) % vocab))
    return batches


@contextlib.contextmanager
def weights_drawn_on_the_device() -> Iterator[None]:
    """Draw first weights of the same scale from the device's generator.

    The project draws them on the CPU, so that they are the same under every layout. For 7B
    parameters the GPU would wait a minute for that, and speed does not depend on the numbers.
    """

    def draw(model: nn.Module, *, std: float, **unused: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(0.0, std)

    with mock.patch.object(chameleon, "initialize_weights", draw):
        yield


@contextlib.contextmanager
def bf16_gradients() -> Iterator[None]:
    """Use 16 bytes per parameter: bf16 weights and gradients, fp32 main weights and moments.

    The engine itself keeps gradients in fp32 (18 bytes). megatron-core's precision-aware optimizer
    reads bf16 gradients without an fp32 copy. It needs Transformer Engine's Adam and the
    distributed optimizer.
    """
    ddp, settings = megatron_engine.DistributedDataParallelConfig, optimizer.MegatronOptimizerConfig
    clip = megatron_engine.clip_grad_by_total_norm_fp32

    def ddp_config(**values: Any) -> Any:
        return ddp(**{**values, "grad_reduce_in_fp32": False})

    def optimizer_config(**values: Any) -> Any:
        return settings(
            **values,
            use_precision_aware_optimizer=True,
            main_grads_dtype=torch.bfloat16,
            store_param_remainders=False,
        )

    def clip_gradients(parameters: Any, limit: float, norm: float) -> None:
        clip(parameters, limit, norm, use_decoupled_grad=True)

    with (
        mock.patch.object(megatron_engine, "DistributedDataParallelConfig", ddp_config),
        mock.patch.object(optimizer, "MegatronOptimizerConfig", optimizer_config),
        mock.patch.object(megatron_engine, "clip_grad_by_total_norm_fp32", clip_gradients),
    ):
        yield


@contextlib.contextmanager
def head_size(size: int) -> Iterator[None]:
    """Set the head size, which is not hidden size / heads in one rank's part of a layer."""
    original = chameleon.transformer_config

    def transformer_config(config: Config) -> Any:
        found = original(config)
        found.kv_channels = size
        return found

    with mock.patch.object(chameleon, "transformer_config", transformer_config):
        yield


def build_engine(config: Config, vocab: int, topology: Topology) -> MegatronEngine:
    """Build the project's engine with weights that are drawn on the device."""
    with weights_drawn_on_the_device():
        return MegatronEngine(config, vocab, topology)


class Lazy:
    """A value that is built on first use, within the row that needs it, and that can be freed."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build
        self._value: Any = None

    def get(self) -> Any:
        if self._value is None:
            self._value = self._build()
        return self._value

    def clear(self) -> None:
        self._value = None
