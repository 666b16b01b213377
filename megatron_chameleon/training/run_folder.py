"""The run folder: config, command, environment, ``metrics.jsonl`` and ``checkpoints/``.

Only rank 0 writes it. A step's metrics are one line, written when the step is done; a run that
resumes at step k first drops the lines of steps after k, which it will do again, and a last line
that a crash cut off.
"""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TextIO

from megatron_chameleon import __version__
from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError, DataError

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
    """Where the run's checkpoints lie."""
    return Path(config.logging.run_dir) / "checkpoints"


def check_run_folder(path: Path) -> None:
    """See, without writing, that the folder is there or can be made.

    Raises:
        ConfigError: A file is in the way, or the place is not writable.
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
        first_step: Steps done before this process; the metrics of later steps are dropped.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        self.path = Path(config.logging.run_dir)
        for name in ("logs", "checkpoints", "samples"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        save_config(config, self.path / "config.yaml")
        with (self.path / "command.txt").open("a", encoding="utf-8") as file:
            file.write(shlex.join(sys.argv) + "\n")
        environment = json.dumps(_environment(), indent=1)
        (self.path / "environment.json").write_text(environment + "\n", encoding="utf-8")
        self._metrics = _open_metrics(self.path / "metrics.jsonl", first_step)

    def write_metrics(self, values: Mapping[str, float | int | None]) -> None:
        """Append one step's line; a missing value is null."""
        record = {name: values.get(name) for name in METRICS}
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        self._metrics.close()


def _open_metrics(path: Path, first_step: int) -> TextIO:
    """Keep the whole lines up to ``first_step`` and open the file for more."""
    kept = []
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break  # a crash cut it off
                what = "not a line of metrics"
                raise DataError(f"{path}:{number}", what, "Mend or remove that line") from error
            if step <= first_step:
                kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
    return path.open("a", encoding="utf-8")


def _environment() -> dict[str, object]:
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
            for name, value in os.environ.items()
            if name in ("WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
            or name.startswith(("SLURM_JOB", "SLURM_N"))
        },
    }
