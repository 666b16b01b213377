"""TensorBoard and Weights & Biases: the same metrics as ``metrics.jsonl``, for their pages.

Both packages are optional, and imported only where the config asks for them: TensorBoard's import
takes two seconds.
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

WANDB_ID_FILE = "wandb_id.txt"


class Tracker(Protocol):
    """Where a step's numbers go."""

    def record(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(config: Config) -> None:
    """See that the packages that a config asks for are installed, without importing them.

    Raises:
        ConfigError: One is missing.
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


def open_trackers(config: Config, first_step: int) -> list[Tracker]:
    """The trackers of a config, writing into the run folder; for rank 0.

    Args:
        config: Checked by ``check_trackers``.
        first_step: Steps done before this process.
    """
    found: list[Tracker] = []
    if config.logging.tensorboard:
        found.append(TensorBoard(Path(config.logging.run_dir) / "tensorboard", first_step))
    if config.logging.wandb_project is not None:
        found.append(WeightsAndBiases(config))
    return found


def flat_numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a step's metrics; those of a list under ``name/index``."""
    for name, value in metrics.items():
        if isinstance(value, list):
            numbered = {f"{name}/{index}": entry for index, entry in enumerate(value)}
            yield from flat_numbers(numbered)
        elif isinstance(value, int | float) and name != "step":
            yield name, value


class TensorBoard:
    """Event files; a resumed run hides the steps that it does again.

    Args:
        folder: For the event files.
        first_step: Steps done before this process.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step + 1)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project, online where a key is set, else offline for ``wandb sync``.

    A resumed run goes on under the id that the run folder holds. WANDB_MODE has the last word.

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
                config=asdict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, ValueError) as error:  # pydantic's are ValueErrors
            reason = str(error).strip().splitlines()[-1]
            what = f"wandb cannot start ({reason})"
            remedy = "Set WANDB_MODE=offline, or logging.wandb_project to null"
            raise ConfigError("logging.wandb_project", what, remedy) from error

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _has_key() -> bool:
    """Whether wandb could log in without asking: it looks at the same two places."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
