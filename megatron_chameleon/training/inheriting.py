"""The config of a run that begins with the weights of a checkpoint, from which it inherits.

Settings of the model that neither the config nor an override has are those of the weights, and so
is the tokenizer if ``tokenizer.path`` is empty: it is written to ``tokenizer/`` in the run folder.
A run that has checkpoints of its own inherits from them, and needs the weights no more.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_chameleon.checkpoint.formats.base import CheckpointReader
    from megatron_chameleon.config.schema import Config

_WAIT_SECONDS = 900.0
"""How long the other ranks wait for the tokenizer that rank 0 writes."""


def load_inheriting(
    path: Path, overrides: Sequence[str], start_from: str | None
) -> "tuple[Config, CheckpointReader | None]":
    """A config, with what it inherits from the weights that its run begins with.

    Args:
        path: The config.
        overrides: As ``load_config`` takes them.
        start_from: The weights; None if only a run's own checkpoints count.

    Returns:
        The config, and the opened weights if it inherits from them. Its ``tokenizer.path`` is then
        the place in the run folder where the tokenizer belongs, unless the config names another.

    Raises:
        ChameleonError: The config cannot be read, the weights cannot be opened, or the two
            contradict each other.
    """
    from megatron_chameleon.checkpoint.state.line import list_line, read_line
    from megatron_chameleon.config.load import load_config
    from megatron_chameleon.errors import ConfigError

    if start_from is not None and not start_from.strip():
        raise ConfigError("--start-from", "is empty", "Name the folder of the weights")
    config = load_config(path, overrides)
    folder = Path(config.logging.run_dir) / "checkpoints"
    own = list_line(folder)
    begins = start_from is not None or Path(read_line(folder).given or "").is_absolute()
    if not begins or (not own and start_from is None):
        return config, None
    from megatron_chameleon.checkpoint.loading.beginning import (
        check_architecture,
        inherited_settings,
    )

    reader = None
    if own:
        from megatron_chameleon.checkpoint.state.folders import load_checkpoint_config

        recorded = load_checkpoint_config(own[-1])
        model, tokenizer = recorded.model, recorded.tokenizer.path
    else:
        from megatron_chameleon.checkpoint.formats.opening import open_checkpoint

        assert start_from is not None
        reader = open_checkpoint(start_from)
        model, tokenizer = reader.model, str(Path(config.logging.run_dir) / "tokenizer")
    config = load_config(path, overrides, inherited_settings(model))
    if reader is not None:
        check_architecture(reader, config)
    if not config.tokenizer.path:
        config.tokenizer = replace(config.tokenizer, path=tokenizer)
    return config, reader


@contextmanager
def tokenizer_in_place(
    config: "Config", reader: "CheckpointReader | None", rank: int, *, keep: bool
) -> "Iterator[Config]":
    """The config whose ``tokenizer.path`` exists: rank 0 writes the tokenizer of the weights.

    Args:
        config: From ``load_inheriting``.
        reader: Likewise.
        rank: Of this process.
        keep: Whether it is written to the run folder. If not, as in a dry run, each process has a
            copy of its own until the block ends.

    Raises:
        ChameleonError: There is no tokenizer, it cannot be written, or rank 0 does not write it.
    """
    place = Path(config.logging.run_dir) / "tokenizer"
    if reader is None or Path(config.tokenizer.path) != place or place.is_dir():
        yield config
        return
    from megatron_chameleon.checkpoint.loading.beginning import keep_tokenizer
    from megatron_chameleon.config.schema import TokenizerConfig

    if keep:
        from megatron_chameleon.training.run.folder import check_run_folder

        check_run_folder(place.parent)
        if rank == 0:
            keep_tokenizer(reader, place)
        else:
            _wait_for(place)
        yield config
        return
    with tempfile.TemporaryDirectory() as scratch:
        keep_tokenizer(reader, Path(scratch) / "tokenizer")
        yield replace(config, tokenizer=TokenizerConfig(str(Path(scratch) / "tokenizer")))


def _wait_for(place: Path) -> None:
    from megatron_chameleon.errors import CheckpointError

    end = time.monotonic() + _WAIT_SECONDS
    while not place.is_dir():
        if time.monotonic() > end:
            what = f"rank 0 has not written it within {_WAIT_SECONDS:.0f} seconds"
            remedy = "Put logging.run_dir on a file system that all nodes share"
            raise CheckpointError(str(place), what, remedy)
        time.sleep(0.2)
