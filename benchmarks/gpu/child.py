"""The work of the process that runs one part."""

import importlib
import json
import os
import platform as machine
import sys
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

# part -> module below this folder, function, and default time limit in seconds; in running order
PARTS: dict[str, tuple[str, str, int]] = {
    "ceilings": ("kernels.ceilings", "run", 60),
    "reference": ("models.parity", "run_reference", 180),
    "parity": ("models.parity", "run", 180),
    "loss": ("kernels.losses", "run", 120),
    "norm_rope": ("kernels.norm_rope", "run", 90),
    "train": ("models.train", "run_slices", 420),
    "fusions": ("models.ablation", "run", 240),
    "whole7b": ("models.train", "run_whole", 300),
    "shard34b": ("models.train", "run_shard", 300),
    "generation": ("models.generation", "run", 540),
    "images": ("models.images", "run", 300),
}
NEEDS = {"parity": "reference"}
"""part -> the part that runs before it, on the CPU."""


@dataclass(frozen=True)
class Job:
    """The settings of the process of a part; they are pickled."""

    part: str
    tiny: bool
    rows: Path
    work: Path
    ceilings: dict[str, dict[str, float | int | str]]


def run_job(job: Job) -> None:
    """Run a part. An exception outside its rows becomes a row of its own."""
    warnings.simplefilter("ignore")
    from benchmarks.gpu.common import Context, Row, explain

    context = Context(**asdict(job))
    module, function, _ = PARTS[job.part]
    try:
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(context)
    except Exception as error:
        traceback.print_exc()
        row = Row(job.part, "the whole part", "failed")
        explain(row, error)
        context.write(row)
    sys.stdout.flush()


def report_machine(path: Path) -> None:
    """Write a description of the machine. It opens the device, so it runs in its own process."""
    import torch

    found: dict[str, object] = {
        "host": f"{machine.machine()}, {os.cpu_count()} CPUs",
        "python": machine.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "device": "CPU",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
        found["cuDNN"] = torch.backends.cudnn.version()
    path.write_text(json.dumps(found), encoding="utf-8")
