"""Forward passes without gradients, by megatron-core's pipeline schedules."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel import platform
from megatron_chameleon.training.engines.inputs import (
    MicroBatchShape,
    micro_batch_shape,
    own_part,
    run_model,
)
from megatron_chameleon.training.engines.objective import (
    Measurement,
    Output,
    held_out_measurement,
)


@torch.no_grad()
def evaluate_batches(
    config: Config,
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[Batch],
    measurement: Measurement | None = None,
) -> Tensor:
    """Numbers of micro-batches, such as losses; a collective of the ranks that hold the model.

    Dropout is off, and nothing is left behind that a training step would see.

    Args:
        config: Of the run.
        chunks: This rank's parts of the model, as the engine has wrapped them.
        micro_batches: At least one; with interleaved pipelines, a multiple of the pipeline's size.
        measurement: What to take; None for ``held_out_measurement``.

    Returns:
        float64 [micro-batches, numbers]; zeros on pipeline stages before the last one.
    """
    taken = measurement or held_out_measurement(config)
    shape = micro_batch_shape(config, micro_batches)
    sums = torch.zeros(
        len(micro_batches), taken.count, dtype=torch.float64, device=platform.device()
    )
    for chunk in chunks:
        chunk.eval()
    try:
        get_forward_backward_func()(
            forward_step_func=partial(_forward_step, sums, shape, taken),
            data_iterator=[enumerate(micro_batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            seq_length=shape.tokens,
            micro_batch_size=shape.samples,
            forward_only=True,
        )
    finally:
        for chunk in chunks:
            chunk.train()
    return sums


def _forward_step(
    sums: Tensor,
    shape: MicroBatchShape,
    taken: Measurement,
    micro_batches: Iterator[tuple[int, Batch]],
    model: nn.Module,
) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor, dict]]]:
    number, whole_batch = next(micro_batches)
    batch, documents = own_part(whole_batch, shape)
    return run_model(model, batch, documents), partial(_note, sums[number], taken, batch)


def _note(
    place: Tensor, taken: Measurement, batch: Batch, output: Output
) -> tuple[Tensor, Tensor, dict]:
    """Keep the sums; what megatron-core gets is not used in a pass without gradients."""
    place.copy_(taken.values(batch, output))
    return output[0].sum(), batch.loss_mask.sum().int(), {}
