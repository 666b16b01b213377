"""Compute what the reference gives to the pairs of a run, once, before its first step.

The reference is the model with the weights that the run begins with. So it is computed from these
before any is changed, by the engine's own pass without gradients, and no second model is needed.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.config.schema import Config, ValidationSourceConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.data.mixture.sources import DataSource
from megatron_chameleon.data.validation.reader import HeldOutReader
from megatron_chameleon.errors import ChameleonError, CheckpointError
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.collectives import raise_together, run_on_rank_0
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.base import TrainingEngine
from megatron_chameleon.training.engines.objective import Measurement, Output
from megatron_chameleon.training.preference.loss import answer_log_probs
from megatron_chameleon.training.reference.tables import (
    REFERENCE_FOLDER,
    Tables,
    files_digest,
    read_tables,
    start_digest,
    write_tables,
)
from megatron_chameleon.training.run.inputs import RunInputs

REFERENCE = "reference"
"""The entry of a checkpoint's ``state.json`` that names the reference of its run."""


def find_reference(
    inputs: RunInputs, engine: TrainingEngine, topology: Topology, note_progress: Callable[[], None]
) -> str:
    """Read or compute the reference, and give it to the readers of the run. A collective.

    Args:
        inputs: Of the run, whose weights the engine has loaded.
        engine: Whose model is the reference if it is not known yet.
        topology: The place of this process.
        note_progress: Called before each chunk of micro-batches.

    Returns:
        The digest that the checkpoints of the run keep.

    Raises:
        CheckpointError: The run has made steps, and its reference is missing.
    """
    sources = _sources(inputs)
    files = files_digest(sources)
    folder = Path(inputs.config.logging.run_dir) / REFERENCE_FOLDER
    state = load_state(inputs.checkpoint) if inputs.checkpoint is not None else {}
    named, model = state.get(REFERENCE), vars(inputs.config.model)
    begun = inputs.checkpoint or inputs.start.weights
    start = start_digest(begun, [model, inputs.config.training.seed])

    def look() -> tuple[Tables, str] | None:
        found = read_tables(folder, files)
        if found is None or (found[1] != named if named else found[2] != start):
            return None
        return found[0], found[1]

    known = run_on_rank_0(look)
    if known is None and named:
        what = f"{folder} does not have the reference log-probabilities of the checkpoint "
        what += f"{inputs.checkpoint}, which its weights can no longer give"
        remedy = "Put the folder and the token files back, or start a new run from the weights"
        raise CheckpointError(str(folder), what, remedy)
    if known is None:
        tables = _compute(inputs, sources, engine, topology, note_progress)
        digest = run_on_rank_0(lambda: write_tables(folder, tables, files, start))
    else:
        tables, digest = known
    inputs.reader.references = {s.key: tables[s.corpus.prefix] for s in inputs.reader.sources}
    if inputs.held_out is not None:
        inputs.held_out.references = {
            s.name: tables[s.source.corpus.prefix] for s in inputs.held_out.sources
        }
    return digest


def _sources(inputs: RunInputs) -> list[DataSource]:
    """Those of the run, one of each token file."""
    held_out = inputs.held_out.sources if inputs.held_out is not None else []
    found = [*inputs.reader.sources, *(source.source for source in held_out)]
    return list({source.corpus.prefix: source for source in found}.values())


def _compute(
    inputs: RunInputs,
    sources: list[DataSource],
    engine: TrainingEngine,
    topology: Topology,
    note_progress: Callable[[], None],
) -> Tables:
    """The log-probabilities of all pairs, in the same way as the held-out loss is measured."""
    reader = HeldOutReader(_config_of(inputs.config, sources), inputs.tokenizer)
    tables = [torch.zeros(source.corpus.documents, 2, dtype=torch.float64) for source in sources]
    known = [torch.zeros(len(table), dtype=torch.float64) for table in tables]
    with reader.read_ahead(topology.data_rank, topology.data_size, topology.pipeline_size) as read:
        while True:
            chunk, failure = None, None
            try:
                chunk = next(read, None)
            except ChameleonError as error:
                failure = error
            raise_together(failure)
            if chunk is None:
                break
            note_progress()
            batches = [batch for _, batch in chunk]
            found = engine.evaluate(batches, _log_probs(batches)).cpu()
            for (number, batch), values in zip(chunk, found, strict=True):
                assert batch.pairs is not None
                places = torch.from_numpy(np.asarray(batch.pairs.documents))
                tables[number][places] = values[: 2 * len(places)].reshape(-1, 2)
                known[number][places] = float(_computes_loss(topology))
    return {
        source.corpus.prefix: _of_all_ranks(table, flags)
        for source, table, flags in zip(sources, tables, known, strict=True)
    }


def _config_of(config: Config, sources: list[DataSource]) -> Config:
    """The config with all sources of the run to be measured, whole."""
    listed = [ValidationSourceConfig(source.corpus.prefix) for source in sources]
    validation = replace(config.data.validation, sources=listed, max_tokens=None)
    return replace(config, data=replace(config.data, validation=validation))


def _log_probs(batches: list[Batch]) -> Measurement:
    """The log-probabilities of a micro-batch's answers, filled up with zeros to the same number."""
    most = max(batch.pairs.count for batch in batches if batch.pairs is not None)

    def values(batch: Batch, output: Output) -> torch.Tensor:
        found = answer_log_probs(batch, output[0].detach()).reshape(-1)
        return torch.nn.functional.pad(found, (0, 2 * most - len(found)))

    return Measurement(values, 2 * most)


def _computes_loss(topology: Topology) -> bool:
    """Whether this process is the first of those that compute the loss of their tokens."""
    return topology.pipeline_rank == topology.pipeline_size - 1 and topology.tensor_rank == 0


def _of_all_ranks(table: torch.Tensor, known: torch.Tensor) -> np.ndarray:
    """One table of what the ranks have; NaN for pairs that none has."""
    both = torch.cat([table * known.unsqueeze(1), known.unsqueeze(1)], dim=1).to(platform.device())
    torch.distributed.all_reduce(both)
    values, times = both[:, :2].cpu().numpy(), both[:, 2].cpu().numpy()
    return np.where(times[:, None] > 0, values / np.maximum(times, 1)[:, None], np.nan)
