"""Check everything that a run needs before it starts, and describe the run in a line.

Nothing here builds a model, so a missing file or a config that does not fit is reported within
seconds. ``chameleon train --dry-run`` goes on in ``dry_run.py``.
"""

from dataclasses import replace
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.checkpoint.loading.base_weights import find_first_weights
from megatron_chameleon.checkpoint.loading.beginning import check_first_weights
from megatron_chameleon.checkpoint.state.folders import load_state, trained_on_conversations
from megatron_chameleon.checkpoint.state.resume import check_fits, check_step
from megatron_chameleon.checkpoint.state.start import Start, find_sound, find_start
from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.checks.layouts import check_vocabulary
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.mixture.mixture_history import count_stage2_steps
from megatron_chameleon.data.validation.reader import HeldOutReader
from megatron_chameleon.model.tuning.amount import describe_parameters
from megatron_chameleon.model.tuning.selection import select_trained
from megatron_chameleon.parallel.collectives import run_on_rank_0
from megatron_chameleon.tokenizer.folder import load_tokenizer
from megatron_chameleon.training.engines.base import check_installed
from megatron_chameleon.training.learning_rate import run_learning_rate
from megatron_chameleon.training.metrics.trained_tokens import find_trained_tokens
from megatron_chameleon.training.run.branches import carry_out, finish_moves
from megatron_chameleon.training.run.folder import check_run_folder, checkpoints_folder
from megatron_chameleon.training.run.inputs import RunInputs
from megatron_chameleon.training.run.open_data import open_reader
from megatron_chameleon.training.run.skipped_steps import find_skipped_steps
from megatron_chameleon.training.run.trackers import check_trackers
from megatron_chameleon.training.samples.sampler import check_samples


def prepare_run(
    config: Config,
    world_size: int,
    resume: str,
    start: Start | None = None,
    *,
    weights_only: bool = False,
) -> RunInputs:
    """Check the config, the tokenizer, the data and the checkpoint of a run.

    Args:
        config: As loaded.
        world_size: Number of processes of the run.
        resume: ``auto``, ``never`` or the path of a checkpoint.
        start: What ``resume`` means, if that is known already.
        weights_only: Whether the path is a checkpoint of any format that only gives the run its
            first weights.

    Raises:
        ChameleonError: Something is missing or does not fit.
    """
    check_config(config, world_size)
    check_installed(config)
    check_trackers(config)
    check_run_folder(Path(config.logging.run_dir))
    tokenizer = load_tokenizer(config.tokenizer.path, images=False)
    for problem in check_vocabulary(tokenizer.vocabulary.size, config):
        raise problem
    image_ids = tokenizer.vocabulary.code_token_ids
    selection = select_trained(config, tokenizer.vocabulary.size, image_ids)
    check_samples(config)
    start = start or find_start(checkpoints_folder(config), resume, weights_only=weights_only)
    first = find_first_weights(config, start)
    checkpoint, weights = first.start.checkpoint, first.reader
    if checkpoint is not None:
        check_fits(checkpoint, config, tokenizer.fingerprint)
    if weights is not None:
        check_first_weights(weights, config, tokenizer)
    with announced("reading the indices of the data sources"):
        reader = open_reader(config, tokenizer, checkpoint)
        config = with_known_steps(reader, world_size, checkpoint)
        held_out = HeldOutReader(config, tokenizer) if config.data.validation.sources else None
    run_learning_rate(config, reader.history)  # it may not fit the history of the run
    skipped_steps = find_skipped_steps(config, checkpoint)
    with announced("counting the trained tokens"):
        state = load_state(checkpoint) if checkpoint is not None else {}
        trained = find_trained_tokens(state, reader)
    return RunInputs(
        *(config, tokenizer, reader, checkpoint, skipped_steps, resume, first.start),
        weights_only=weights_only,
        weights=weights,
        weight_entries=first.entries,
        held_out=held_out,
        trained=trained,
        with_gradient=selection.with_gradient,
        conversations=bool(
            trained_on_conversations(state) if state or not weights else weights.conversations
        ),
    )


def with_known_steps(reader: BatchReader, world_size: int, checkpoint: Path | None) -> Config:
    """The config of a reader, whose steps may follow from ``training.epochs``, checked once more.

    Raises:
        ChameleonError: A schedule does not fit into these steps, or the checkpoint is beyond them.
    """
    config = reader.config
    if config.training.epochs is not None:
        check_config(config, world_size)
        if checkpoint is not None:
            check_step(checkpoint, config)
    return config


def refresh_inputs(inputs: RunInputs, world_size: int) -> RunInputs:
    """Choose the start again, now that this run holds the lock, and carry it out. A collective.

    An earlier run may have saved another checkpoint while it was ending, or may have been killed
    while it went back, and the files of the chosen checkpoint may turn out to be damaged. Rank 0
    looks, and all ranks follow. Nothing moves before it is known that the checkpoint fits.

    Raises:
        ChameleonError: On every rank: as ``prepare_run`` does, no checkpoint is sound, or the
            file system refuses to set a branch aside.
    """
    folder, weights_only = checkpoints_folder(inputs.config), inputs.weights_only

    def look() -> Start:
        finish_moves(folder)
        return find_start(folder, inputs.resume, weights_only=weights_only)

    start = find_sound(folder, run_on_rank_0(look))
    if start != inputs.start:
        inputs = prepare_run(
            inputs.config, world_size, inputs.resume, start, weights_only=weights_only
        )
    run_on_rank_0(lambda: carry_out(folder, start))
    if start.moves is None:
        return inputs
    start = replace(start, checkpoint=start.checkpoint_after_moves, moves=None)
    return prepare_run(inputs.config, world_size, inputs.resume, start, weights_only=weights_only)


def describe_run(inputs: RunInputs) -> str:
    """The number of parameters, of trained ones, of tokens per step and of steps, in a line."""
    config = inputs.config
    vocabulary = inputs.tokenizer.vocabulary
    parameters = describe_parameters(config, vocabulary.size, vocabulary.code_token_ids)
    stage2 = count_stage2_steps(inputs.reader.history, config.training.steps)
    end = inputs.reader.epochs_end
    epochs = "" if end is None else f"; {end.description}"
    isolation = f"; {inputs.reader.isolation}" if inputs.reader.isolation else ""
    has_stages = config.data.stage2 or stage2
    stages = f", {stage2:,} of them in stage 2" if has_stages else " in one stage"
    return (
        f"{parameters}; {_describe_batches(inputs)}; {config.training.steps:,} steps"
        f"{stages}{_describe_decay(inputs)}{epochs}{isolation}"
    )


def _describe_decay(inputs: RunInputs) -> str:
    """Where the decay of ``wsd`` lies, in words."""
    rate = run_learning_rate(inputs.config, inputs.reader.history)
    if rate.style != "wsd":
        return ""
    return f"; the learning rate decays over the last {rate.decay_steps:,} steps"


def _describe_batches(inputs: RunInputs) -> str:
    """The tokens of each step, in words."""
    training, length = inputs.config.training, inputs.config.model.seq_length
    text = f"{training.global_batch_size * length:,} tokens per step"
    if not training.rampup_batch_size:
        return text
    history = inputs.reader.history
    begin, first = history.batch_size(0) * length, history.batches[-1].first_step + 1
    if first > training.steps:
        end = history.batch_size(training.steps - 1) * length
        return (
            f"{begin:,} tokens in the first step and {end:,} in the last, as the batch still grows"
        )
    return f"{begin:,} tokens in the first step, growing to {text} from step {first:,} on"
