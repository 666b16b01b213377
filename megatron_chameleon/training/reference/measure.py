"""Compute what the reference gives to the pairs of a run, once, before its first step.

The reference is the model with the weights that the run begins with. So it is computed from these
before any is changed, by the engine's own pass without gradients, and no second model is needed.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.config.schema import Config, ValidationSourceConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.data.mixture.corpus import TokenFileCorpus
from megatron_chameleon.data.mixture.sources import DataSource
from megatron_chameleon.data.validation.reader import Chunk, HeldOutReader, next_or_failure
from megatron_chameleon.errors import ChameleonError, CheckpointError
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.collectives import run_on_rank_0
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.base import TrainingEngine
from megatron_chameleon.training.engines.objective import Measurement, Output
from megatron_chameleon.training.preference.loss import answer_log_probs
from megatron_chameleon.training.reference.tables import (
    REFERENCE_FILE,
    REFERENCE_FOLDER,
    Tables,
    files_digest,
    read_partial,
    read_tables,
    start_digest,
    write_partial,
    write_tables,
)
from megatron_chameleon.training.run.inputs import RunInputs

SAVE_SECONDS = 120.0
"""A pass that is killed loses no more than this much of its work."""

REFERENCE = "reference"
"""The entry of a checkpoint's ``state.json`` that names the reference of its run."""


class StoppedMeasuring(Exception):
    """A signal has asked the run to stop before its reference was known; what to tell the user."""


def find_reference(
    inputs: RunInputs,
    engine: TrainingEngine,
    topology: Topology,
    stop: Callable[[ChameleonError | None], str | None],
) -> str:
    """Read or compute the reference, and give it to the readers of the run. A collective.

    Args:
        inputs: Of the run, whose weights the engine has loaded.
        engine: Whose model is the reference if it is not known yet.
        topology: The place of this process.
        stop: Called before each chunk of micro-batches, with the failure of this rank. It raises
            the failure of any rank, and returns the name of a signal that asks the run to stop.

    Returns:
        The digest that the checkpoints of the run keep.

    Raises:
        CheckpointError: The run has made steps, and its reference is missing.
        TrainingError: It cannot be written.
        StoppedMeasuring: What was computed until then is kept.
    """
    sources = _sources(inputs)
    files = files_digest(sources)
    folder = Path(inputs.config.logging.run_dir) / REFERENCE_FOLDER
    start = _start_of(inputs)
    known = _find_known(inputs, sources, files)
    if known is None:
        work = Pass(sources, topology, folder, files, start)
        tables = work.compute(
            HeldOutReader(_config_of(inputs, sources), inputs.tokenizer), engine, stop
        )
        digest = run_on_rank_0(lambda: write_tables(folder, tables, files, start))
    else:
        tables, digest = known
    _give(inputs, tables)
    return digest


def batches_with_reference(
    inputs: RunInputs, engine: TrainingEngine, topology: Topology, step: int
) -> list[Batch]:
    """The micro-batches of the next step, whose pairs have their reference. A collective.

    What the run has written is read. Before its first step it may have written nothing, and the
    engine's weights are the reference, which is computed for these micro-batches alone.

    Args:
        inputs: Of the run, whose weights the engine has loaded.
        engine: Whose model is the reference if the run has written none.
        topology: The place of this process.
        step: Counted from 1.

    Raises:
        CheckpointError: The run has made steps, and its reference is missing.
    """
    sources = _sources(inputs)
    known = _find_known(inputs, sources, files_digest(sources))
    if known is not None:
        _give(inputs, known[0])
    batches = list(inputs.reader.batches_for(step, topology.data_rank, topology.data_size))
    if known is not None:
        return batches
    measured = []
    for batch, values in zip(batches, engine.evaluate(batches, _log_probs(batches)), strict=True):
        assert batch.pairs is not None
        reference = values[: 2 * batch.pairs.count].reshape(-1, 2).double().cpu()
        measured.append(replace(batch, pairs=replace(batch.pairs, reference=reference)))
    return measured


def _start_of(inputs: RunInputs) -> str:
    """What ``start_digest`` returns for the weights that a run begins with."""
    begun, model = inputs.checkpoint or inputs.start.weights, vars(inputs.config.model)
    return start_digest(begun, [model, inputs.config.training.seed])


def _find_known(
    inputs: RunInputs, sources: Sequence[DataSource], files: dict[str, str]
) -> tuple[Tables, str] | None:
    """The tables that the run has written, and their digest; None if they must be computed.

    Raises:
        CheckpointError: They are missing, and the run has made steps.
    """
    folder = Path(inputs.config.logging.run_dir) / REFERENCE_FOLDER
    start = _start_of(inputs)
    state = load_state(inputs.checkpoint) if inputs.checkpoint is not None else {}
    named = state.get(REFERENCE)
    seq_length = inputs.config.model.seq_length

    def look() -> tuple[Tables, str] | str:
        found = read_tables(folder, files)
        if found is None:
            there = (folder / REFERENCE_FILE).is_file()
            return "it is damaged, or of other token files" if there else "it is missing"
        if found[1] != named if named else found[2] != start:
            return "it is of another run"
        if missing := missing_pairs(sources, found[0], seq_length):
            return missing
        return found[0], found[1]

    known = run_on_rank_0(look)
    if isinstance(known, str) and named:
        what = "does not have the reference log-probabilities of the checkpoint "
        what += f"{inputs.checkpoint} ({known}), which its weights can no longer give"
        remedy = "Put the folder and the token files back, or start a new run from the weights"
        raise CheckpointError(str(folder), what, remedy)
    return None if isinstance(known, str) else known


