"""The run folder: config, command, environment, metrics, alarms and ``checkpoints/``.

``records/events.py`` writes the events.

Only rank 0 writes to it. The metrics of a step are one line, written when the step is done. A run
that resumes after step k first drops the lines of later steps, which it will do again, and a last
line that a crash cut off. ``lock.py`` keeps a second run from writing at the same time.
"""

import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_chameleon import __version__
from megatron_chameleon.checkpoint.state.line import METRICS_FILE
from megatron_chameleon.config.load import format_config
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError, TrainingError
from megatron_chameleon.files import (
    cannot_write,
    make_folder,
    replace_file,
    try_to_write,
    write_text,
)
from megatron_chameleon.masking import masked_command, masked_values
from megatron_chameleon.runs.code_version import code_version
from megatron_chameleon.runs.holder import LOCK_FILE
from megatron_chameleon.runs.records import (
    ALARMS_FILE,
    COMMAND_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVENTS_FILE,
)
from megatron_chameleon.training.records.growing_file import GrowingFile, read_json_lines

FOLDERS = ("logs", "checkpoints", "samples")
REPLACED_FILES = (CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, ALARMS_FILE)
OPENED_FILES = (COMMAND_FILE, EVENTS_FILE, LOCK_FILE)

HistoryEntry = tuple[int, float | None, float | None]

METRICS = (
    "step",
    "loss",
    "loss_text",
    "loss_image",
    "z_loss",
    "grad_norm",
    "learning_rate",
    "consumed_samples",
    "consumed_tokens",
    "trained_tokens",
    "tokens_per_second",
    "mfu",
    "output_norm",
    "max_logit",
    "step_seconds",
)


def checkpoints_folder(config: Config) -> Path:
    """The folder that holds the run's checkpoints."""
    return Path(config.logging.run_dir) / "checkpoints"


