"""Measure the held-out loss: all held-out documents through the model, once and without gradients.

The loss is a mean over tokens: each rank sums up the cross-entropy and the tokens of its own
micro-batches, in float64, and the sums of all ranks are added. So neither the number of ranks nor
the padding of the last micro-batches changes it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.data.validation.reader import HeldOutReader, next_or_failure
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.objective import held_out_measurement
from megatron_chameleon.training.validation.losses import (
    HeldOutLosses,
    ModalityLosses,
    PreferenceLosses,
)


def measure(
    evaluate: Callable[[Sequence[Batch]], Tensor],
    reader: HeldOutReader,
    topology: Topology,
    go_on: Callable[[ChameleonError | None], bool],
) -> HeldOutLosses | PreferenceLosses | None:
    """Measure all sources. A collective: every rank calls it.

    Args:
        evaluate: ``TrainingEngine.evaluate``.
        reader: The held-out documents.
        topology: The place of this process.
        go_on: A collective that is called before each chunk of micro-batches, with this rank's
            failure to read it, if any. It returns whether to go on, and raises on every rank if
            any has a failure.

    Returns:
        The losses of the whole job, the same on every rank; None if ``go_on`` returned False.
    """
    # On the CPU, where index_add_ adds in a fixed order.
    of_pairs = reader.config.training.objective == "dpo"
    count = held_out_measurement(reader.config).count
    totals = torch.zeros(len(reader.sources), count, dtype=torch.float64)
    # Interleaved pipelines take as many micro-batches as they have stages, or a multiple.
    multiple = topology.pipeline_size
    with reader.read_ahead(topology.data_rank, topology.data_size, multiple) as chunks:
        while True:
            chunk, failure = next_or_failure(chunks)
            if not go_on(failure):
                return None
            if chunk is None:
                break
            numbers = torch.tensor([number for number, _ in chunk])
            totals.index_add_(0, numbers, evaluate([batch for _, batch in chunk]).cpu())
    of_all_ranks = totals.to(platform.device())
    torch.distributed.all_reduce(of_all_ranks)
    # Tensor-parallel ranks have computed the same.
    values = (of_all_ranks / topology.tensor_size).tolist()
    if of_pairs:
        return PreferenceLosses(dict(zip(reader.names, values, strict=True)))
    found = {
        name: ModalityLosses(text, round(text_tokens), image, round(image_tokens))
        for name, (text, text_tokens, image, image_tokens) in zip(reader.names, values, strict=True)
    }
    return HeldOutLosses(found)
