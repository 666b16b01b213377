"""The work of one part's process."""

import importlib
import json
import os
import platform as machine
import sys
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

# part -> module, function, and the seconds that it gets unless told otherwise. In this order.
PARTS: dict[str, tuple[str, str, int]] = {
    "ceilings": ("ceilings", "run", 60),
    "reference": ("parity", "run_reference", 180),
    "parity": ("parity", "run", 180),
    "loss": ("losses", "run", 120),
    "norm_rope": ("norm_rope", "run", 90),
    "train": ("train", "run_slices", 420),
    "fusions": ("ablation", "run", 240),
    "whole7b": ("train", "run_whole", 300),
    "shard34b": ("train", "run_shard", 300),
    "generation": ("generation", "run", 540),
    "images": ("images", "run", 300),
}
NEEDS = {"parity": "reference"}
"""What runs before a part, on the CPU."""


@dataclass(frozen=True)
class Job:
    """What a part's process is told; it is pickled."""

    part: str
    tiny: bool
    rows: Path
    work: Path
    ceilings: dict[str, dict[str, float | int | str]]


def run_job(job: Job) -> None:
    """Run a part; what it raises outside its rows becomes a row."""
    warnings.simplefilter("ignore")
    from gpu_parts.common import Context, Row, explain

    context = Context(**asdict(job))
    module, function, _ = PARTS[job.part]
    try:
        getattr(importlib.import_module(f"gpu_parts.{module}"), function)(context)
    except Exception as error:
        traceback.print_exc()
        row = Row(job.part, "the whole part", "failed")
        explain(row, error)
        context.write(row)
    sys.stdout.flush()


def report_machine(path: Path) -> None:
    """Write what the figures were measured on, in a process of its own: it opens the device."""
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
