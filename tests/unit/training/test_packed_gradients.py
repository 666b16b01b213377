"""Packing changes nothing: a conversation has the same gradient among others and alone."""

import torch
from torch import Tensor

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.megatron import MegatronEngine

VOCAB_SIZE, SEQUENCE = 64, 32
LENGTHS = (9, 13, 8)  # with 2 tokens of padding
LARGEST_DIFFERENCE = 1e-6
"""Of gradients whose largest element is near 1; fp32 rounds at 6e-8, and sums have other orders."""


def packed(lengths: tuple[int, ...], first: int = 0) -> Batch:
    """One sequence of conversations with the numbers from ``first`` on; a third is answers."""
    tokens, labels, mask, positions = (torch.zeros(SEQUENCE) for _ in range(4))
    begin = 0
    for number, length in enumerate(lengths, start=first):
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(1, VOCAB_SIZE, (length + 1,), generator=draw)
        part = slice(begin, begin + length)
        tokens[part], labels[part], positions[part] = ids[:-1], ids[1:], torch.arange(length)
        mask[begin + length * 2 // 3 : begin + length] = 1
        begin += length
    ends = torch.tensor([0, *lengths, SEQUENCE - begin]).cumsum(0)
    whole = [row[None].long() for row in (tokens, labels, positions)]
    return Batch(whole[0], whole[1], mask[None], whole[1] < 16, whole[2], ends.int())


def gradients(topology: Topology, batch: Batch) -> dict[str, Tensor]:
    """The gradients of the summed loss of a sequence."""
    config = Config(model=ModelConfig(2, 32, 64, 4, seq_length=SEQUENCE))
    config.data.reset_attention = True
    engine = MegatronEngine(config, VOCAB_SIZE, topology)
    engine.compute_gradients(1, [batch])
    count = batch.loss_mask.sum()
    return {name: weight.main_grad * count for name, weight in engine.named_parameters()}


def test_a_conversation_has_the_same_gradient_packed_and_alone(topology: Topology) -> None:
    together = gradients(topology, packed(LENGTHS))
    alone = [gradients(topology, packed((n,), first)) for first, n in enumerate(LENGTHS)]
    assert max(gradient.abs().max() for gradient in together.values()) > 0.5
    for name, gradient in together.items():
        expected = sum((parts[name] for parts in alone), torch.zeros(()))
        assert (gradient - expected).abs().max() < LARGEST_DIFFERENCE, name
        assert (gradient - alone[0][name]).abs().max() > LARGEST_DIFFERENCE, name