def check_run_folder(path: Path) -> None:
    """Check that a run can write its folder and what is in it; nothing stays behind.

    Raises:
        ConfigError: A file is in the way, or something is not writable.
    """
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError("logging.run_dir", f"{folder} is a file", "Choose another folder")
    for name in (*REPLACED_FILES, *OPENED_FILES):
        if (path / name).is_dir():
            what = f"{path / name} is a folder, where a file of the run belongs"
            raise ConfigError("logging.run_dir", what, "Choose another folder")
    opened = [path / name for name in OPENED_FILES if os.path.lexists(path / name)]
    for place in (folder, *(path / name for name in FOLDERS if (path / name).is_dir()), *opened):
        try:
            if place in opened:
                os.close(os.open(place, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
            else:
                try_to_write(place)
        except OSError as error:
            what = f"{place} is not writable ({error.strerror})"
            remedy = cannot_write(place, error).remedy
            raise ConfigError("logging.run_dir", what, remedy) from error


class RunFolder:
    """Writes the files of a run.

    Args:
        config: The resolved config.
        steps_done: Steps that earlier processes of the run have done; metrics of later steps are
            dropped.

    Attributes:
        history: Step, output norm and loss of each earlier step.

    Raises:
        ChameleonError: The file system refuses a file, or ``metrics.jsonl`` is damaged.
    """

    def __init__(self, config: Config, steps_done: int) -> None:
        self.path = Path(config.logging.run_dir)
        for name in FOLDERS:
            make_folder(self.path / name, TrainingError)
        write_text(self.path / CONFIG_FILE, format_config(config), TrainingError)
        append_command(self.path / COMMAND_FILE)
        environment = json.dumps(_environment(), indent=1)
        write_text(self.path / ENVIRONMENT_FILE, environment + "\n", TrainingError)
        self._metrics_path = self.path / METRICS_FILE
        self.history = _keep_metrics(self._metrics_path, steps_done)
        self._metrics = GrowingFile(self._metrics_path)
        write_text(self.path / ALARMS_FILE, "", TrainingError)
        self._alarms = GrowingFile(self.path / ALARMS_FILE)

    def past_metrics(self) -> Iterator[dict[str, Any]]:
        """The metrics of each earlier step, as they were written."""
        last = self.history[-1][0] if self.history else 0
        for record, _ in read_json_lines(self._metrics_path):
            if record["step"] <= last:
                yield record

    def missing_steps(self, steps_done: int) -> str | None:
        """The earlier steps that have no metrics, in words; None if there are none.

        A run that began from a checkpoint elsewhere has none before that.
        """
        steps = [entry[0] for entry in self.history]
        gaps = [(a + 1, b - 1) for a, b in pairwise([*steps, steps_done + 1]) if b - a > 1]
        names = [f"{first} to {last}" if last > first else str(first) for first, last in gaps]
        return ", ".join(names[:4]) + (" and more" if len(names) > 4 else "") or None

    def write_metrics(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Append the line of a step: the keys of ``METRICS``, then all others.

        Returns:
            The line, in which missing values and those that are not finite are None.

        Raises:
            TrainingError: The file system refuses it.
        """
        record = _finite({**dict.fromkeys(METRICS), **values})
        self._metrics.append((json.dumps(record) + "\n").encode())
        return record

    def flush_to_disk(self) -> None:
        """Make sure that the metrics survive a crash of the machine, as checkpoints do.

        Raises:
            TrainingError: The disk refuses it.
        """
        self._metrics.flush_to_disk()

    def write_alarms(self, alarms: Sequence[Mapping[str, Any]]) -> None:
        """Append to ``alarms.jsonl``, which each process starts afresh.

        Raises:
            TrainingError: The file system refuses it.
        """
        lines = [json.dumps(_finite(dict(alarm))) + "\n" for alarm in alarms]
        self._alarms.append("".join(lines).encode())

    def close(self) -> None:
        self._metrics.close()
        self._alarms.close()


def append_command(path: Path) -> None:
    """Note this process's command. Only the owner may read it, because it may hold a secret.

    Raises:
        TrainingError: The file system refuses it.
    """
    with closing(GrowingFile(path, private=True)) as file:
        file.append(f"{masked_command(sys.argv)}\n".encode("utf-8", "backslashreplace"))


def _keep_metrics(path: Path, steps_done: int) -> list[HistoryEntry]:
    """Reduce the file to whole lines of the first ``steps_done`` steps, one per step, in order.

    Returns:
        What the alarm needs from them.
    """
    history: dict[int, HistoryEntry] = {}
    last, is_in_order = 0, True
    for record, _ in read_json_lines(path):
        if (step := record["step"]) <= steps_done:
            history[step] = (step, _number(record, "output_norm"), _number(record, "loss"))
            is_in_order &= step > last
            last = step
    lines: Iterable[tuple[int, bytes]] = (
        (record["step"], text)
        for record, text in read_json_lines(path)
        if record["step"] <= steps_done
    )
    if not is_in_order:  # somebody has edited it: the last line of a step counts
        lines = sorted(dict(lines).items())
    with replace_file(path, TrainingError) as file:
        file.writelines(text + b"\n" for _, text in lines)
    return [history[step] for step in sorted(history)]


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return value if isinstance(value, int | float) else None


def _finite(value: Any) -> Any:
    """The value with None in place of numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):  # one number per layer: six digits keep the file small
        return [None if entry is None else _finite(float(f"{entry:.6g}")) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment() -> dict[str, object]:
    """What ``environment.json`` records: versions, the machine and the launch."""
    names = ("torch", "megatron-core", "deepspeed", "transformers", "sentencepiece", "numpy")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "megatron_chameleon": __version__,
        **code_version(),
        "python": platform.python_version(),
        "packages": versions,
        "host": platform.node(),
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "launch": {
            name: value
            for name, value in masked_values(dict(os.environ)).items()
            if name in ("WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
            or name.startswith(("SLURM_JOB", "SLURM_N"))
        },
    }
