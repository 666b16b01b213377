"""A training run started by a Python program, as ``chameleon train`` starts one."""

from collections.abc import Sequence
from pathlib import Path

from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.names import find_config
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.parallel.launch import find_launch
from megatron_chameleon.training.inheriting import load_inheriting, tokenizer_in_place


def train(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: str = "auto",
    start_from: str | Path | None = None,
) -> bool:
    """Train a model, as ``chameleon train CONFIG`` does.

    A program of one process calls it directly. With several processes, each of them calls it:
    ``torchrun --nproc-per-node 2 program.py``. The call must come from the main thread, which
    receives the signals that save and stop a run.

    Args:
        config: A YAML file, a run folder, or the name of a preset.
        overrides: Words of the form ``section.key=value``, such as ``optimizer.lr=1e-3``.
        resume: ``auto``: from the newest checkpoint of the run, if there is one; ``never``: from
            step 0, in a run folder without checkpoints; or the path of a checkpoint.
        start_from: A checkpoint of any format whose weights the run begins with, at step 0. What
            the config does not say of the model and the tokenizer is taken from it.

    Returns:
        Whether the last step was done; False if a signal stopped the run before it. The same call
        then goes on from the checkpoint that was saved.

    Raises:
        ConfigError: A value of the config cannot work, or does not fit this machine.
        DataError: The tokenizer or a token file cannot be used.
        CheckpointError: A checkpoint cannot be read or written.
        TrainingError: The run cannot go on, for example after a loss that is not finite.
    """
    if start_from is not None and resume != "auto":
        what = f"it does not go with resume={resume!r}"
        raise ConfigError("start_from", what, "Give one of the two")
    launch = find_launch()
    first = None if start_from is None else str(start_from)
    loaded, weights = load_inheriting(find_config(str(config)), overrides, first)
    check_config(loaded, launch.world_size)  # before the imports, which take seconds
    from megatron_chameleon.training.loop import train as train_run
    from megatron_chameleon.training.prepare import prepare_run

    with tokenizer_in_place(loaded, weights, launch.rank, keep=True) as ready:
        inputs = prepare_run(
            ready, launch.world_size, first or resume, weights_only=first is not None
        )
        return train_run(inputs, launch)
