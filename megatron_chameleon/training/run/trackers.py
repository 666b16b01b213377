"""Send the metrics of ``metrics.jsonl`` to TensorBoard and Weights & Biases too.

Both packages are optional, and imported only if the config asks for them.
"""

import importlib.util
import io
import logging
import netrc
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError, TrainingError
from megatron_chameleon.files import make_folder, read_text, write_text
from megatron_chameleon.masking import masked_values
from megatron_chameleon.training.records.growing_file import GrowingFile

logger = logging.getLogger(__name__)

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


def open_trackers(
    config: Config, steps_done: int, past: Iterable[Mapping[str, Any]] = ()
) -> list[Tracker]:
    """Open the trackers that a config asks for. Only rank 0 calls it.

    Args:
        config: Checked by ``check_trackers``.
        steps_done: Steps that earlier processes of the run have done.
        past: The metrics of these steps, which a new run of Weights & Biases gets again.

    Raises:
        ConfigError: Weights & Biases cannot start.
        TrainingError: The file system refuses a file.
    """
    found: list[Tracker] = []
    if config.logging.tensorboard:
        found.append(TensorBoard(Path(config.logging.run_dir) / "tensorboard", steps_done))
    if config.logging.wandb_project is not None:
        found.append(WeightsAndBiases(config, past))
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

    TensorBoard's own writer has a thread, which ends with a traceback when the disk is full.

    Args:
        folder: Where the event files go.
        steps_done: Steps that earlier processes of the run have done.

    Raises:
        TrainingError: The file system refuses the file.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        make_folder(folder, TrainingError)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}"
        self._file = GrowingFile(folder / f"{name}.{os.getpid()}.{time.time_ns()}")
        self._format: Any = RecordWriter
        self._append(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(self._event(wall_time=time.time(), step=steps_done + 1, session_log=start))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        numbers = [self._summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        summary = self._summary(value=numbers)
        self._append(self._event(wall_time=time.time(), step=step, summary=summary))

    def _append(self, event: Any) -> None:
        record = io.BytesIO()
        self._format(record).write(event.SerializeToString())
        self._file.append(record.getvalue())

    def close(self) -> None:
        self._file.close()


class WeightsAndBiases:
    """Writes to a run of the project: online if an API key is set, otherwise for ``wandb sync``.

    A resumed run continues under the id in the run folder. WANDB_MODE overrides the mode. Offline,
    each process writes a run of its own, which gets the metrics of earlier steps again: the last
    one, ``wandb/latest-run``, is the whole run. So does a run under a new id.

    Args:
        config: ``logging.wandb_project`` and the run folder are read; all of it is shown.
        past: The metrics of the steps that earlier processes have done.

    Raises:
        ConfigError: It cannot start.
        TrainingError: The file system refuses the file with its id.
    """

    def __init__(self, config: Config, past: Iterable[Mapping[str, Any]] = ()) -> None:
        import wandb

        folder = Path(config.logging.run_dir)
        own_id, is_new = _find_id(folder / WANDB_ID_FILE)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        try:
            self._run: Any = wandb.init(
                project=config.logging.wandb_project,
                name=folder.resolve().name,
                id=own_id,
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
        if is_new or mode == "offline":
            for metrics in past:
                self.record(metrics["step"], dict(flat_numbers(metrics)))
        if mode == "offline":
            logger.info(
                "Weights & Biases is offline: `wandb sync %s` sends the whole run", _latest(folder)
            )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _find_id(file: Path) -> tuple[str, bool]:
    """The id of the run at Weights & Biases, and whether it is a new one."""
    known = read_text(file, TrainingError).strip() if file.is_file() else ""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):
        return known, False
    own_id = uuid.uuid4().hex[:12]
    write_text(file, own_id + "\n", TrainingError)
    return own_id, True


def _latest(folder: Path) -> Path:
    """The link to the run that wandb wrote last."""
    return folder / "wandb" / "latest-run"


def _has_key() -> bool:
    """Whether wandb could log in without asking. It looks in the same two places."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
