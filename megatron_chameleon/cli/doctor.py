"""``chameleon doctor``: check what this machine can run, what is missing and how to fix it.

The exit code is 0 if the CPU demo can run here, and 2 otherwise.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_chameleon.cli.logs import show

GIB = 1024**3
TRAINING_GIB_7B = 125
"""The 7B with bf16 gradients and no recompute: 16 bytes per parameter, plus activations."""
OK, WARN, MISSING = "ok", "warn", "missing"


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    name: str
    status: str
    """ok, warn (works with limitations) or missing."""
    found: str
    purpose: str
    remedy: str = ""
    required: bool = False
    """Whether even training on a CPU needs it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Print the table and the verdict. Exit with 2 if not even the CPU demo can run."""
    checks = list(examine())
    cpu_problems = [check.name for check in checks if check.required and check.status == MISSING]
    gpu_problems = missing_for_7b(checks)
    verdict = {
        "cpu_demo": _verdict("CPU demo", cpu_problems),
        "training_7b": _verdict("7B training", gpu_problems),
    }
    if args.json:
        rows = [asdict(check) for check in checks]
        show(json.dumps({"checks": rows, "verdict": verdict, "cpu_ok": not cpu_problems}, indent=1))
    else:
        _print_table(checks)
        show("\n".join(verdict.values()))
    if cpu_problems:
        sys.exit(2)


def examine() -> Iterator[Check]:
    """All checks, in the order of the table."""
    yield _python()
    yield from _torch()
    yield from _machine()
    yield from _packages()
    yield from _cluster()


def missing_for_7b(checks: list[Check]) -> list[str]:
    """The reasons why this machine cannot train the 7B, according to the rows."""
    names = {"GPU": "no GPU", "GPU memory": "too little GPU memory", "NCCL": "no NCCL"}
    by_name = {check.name: check for check in checks}
    cpu = [check.name for check in checks if check.required and check.status == MISSING]
    if by_name["GPU"].status == MISSING:
        names = {"GPU": names["GPU"]}
    gpu = [words for name, words in names.items() if by_name[name].status == MISSING]
    return [f"no {name}" for name in cpu] + gpu


def _verdict(what: str, problems: list[str]) -> str:
    return f"{what}: no, because of: {', '.join(problems)}" if problems else f"{what}: yes"


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {OK: "green", WARN: "yellow", MISSING: "red"}
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for column in ("", "status", "found", "what for", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        status = Text(check.status, style=colors[check.status])
        remedy = "" if check.status == OK else check.remedy
        table.add_row(
            Text(check.name), status, Text(check.found), Text(check.purpose), Text(remedy)
        )
    # Without a terminal rich assumes 80 columns, which folds every cell to a few letters.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _python() -> Check:
    supported = sys.version_info >= (3, 11)
    status = OK if supported else MISSING
    return Check("Python", status, platform.python_version(), "everything", "Use 3.11", True)


def _torch() -> Iterator[Check]:
    purpose = "everything that computes"
    if not _importable("torch"):
        yield Check("torch", MISSING, "-", purpose, "pip install torch==2.13.0", True)
        for name in ("GPU", "GPU memory", "FP8", "NCCL", "gloo"):
            yield Check(name, MISSING, "-", "needs torch", "Install torch first", name == "gloo")
        return
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Check("torch", OK, f"{torch.__version__} ({build})", purpose, required=True)
    yield from _gpu()
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    yield Check("NCCL", OK if nccl else MISSING, _yes(nccl), "several GPUs", "Use a CUDA build")
    status = OK if gloo else MISSING
    yield Check("gloo", status, _yes(gloo), "training on CPUs", "Use torch from PyPI", True)


def _gpu() -> Iterator[Check]:
    import torch

    memory_purpose = f"7B training needs {TRAINING_GIB_7B} GiB in total"
    if not torch.cuda.is_available():
        why = "Use a machine with a GPU" if torch.version.cuda else "Install a CUDA build of torch"
        yield Check("GPU", MISSING, "none", "training beyond the demo", why)
        yield Check("GPU memory", MISSING, "0 GiB", memory_purpose, "Use GPUs")
        yield Check("FP8", MISSING, "-", "faster matrix products", "Needs compute capability 8.9")
        return
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    first = devices[0]
    names = f"{len(devices)} x {first.name} (capability {first.major}.{first.minor}{_driver()})"
    bf16 = torch.cuda.is_bf16_supported()
    status = OK if bf16 else WARN
    yield Check("GPU", status, names, "bf16 training", "bf16 needs compute capability 8.0")
    memory_gib = sum(device.total_memory for device in devices) / GIB
    status = OK if memory_gib >= TRAINING_GIB_7B else MISSING
    yield Check("GPU memory", status, f"{memory_gib:.0f} GiB", memory_purpose, "Use more GPUs")
    fp8 = (first.major, first.minor) >= (8, 9)
    found = "yes" if fp8 else f"capability {first.major}.{first.minor}"
    yield Check("FP8", OK if fp8 else WARN, found, "faster matrix products", "Needs 8.9 or higher")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f", driver {output.stdout.splitlines()[0].strip()}" if output.stdout.strip() else ""


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("CPU cores", OK, str(cores), "the demo, preprocessing")
    memory_gib = _memory_gib()
    status = OK if memory_gib >= 4 else WARN
    yield Check("Memory", status, f"{memory_gib:.0f} GiB", "the demo needs 4 GiB", "Add memory")
    free_gib = shutil.disk_usage(Path.cwd()).free / GIB
    status, found = (OK if free_gib >= 2 else WARN), f"{free_gib:.0f} GiB free here"
    yield Check("Disk", status, found, "a 7B checkpoint takes about 90 GiB", "Free some space")
    shm = Path("/dev/shm")
    shm_gib = shutil.disk_usage(shm).free / GIB if shm.is_dir() else 0.0
    status, found = (OK if shm_gib >= 0.05 else WARN), f"{shm_gib:.1f} GiB free"
    yield Check("/dev/shm", status, found, "data loaders, NCCL", "docker run --shm-size=8g")
    threads = os.environ.get("OMP_NUM_THREADS")
    remedy = "Set it to cores / processes when several processes share the CPU"
    found = threads or "not set"
    yield Check("OMP_NUM_THREADS", OK if threads else WARN, found, "threads per process", remedy)


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _packages() -> Iterator[Check]:
    yield _megatron_core()
    required = {
        "transformers": "export to Hugging Face, generation",
        "safetensors": "tokenizer and export files",
        "sentencepiece": "the text tokenizer",
        "omegaconf": "configs",
        "psutil": "saving: without it megatron-core hangs",
    }
    for name, purpose in required.items():
        yield _package(name, purpose, f"pip install {name}", required=True)
    yield _package("transformer-engine", "FP8", "pip install transformer-engine[pytorch]")
    yield _apex()
    yield _package("flash-attn", "attention on GPUs", "pip install flash-attn")
    yield _package("deepspeed", "ZeRO, as a second engine", "pip install deepspeed")
    yield _package("mpi4py", "starting with mpiexec", "pip install mpi4py mpich")


def _package(name: str, purpose: str, remedy: str, required: bool = False) -> Check:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, MISSING, "-", purpose, remedy, required)
    return Check(name, OK, version, purpose, remedy, required)


def _megatron_core() -> Check:
    name, purpose = "megatron-core", "the transformer, parallelism, checkpoints"
    found = _package(name, purpose, "pip install 'megatron-core==0.16.*'", required=True)
    if found.status == OK and not found.found.startswith("0.16."):
        what = f"{found.found}, but 0.16.x is needed"
        return Check(name, MISSING, what, purpose, found.remedy, required=True)
    return found


def _apex() -> Check:
    """NVIDIA's apex has ``apex.optimizers``; "apex" in the package index is a different project.

    megatron-core takes fused AdamW and gradient norms from Transformer Engine, or else from apex.
    """
    purpose = "fused AdamW and gradient norms, without transformer-engine"
    build = "Build NVIDIA's from github.com/NVIDIA/apex"
    if not _importable("apex"):
        return Check("apex", MISSING, "-", purpose, build)
    if not _importable("apex.optimizers"):
        what = "a different project of that name"
        return Check("apex", WARN, what, purpose, f"pip uninstall apex. {build}")
    return Check("apex", OK, "NVIDIA's", purpose)


def _cluster() -> Iterator[Check]:
    for command, purpose in (("sbatch", "submitting jobs"), ("scontrol", "requeueing jobs")):
        path = shutil.which(command)
        status, remedy = (OK if path else MISSING), "Log in to a SLURM cluster"
        yield Check(f"SLURM {command}", status, path or "-", purpose, remedy)


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _yes(value: bool) -> str:
    return "yes" if value else "no"
