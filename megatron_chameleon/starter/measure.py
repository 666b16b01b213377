"""Measures for a few seconds how fast this machine is, with networks of the chosen sizes."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.starter.writing.image_yaml import ImageShape

SECONDS = 4.0
"""About how long each measurement takes."""
TRAINER_FACTOR = 1.6
"""A step of training takes so many times as long as the bare network's: the mixture, the loss in
parts, metrics and logs. Measured with a tiny model on two cores."""


SECOND_THREAD = 1.3
"""How much faster two threads or more compute networks as small as these."""


@dataclass(frozen=True)
class Machine:
    """What this machine has."""

    cores: int
    memory_bytes: int
    gpu: str | None
    """CUDA's name of the GPU; None without one."""
    gpu_bytes: int | None
    start_seconds: float
    """What a command takes before it begins to work: the import of PyTorch."""


@dataclass(frozen=True)
class Speeds:
    """Seconds on this machine; None where nothing was measured."""

    train_step: float | None = None
    image_step: float | None = None
    image_code: float | None = None
    """Of one picture in ``preprocess``."""


def find_machine() -> Machine:
    """Look at the machine; imports PyTorch."""
    from megatron_chameleon.machine import machine_memory

    started = time.perf_counter()
    from megatron_chameleon.parallel import platform

    seconds = max(time.perf_counter() - started, 1.0)
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=machine_memory(),
        gpu=platform.device_name(),
        gpu_bytes=platform.gpu_memory_bytes(),
        start_seconds=2 * seconds,  # megatron-core comes behind PyTorch
    )


def measure(
    model: ModelConfig | None, vocab_size: int, micro_batch: int, image: ImageShape | None
) -> Speeds:
    """Time steps of both networks.

    Args:
        model: The transformer; None: it is not timed.
        vocab_size: Of its output layer.
        micro_batch: Sequences of a step.
        image: The image tokenizer; None: there is none, or it is not timed.
    """
    train = image_step = code = None
    if model is not None:
        train = TRAINER_FACTOR * _time(_transformer_step(model, vocab_size, micro_batch))
    if image is not None:
        step, encode = _vqgan_steps(image)
        image_step, code = _time(step), _time(encode) / image.batch_size
    return Speeds(train, image_step, code)


def _time(step: Callable[[], None]) -> float:
    """Seconds of a call on an idle machine: the processor time of one thread, so that other
    programs do not count, divided by what a second thread gains."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step()
        found: list[float] = []
        end = time.perf_counter() + SECONDS / 2
        while len(found) < 2 or (time.perf_counter() < end and len(found) < 20):
            before = time.process_time()
            step()
            found.append(time.process_time() - before)
    finally:
        torch.set_num_threads(threads)
    return min(found) / (SECOND_THREAD if threads > 1 else 1.0)


def _transformer_step(model: ModelConfig, vocab_size: int, micro_batch: int) -> Callable[[], None]:
    import torch
    from torch import nn
    from torch.nn import functional

    width, heads = model.hidden_size, model.num_attention_heads

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up = nn.Linear(width, 2 * model.ffn_hidden_size)
            self.down = nn.Linear(model.ffn_hidden_size, width)

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            batch, length, _ = x.shape
            parts = self.qkv(self.norms[0](x)).view(batch, length, 3, heads, -1).unbind(2)
            q, k, v = (part.transpose(1, 2) for part in parts)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
            gate, up = self.up(self.norms[1](x)).chunk(2, -1)
            result: torch.Tensor = x + self.down(functional.silu(gate) * up)
            return result

    embedding = nn.Embedding(vocab_size, width)
    network = nn.Sequential(
        embedding, *(Layer() for _ in range(model.num_layers)), nn.Linear(width, vocab_size)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    tokens = torch.randint(vocab_size, (micro_batch, model.seq_length))

    def step() -> None:
        logits = network(tokens)
        functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _vqgan_steps(shape: ImageShape) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step of the image tokenizer, and the encoding of a batch."""
    import torch

    from megatron_chameleon.starter.writing.image_yaml import vqgan_config
    from megatron_chameleon.tokenizer.image.vqgan import Vqgan

    model = Vqgan(vqgan_config(shape)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    pixels = torch.rand(shape.batch_size, 3, shape.resolution, shape.resolution) * 2 - 1

    def step() -> None:
        found = model(pixels)
        loss = (found.reconstruction_BCHW - pixels).abs().mean() + found.commitment_loss
        optimizer.zero_grad()
        (loss + found.codebook_loss).backward()
        optimizer.step()

    def encode() -> None:
        with torch.inference_mode():
            model.encode(pixels)

    return step, encode
