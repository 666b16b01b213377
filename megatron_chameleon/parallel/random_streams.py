"""Random streams that are functions of (seed, step, micro-batch, layer).

No random state is saved: a resumed run simply seeds its streams again. The streams do not depend on
the layout either. A layer's dropout masks are the same whichever pipeline stage or data-parallel
rank computes it, as long as the micro-batches hold the same samples. The exception is sequence and
context parallelism, where each rank has a part of a sequence and draws from a stream of its own.
"""

import numpy
import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.topology import Topology

# The upper 32 bits of a generator's seed hold the stream, where seed_layer finds it. The lower 32
# bits are what the generator starts from: torch's CPU generator uses only those.
_STREAM_SHIFT = 32


def seed_random(seed: int, steps_done: int, micro_batch: int, topology: Topology) -> None:
    """Set the streams of this process before the forward pass of a micro-batch.

    Tensor-parallel ranks share the outer stream. For tensors that sequence parallelism splits, each
    has a stream of its own in megatron-core's tracker.

    Args:
        seed: The run's seed.
        steps_done: Number of steps before this one, from 0.
        micro_batch: Number of the micro-batch in the step's global batch, counted over all
            data-parallel ranks.
        topology: The place of this process.
    """
    stream = _mix(seed, steps_done, micro_batch, topology.context_rank) >> 2  # room for the rank
    start = stream << _STREAM_SHIFT | _mix(stream, 0)
    torch.manual_seed(start)
    # megatron-core adds the rank to the seed; shifted, it changes the stream
    rank = topology.tensor_rank << _STREAM_SHIFT
    megatron_random.model_parallel_cuda_manual_seed(start, tp_rank=rank, ep_rank=0, etp_rank=rank)


def seed_layer(layer_number: int) -> None:
    """Switch to the current stream's branch for a layer, wherever the previous layers are computed.

    The stream is read from the generator's seed, which recomputation restores together with the
    rest of the generator's state.

    Args:
        layer_number: Counted from 1 over the whole model.
    """
    generator = platform.random_generator()
    stream = generator.initial_seed() >> _STREAM_SHIFT
    generator.manual_seed(stream << _STREAM_SHIFT | _mix(stream, layer_number))


def _mix(*words: int) -> int:
    """32 well-mixed bits that depend on all words."""
    return int(numpy.random.SeedSequence(words).generate_state(1, numpy.uint32)[0])
