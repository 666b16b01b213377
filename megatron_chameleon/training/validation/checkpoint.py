"""Measure the held-out loss of a checkpoint of any format, on one process or on several.

The model is the one that training uses, split as the config says, and its weights are read from the
checkpoint row by row. So the loss is the same number that a run logs.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from megatron.core.transformer.module import Float16Module
from torch import nn

from megatron_chameleon.announce import announced
from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.loading.model import load_model
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.config.checks.check import check_model
from megatron_chameleon.config.checks.layouts import check_vocabulary
from megatron_chameleon.config.load import replace_values
from megatron_chameleon.config.schema import (
    Config,
    DataConfig,
    TrainingConfig,
    ValidationConfig,
    ValidationSourceConfig,
)
from megatron_chameleon.data.token_files.format import read_info
from megatron_chameleon.data.validation.reader import HeldOutReader
from megatron_chameleon.errors import ChameleonError, ConfigError, DataError
from megatron_chameleon.parallel.collectives import raise_together
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import create_topology
from megatron_chameleon.training.engines.evaluation import evaluate_batches
from megatron_chameleon.training.reference.stored import stored_reference
from megatron_chameleon.training.validation.losses import HeldOutLosses, PreferenceLosses
from megatron_chameleon.training.validation.measure import measure

SECTIONS = ("model", "data", "training", "parallel", "fusion", "dpo")
"""Sections of the config that matter here."""


def evaluation_config(
    reader: CheckpointReader, prefixes: Sequence[str], overrides: Sequence[str], world_size: int
) -> Config:
    """The config to measure a checkpoint with.

    The model, the isolation of documents, ``data.loss_on``, the micro-batch and the dtype are those
    of the checkpoint's run. Layout, engine and FP8 are not: a checkpoint is measured on whatever
    machine there is. The objective is that of the documents, whatever the run was trained with: dpo
    for pairs of answers, with the run's ``dpo.beta``.

    Args:
        reader: The checkpoint.
        prefixes: The token files to measure; none: those of the run's ``data.validation``.
        overrides: Words of the form ``section.key=value``.
        world_size: Number of processes of this job.

    Raises:
        ConfigErrors: Values cannot work.
    """
    for word in overrides:
        if word.partition(".")[0] not in SECTIONS:
            what = "changes nothing about the loss of a checkpoint"
            raise ConfigError(word, what, f"Give values of {', '.join(SECTIONS)}, or leave it out")
    run, chosen = reader.config or Config(), DataConfig()
    chosen.reset_attention, chosen.loss_on = run.data.reset_attention, run.data.loss_on
    chosen.validation = run.data.validation
    if prefixes:
        listed = [ValidationSourceConfig(prefix) for prefix in prefixes]
        chosen.validation = ValidationConfig(listed)
    training = TrainingConfig(
        micro_batch_size=run.training.micro_batch_size, dtype=run.training.dtype
    )
    if reader.config is None:
        row = next(iter(tensor_rows(reader.dimensions)))
        training.dtype = "fp32" if reader.dtype(row) is torch.float32 else "bf16"
    config = Config(model=replace(reader.model), data=chosen, training=training)
    if _are_pairs([source.prefix for source in chosen.validation.sources]):
        training.objective, chosen.reset_attention, chosen.loss_on = "dpo", True, "auto"
        config.dpo = replace(run.dpo)
    config = replace_values(config, overrides)
    # Nothing is trained; this one fits every layout.
    config.training.global_batch_size = config.training.micro_batch_size * world_size
    check_model(config, world_size)
    if not config.data.validation.sources:
        what = f"is missing, and the config of {reader.folder} names no data.validation.sources"
        raise ConfigError("--data", what, "Give the prefixes of the token files to measure")
    for problem in check_vocabulary(reader.dimensions.vocab_size, config):
        raise problem
    return config


def _are_pairs(prefixes: Sequence[str]) -> bool:
    """Whether all token files that can be read hold pairs of answers; False without any."""
    found = []
    for prefix in prefixes:
        try:
            info = read_info(prefix)
        except DataError:
            continue  # opening it says what is wrong
        found.append(0 < info.documents == info.total("pairs"))
    return bool(found) and all(found)


def measure_checkpoint(
    reader: CheckpointReader,
    config: Config,
    held_out: HeldOutReader,
    launch: Launch,
    report: Callable[[int], None],
) -> HeldOutLosses | PreferenceLosses:
    """Load the model and measure it. Every process of the job calls it.

    Pairs are measured against the reference of the checkpoint's run. Without one, only their
    log-probabilities are known, and a warning says so.

    Args:
        reader: The checkpoint.
        config: From ``evaluation_config``.
        held_out: The documents.
        launch: From ``find_launch``.
        report: Called now and then with the number of sequences that have been measured.

    Raises:
        ChameleonError: On every rank: a file cannot be read.
    """
    prepare_megatron()
    join_process_group(launch)
    try:
        topology = create_topology(config.parallel)
        with announced(f"loading the model from {reader.folder}"):
            chunks: list[nn.Module] = list(load_model(reader, config, topology))
            if config.training.dtype == "bf16":
                chunks = [Float16Module(chunk.config, chunk) for chunk in chunks]
        done = 0

        def go_on(failure: ChameleonError | None) -> bool:
            nonlocal done
            raise_together(failure)
            report(done)
            done += together
            return True

        together = held_out.chunk_sequences(topology.data_size, topology.pipeline_size)
        has_reference = config.training.objective == "dpo" and _find_reference(
            reader, config, held_out, launch
        )
        losses = measure(partial(evaluate_batches, config, chunks), held_out, topology, go_on)
        assert losses is not None  # go_on always goes on
        if isinstance(losses, PreferenceLosses) and not has_reference:
            losses = losses.without_reference()
        return losses
    finally:
        leave_process_group()


def _find_reference(
    reader: CheckpointReader, config: Config, held_out: HeldOutReader, launch: Launch
) -> bool:
    """Give the reader of pairs the reference of the checkpoint's run; False if there is none."""
    opened = [source.source for source in held_out.sources]
    tables, missing = stored_reference(reader.folder, opened, config.model.seq_length)
    if tables is None:
        if launch.rank == 0:
            logging.getLogger(__name__).warning(missing)
        return False
    by_name = {source.name: tables[source.source.corpus.prefix] for source in held_out.sources}
    held_out.references = by_name
    return True