def _give(inputs: RunInputs, tables: Tables) -> None:
    """Let the readers of a run find its tables under the names that they use."""
    inputs.reader.references = {s.key: tables[s.corpus.prefix] for s in inputs.reader.sources}
    if inputs.held_out is not None:
        inputs.held_out.references = {
            s.name: tables[s.source.corpus.prefix] for s in inputs.held_out.sources
        }


def missing_pairs(sources: Sequence[DataSource], tables: Tables, seq_length: int) -> str:
    """Which pairs that fit into a sequence have no reference, in words; empty if all have one."""
    for source in sources:
        assert isinstance(source.corpus, TokenFileCorpus)
        fits = np.asarray(source.corpus.token_file.lengths) <= seq_length
        if unknown := int(np.isnan(tables[source.corpus.prefix][fits]).any(axis=1).sum()):
            return (
                f"it does not have {unknown:,} pairs of {source.corpus.prefix} that fit into "
                f"model.seq_length {seq_length:,}"
            )
    return ""


def _sources(inputs: RunInputs) -> list[DataSource]:
    """Those of the run, one of each token file."""
    held_out = inputs.held_out.sources if inputs.held_out is not None else []
    found = [*inputs.reader.sources, *(source.source for source in held_out)]
    return list({source.corpus.prefix: source for source in found}.values())


class Pass:
    """The pass without gradients over all pairs, in the way in which held-out losses are measured.

    Args:
        sources: Of the run, one of each token file.
        topology: The place of this process.
        folder: RUN/reference.
        files: What ``files_digest`` returned.
        start: What ``start_digest`` returned.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        topology: Topology,
        folder: Path,
        files: dict[str, str],
        start: str,
    ) -> None:
        self._topology, self._folder, self._files, self._start = topology, folder, files, start
        documents = {s.corpus.prefix: s.corpus.documents for s in sources}
        self._kept = run_on_rank_0(lambda: read_partial(folder, documents, files, start))
        """Of an earlier pass that was interrupted."""
        sizes = list(documents.values())
        self._tables = [torch.zeros(size, 2, dtype=torch.float64) for size in sizes]
        self._known = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        self._saved_at = -math.inf

    def compute(
        self,
        reader: HeldOutReader,
        engine: TrainingEngine,
        stop: Callable[[ChameleonError | None], str | None],
    ) -> Tables:
        """Compute what is not kept. A collective; the arguments are those of ``find_reference``."""
        place = self._topology
        with reader.read_ahead(place.data_rank, place.data_size, place.pipeline_size) as chunks:
            while True:
                chunk, failure = next_or_failure(chunks)
                signal = stop(failure)
                if chunk is None:
                    return self._together()
                has_unknown, is_late = self._agree(chunk)
                if signal or is_late:  # also before the first chunk: it finds a full disk
                    tables = self._save()
                if signal:
                    raise StoppedMeasuring(_describe_stop(signal, tables, self._folder))
                if has_unknown:
                    self._measure(chunk, engine)

    def _agree(self, chunk: Chunk) -> tuple[bool, bool]:
        """Whether any rank has pairs that are not kept, and whether it is time to save."""
        kept = list(self._kept.values())
        has_unknown = any(
            bool(np.isnan(kept[number][batch.pairs.documents]).any())
            for number, batch in chunk
            if batch.pairs is not None
        )
        is_late = time.monotonic() - self._saved_at > SAVE_SECONDS
        flags = torch.tensor([has_unknown, is_late], dtype=torch.int64, device=platform.device())
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return bool(flags[0]), bool(flags[1])

    def _measure(self, chunk: Chunk, engine: TrainingEngine) -> None:
        batches = [batch for _, batch in chunk]
        found = engine.evaluate(batches, _log_probs(batches)).cpu()
        for (number, batch), values in zip(chunk, found, strict=True):
            assert batch.pairs is not None
            places = torch.from_numpy(np.asarray(batch.pairs.documents))
            self._tables[number][places] = values[: 2 * len(places)].reshape(-1, 2)
            self._known[number][places] = float(_computes_loss(self._topology))

    def _save(self) -> Tables:
        """Keep what is known. A collective."""
        tables = self._together()
        run_on_rank_0(lambda: write_partial(self._folder, tables, self._files, self._start))
        self._saved_at = time.monotonic()
        return tables

    def _together(self) -> Tables:
        """What all ranks have computed, and what was kept. A collective."""
        found = {}
        for (prefix, kept), table, known in zip(
            self._kept.items(), self._tables, self._known, strict=True
        ):
            computed = _of_all_ranks(table, known)
            found[prefix] = np.where(np.isnan(computed), kept, computed)
        return found


def _describe_stop(signal: str, tables: Tables, folder: Path) -> str:
    total = sum(len(table) for table in tables.values())
    known = sum(int((~np.isnan(table[:, 0])).sum()) for table in tables.values())
    return (
        f"{signal}: stopped before the first step, with the reference log-probabilities of "
        f"{known:,} of {total:,} pairs; they are kept in {folder}, and the same command goes on "
        "with the others"
    )


def _config_of(inputs: RunInputs, sources: list[DataSource]) -> Config:
    """The config with all sources of the run to be measured, whole."""
    config = inputs.config
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
