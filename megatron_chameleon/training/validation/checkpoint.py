"""Measure the held-out loss of a checkpoint of any format, on one process or on several.

The model is the one that training uses, split as the config says, and its weights are read from the
checkpoint row by row. So the loss is the same number that a run logs.
"""

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
from megatron_chameleon.data.validation.reader import HeldOutReader
from megatron_chameleon.errors import ChameleonError, ConfigError
from megatron_chameleon.parallel.collectives import raise_together
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import create_topology
from megatron_chameleon.training.engines.evaluation import evaluate_batches
from megatron_chameleon.training.validation.losses import HeldOutLosses
from megatron_chameleon.training.validation.measure import measure

SECTIONS = ("model", "data", "training", "parallel", "fusion")
"""Sections of the config that matter here."""


def evaluation_config(
    reader: CheckpointReader, prefixes: Sequence[str], overrides: Sequence[str], world_size: int
) -> Config:
    """The config to measure a checkpoint with.

    The model, the isolation of documents, ``data.loss_on``, the micro-batch and the dtype are those
    of the checkpoint's run. Layout, engine and FP8 are not: a checkpoint is measured on whatever
    machine there is.

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


def measure_checkpoint(
    reader: CheckpointReader,
    config: Config,
    held_out: HeldOutReader,
    launch: Launch,
    report: Callable[[int], None],
) -> HeldOutLosses:
    """Load the model and measure it. Every process of the job calls it.

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
        losses = measure(partial(evaluate_batches, config, chunks), held_out, topology, go_on)
        assert isinstance(losses, HeldOutLosses)  # the config trains no preferences
        return losses
    finally:
        leave_process_group()
