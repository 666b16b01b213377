"""The run folder: config, command, environment, metrics, alarms and ``checkpoints/``.

Only rank 0 writes to it. The metrics of a step are one line, written when the step is done. A run
that resumes after step k first drops the lines of later steps, which it will do again, and a last
line that a crash cut off. ``lock.py`` keeps a second run from writing at the same time.
"""

import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from megatron_chameleon import __version__
from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.files import open_to_append, writing
from megatron_chameleon.masking import masked_command, masked_values

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
    """Check, without writing, that the folder exists or can be created.

    Raises:
        ConfigError: A file is in the way, or its parent folder is not writable.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir():
        what = f"{path} is a file"
    elif not os.access(path, os.W_OK):
        what = f"{path} is not writable"
    else:
        return
    raise ConfigError("logging.run_dir", what, "Choose another folder")


class RunFolder:
    """Writes the files of a run.

    Args:
        config: The resolved config.
        steps_done: Steps that earlier processes of the run have done; metrics of later steps are
            dropped.

    Attributes:
        history: Step, output norm and loss of each earlier step.
    """

    def __init__(self, config: Config, steps_done: int) -> None:
        self.path = Path(config.logging.run_dir)
        for name in ("logs", "checkpoints", "samples"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        save_config(config, self.path / "config.yaml")
        _append_command(self.path / "command.txt")
        environment = json.dumps(_environment(), indent=1)
        (self.path / "environment.json").write_text(environment + "\n", encoding="utf-8")
        lines, self.history = _kept_metrics(self.path / "metrics.jsonl", steps_done)
        self._metrics = _reopen(self.path / "metrics.jsonl", lines)
        self._alarms = _reopen(self.path / "alarms.jsonl", [])

    def write_metrics(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Append the line of a step: the keys of ``METRICS``, then all others.

        Returns:
            The line, in which missing values and those that are not finite are None.
        """
        record = _finite({**dict.fromkeys(METRICS), **values})
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        return record

    def write_alarms(self, alarms: Sequence[Mapping[str, Any]]) -> None:
        """Append to ``alarms.jsonl``, which each process starts afresh."""
        for alarm in alarms:
            self._alarms.write(json.dumps(_finite(dict(alarm))) + "\n")
        self._alarms.flush()

    def close(self) -> None:
        self._metrics.close()
        self._alarms.close()


def _append_command(path: Path) -> None:
    """Note this process's command. Only the owner may read it, because it may hold a secret."""
    with writing(path), open_to_append(path, private=True) as file:
        os.fchmod(file.fileno(), 0o600)  # an older version created it for everybody
        file.write(f"{masked_command(sys.argv)}\n".encode("utf-8", "backslashreplace"))


def _kept_metrics(path: Path, steps_done: int) -> tuple[list[str], list[HistoryEntry]]:
    """The whole lines of the first ``steps_done`` steps, and what the alarm needs from them."""
    kept: list[str] = []
    history: list[HistoryEntry] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # a crash cut it off
            what = "the line is not a JSON object with a step"
            raise DataError(f"{path}:{number}", what, "Fix or remove that line") from error
        if step <= steps_done:
            kept.append(line + "\n")
            history.append((step, record.get("output_norm"), record.get("loss")))
    return kept, history


def _reopen(path: Path, lines: Sequence[str]) -> TextIO:
    """Reduce a file to these lines, and open it to append."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)
    return path.open("a", encoding="utf-8")


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
