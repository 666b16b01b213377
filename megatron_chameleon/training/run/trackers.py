"""Send the metrics of ``metrics.jsonl`` to TensorBoard and Weights & Biases too.

Both packages are optional. They are imported only if the config asks for them, because the import
of TensorBoard takes two seconds.
"""

import importlib.util
import netrc
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.masking import masked_values

WANDB_ID_FILE = "wandb_id.txt"


class Tracker(Protocol):
    """Something that takes the numbers of each step."""

    def record(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(config: Config) -> None:
    """Check that the packages that a config asks for are installed, without importing them.

    Raises:
        ConfigError: A package is missing.
    """
    wanted = (
        ("logging.tensorboard", config.logging.tensorboard, "tensorboard"),
        ("logging.wandb_project", config.logging.wandb_project is not None, "wandb"),
    )
    for key, is_wanted, package in wanted:
        if is_wanted and importlib.util.find_spec(package) is None:
            what = f"it needs the package {package}, which is not installed"
            remedy = f"Run pip install -c constraints.txt 'megatron_chameleon[{package}]'"
            raise ConfigError(key, what, remedy)


def open_trackers(config: Config, steps_done: int) -> list[Tracker]:
    """Open the trackers that a config asks for. Only rank 0 calls it.

    Args:
        config: Checked by ``check_trackers``.
        steps_done: Steps that earlier processes of the run have done.
    """
    found: list[Tracker] = []
    if config.logging.tensorboard:
        found.append(TensorBoard(Path(config.logging.run_dir) / "tensorboard", steps_done))
    if config.logging.wandb_project is not None:
        found.append(WeightsAndBiases(config))
    return found


def flat_numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among a step's metrics; those of a list are called ``name/index``."""
    for name, value in metrics.items():
        if isinstance(value, list):
            numbered = {f"{name}/{index}": entry for index, entry in enumerate(value)}
            yield from flat_numbers(numbered)
        elif isinstance(value, int | float) and name != "step":
            yield name, value


class TensorBoard:
    """Writes event files. A resumed run hides the earlier values of steps that it does again.

    Args:
        folder: Where the event files go.
        steps_done: Steps that earlier processes of the run have done.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=steps_done + 1)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Writes to a run of the project: online if an API key is set, otherwise for ``wandb sync``.

    A resumed run continues under the id in the run folder. WANDB_MODE overrides the mode.

    Args:
        config: ``logging.wandb_project`` and the run folder are read; all of it is shown.
    """

    def __init__(self, config: Config) -> None:
        import wandb

        folder = Path(config.logging.run_dir)
        id_file = folder / WANDB_ID_FILE
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        try:
            self._run: Any = wandb.init(
                project=config.logging.wandb_project,
                name=folder.resolve().name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow" if mode == "online" else None,
                dir=str(folder),
                mode=mode,
                config=masked_values(asdict(config)),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, ValueError) as error:  # pydantic raises ValueErrors
            reason = str(error).strip().splitlines()[-1]
            what = f"wandb cannot start ({reason})"
            remedy = "Set WANDB_MODE=offline, or logging.wandb_project to null"
            raise ConfigError("logging.wandb_project", what, remedy) from error

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _has_key() -> bool:
    """Whether wandb could log in without asking. It looks in the same two places."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
