"""Random streams that are functions of (seed, step, micro-batch, layer).

No random state is saved: a resumed run seeds itself anew. Nor do the streams depend on the layout
where the numbers drawn from them do not: a layer's dropout masks are the same whichever pipeline
stage or data-parallel rank computes it, as long as the micro-batches hold the same samples. Only
where sequence or context parallelism gives each rank a part of a sequence do its ranks draw for
themselves.
"""

import numpy
import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.topology import Topology

# A generator's seed has the stream in its upper 32 bits, for seed_layer to find again, and in its
# lower 32 bits what it starts from: torch's CPU generator looks at those only.
_STREAM_SHIFT = 32


def seed_random(seed: int, steps_done: int, micro_batch: int, topology: Topology) -> None:
    """Set the streams of this process before the forward pass of a micro-batch.

    Tensor-parallel ranks share the outer stream and have streams of their own in megatron-core's
    tracker, for what sequence parallelism splits.

    Args:
        seed: Of the run.
        steps_done: Steps before this one, from 0.
        micro_batch: Counted over all data-parallel ranks within the step's global batch.
        topology: The place of this process.
    """
    stream = _mix(seed, steps_done, micro_batch, topology.context_rank) >> 2  # room to add ranks
    start = stream << _STREAM_SHIFT | _mix(stream, 0)
    torch.manual_seed(start)
    # megatron-core adds the rank to the seed: this way it reaches the stream
    rank = topology.tensor_rank << _STREAM_SHIFT
    megatron_random.model_parallel_cuda_manual_seed(start, tp_rank=rank, ep_rank=0, etp_rank=rank)


def seed_layer(layer_number: int) -> None:
    """Go on with the current stream's branch for a layer, wherever the layers before it are.

    The stream is known by its generator's seed, which a recomputation restores together with the
    rest of its state.

    Args:
        layer_number: Counted over the whole model from 1.
    """
    generator = platform.random_generator()
    stream = generator.initial_seed() >> _STREAM_SHIFT
    generator.manual_seed(stream << _STREAM_SHIFT | _mix(stream, layer_number))


def _mix(*words: int) -> int:
    """32 well-mixed bits of the words."""
    return int(numpy.random.SeedSequence(words).generate_state(1, numpy.uint32)[0])
