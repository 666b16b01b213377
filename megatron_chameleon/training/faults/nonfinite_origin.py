"""Find where a value that is not finite came from: ranks, layers, micro-batches and documents.

The ranks repeat the forward and backward passes of the step, with hooks that see each gradient
before it is summed over the ranks. The batch and the dropout masks are the same as before, so a
fault of the data or of the model appears again, on the ranks where it arises. A fault that does not
appear again points at a machine.
"""

import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_chameleon.data.batches.reader import Batch, BatchReader
from megatron_chameleon.model.initialization import named_global_parameters
from megatron_chameleon.parallel.collectives import all_gather
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.base import TrainingEngine
from megatron_chameleon.training.faults.weights import summarize_names

SHOWN_NUMBERS = 4
"""How many ranks or samples a line names."""


@dataclass(frozen=True)
class RankFindings:
    """What one rank found."""

    rank: int
    data_rank: int
    host: str
    losses: list[int]
    """Its micro-batches, from 0, whose loss was not finite."""
    weights: list[str]
    """Its weights that are not finite."""
    gradients: dict[str, list[int]]
    """Its gradients that were not finite in the repeated pass, each with its micro-batches."""

    @property
    def micro_batches(self) -> set[int]:
        """The micro-batches under suspicion."""
        return set(self.losses) or {n for numbers in self.gradients.values() for n in numbers}


def find_origin(
    step: int, engine: TrainingEngine, micro_batches: Sequence[Batch], topology: Topology
) -> list[RankFindings]:
    """Repeat a step's passes and look; returns what each rank found, by rank. A collective.

    Args:
        step: The one that the engine has just done, counted from 1.
        engine: The run's.
        micro_batches: Those of the step.
        topology: The place of this process.
    """
    losses = [
        number
        for number, loss in enumerate(engine.monitor.last_losses)
        if not torch.isfinite(loss).item()
    ]
    weights = [n for n, w in engine.named_parameters() if not torch.isfinite(w).all().item()]
    with watch_gradients(engine) as gradients:
        engine.repeat_pass(step, micro_batches)
    own = RankFindings(
        topology.rank, topology.data_rank, socket.gethostname(), losses, weights, gradients
    )
    return all_gather(own)


@contextmanager
def watch_gradients(engine: TrainingEngine) -> Iterator[dict[str, list[int]]]:
    """Collect the names of gradients that are not finite, with the numbers of their micro-batches.

    A parameter has one gradient per micro-batch, in order, and the hooks see it before it is added
    to those of the others. Where the matrix product itself adds it to the buffer (fused
    accumulation), the hooks see an empty dummy. The buffer is checked instead, and only the first
    micro-batch that broke it is known.
    """
    found: dict[str, list[int]] = {}
    seen: dict[str, int] = {}

    def look(name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        number = seen.get(name, 0)
        seen[name] = number + 1
        in_buffer = getattr(parameter, "grad_added_to_main_grad", False)
        if in_buffer and name in found:
            return
        values = parameter.main_grad if in_buffer else gradient  # type: ignore[attr-defined]
        if not torch.isfinite(values).all().item():
            found.setdefault(name, []).append(number)

    handles = [
        parameter.register_hook(partial(look, name, parameter))
        for part in engine.parts
        for name, parameter in named_global_parameters(part)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def first_bad_layer(norms: Sequence[float | None]) -> str | None:
    """The first layer whose output was not finite on some rank, by its name in the model.

    Args:
        norms: ``layer_output_norms`` of the step.
    """
    numbers = (i for i, norm in enumerate(norms) if norm is not None and not math.isfinite(norm))
    first = next(numbers, None)
    return None if first is None else f"decoder.layers.{first}"


def list_suspect_samples(
    step: int, reader: BatchReader, findings: Sequence[RankFindings], data_size: int
) -> list[dict[str, Any]]:
    """The samples of the suspect micro-batches, or of the whole step if none is under suspicion.

    Args:
        step: Counted from 1.
        reader: One that no other thread uses.
        findings: Of all ranks.
        data_size: Number of data-parallel ranks.

    Returns:
        Samples with their documents, in the order of the samples, as ``nonfinite.jsonl`` lists
        them.
    """
    suspects = {(f.data_rank, number) for f in findings for number in f.micro_batches}
    indices: list[int] = []
    for data_rank in range(data_size):
        for number, samples in enumerate(reader.indices_for(step, data_rank, data_size)):
            if not suspects or (data_rank, number) in suspects:
                indices += samples
    return [{"sample": i, "documents": _list_documents(reader, i)} for i in sorted(indices)]


def _list_documents(reader: BatchReader, index: int) -> list[dict[str, Any]]:
    """The parts of documents in a sample, as ``chameleon data audit`` names them."""
    sample = reader.sample(index)
    parts = sample.packed.parts
    return [
        {
            "source": sample.source_names[source],
            "document": int(parts.document[i]),
            "tokens": [int(parts.start[i]), int(parts.stop[i])],
        }
        for i, source in enumerate(sample.packed.source.tolist())
    ]


def describe_findings(
    problem: str,
    layer: str | None,
    findings: Sequence[RankFindings],
    samples: Sequence[Mapping[str, Any]],
    place: str,
) -> str:
    """Everything in one line of bounded length; ``nonfinite.jsonl`` has the rest.

    Args:
        problem: Which value is not finite.
        layer: From ``first_bad_layer``.
        findings: Of all ranks.
        samples: From ``list_suspect_samples``.
        place: Where the rest is.
    """
    words = [f"{problem} (first in the output of {layer})" if layer else problem]
    bad_ranks = [f.rank for f in findings if f.losses]
    if bad_ranks:
        words.append(f"loss not finite on {_some_numbers('rank', bad_ranks)}")
    if any(f.weights for f in findings):
        words.append(f"weights not finite: {summarize_names([f.weights for f in findings])}")
    if any(f.gradients for f in findings):
        names = summarize_names([list(f.gradients) for f in findings])
        words.append(f"gradients not finite: {names}")
    elif not bad_ranks:
        words.append("not found again when the pass was repeated: suspect a machine")
    if samples:
        words.append(_some_numbers("sample", [sample["sample"] for sample in samples]))
    return f"{', '.join(words)} ({place})"


def _some_numbers(noun: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:SHOWN_NUMBERS])
    more = len(numbers) - SHOWN_NUMBERS
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}{f' and {more} more' * (more > 0)}"
