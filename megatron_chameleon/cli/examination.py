"""What ``chameleon doctor`` looks at: one row per check, in three groups.

demo      the demo, small models, and preparing data: needs no GPU
gpus      training models of the paper's sizes
clusters  jobs of many machines
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_chameleon.errors import first_line
from megatron_chameleon.machine import machine_memory

GIB = 1024**3
TRAINING_GIB_7B = 125
"""The 7B with bf16 gradients and no recompute: 16 bytes per parameter, plus activations."""
OK, WARN, MISSING = "ok", "warn", "missing"
DEMO, GPUS, CLUSTERS = "demo", "gpus", "clusters"
GROUPS = {
    DEMO: "The demo, small models and preparing data",
    GPUS: "Training on GPUs",
    CLUSTERS: "Jobs on clusters",
}
DISTRIBUTION = "megatron-chameleon"
INSTALL_TORCH = "pip install torch==2.13.0"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
"""The versions that the tests ran with; a wheel does not have the file."""


@dataclass(frozen=True)
class Check:
    """One row of a table."""

    name: str
    status: str
    """ok, warn (works with limitations) or missing."""
    found: str
    purpose: str
    remedy: str = ""
    group: str = DEMO
    required: bool = False
    """Whether even training on a CPU needs it."""


def examine() -> Iterator[Check]:
    """All checks, in the order of the tables."""
    yield _python()
    yield from _torch()
    yield from _machine()
    yield from _packages()
    yield _command()
    yield from _gpu_packages()
    yield from _cluster()


def _python() -> Check:
    supported = sys.version_info >= (3, 11)
    status = OK if supported else MISSING
    return Check(
        "Python", status, platform.python_version(), "everything", "Use 3.11", required=True
    )


def _torch() -> Iterator[Check]:
    purpose = "everything that computes"
    try:
        import torch
    except Exception as error:  # a library of it is missing, or of another version
        is_there = _importable("torch")
        found = f"cannot be loaded: {first_line(error)[:100]}" if is_there else "-"
        remedy = "pip install --force-reinstall 'torch>=2.11'" if is_there else INSTALL_TORCH
        yield Check("torch", MISSING, found, purpose, remedy, DEMO, True)
        yield Check("gloo", MISSING, "-", "needs torch", "Install torch first", DEMO, True)
        for name in ("GPU", "GPU memory", "FP8", "NCCL"):
            yield Check(name, MISSING, "-", "needs torch", "Install torch first", GPUS)
        return

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Check("torch", OK, f"{torch.__version__} ({build})", purpose, required=True)
    yield from _gpu()
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    yield Check(
        "NCCL", OK if nccl else MISSING, _yes(nccl), "several GPUs", "Use a CUDA build", GPUS
    )
    status = OK if gloo else MISSING
    yield Check(
        "gloo", status, _yes(gloo), "training on CPUs", "Use torch from PyPI", required=True
    )


def _gpu() -> Iterator[Check]:
    import torch

    memory_purpose = f"7B training needs {TRAINING_GIB_7B} GiB in total"
    if not torch.cuda.is_available():
        why = "Use a machine with a GPU" if torch.version.cuda else "Install a CUDA build of torch"
        yield Check("GPU", MISSING, "none", "training beyond the demo", why, GPUS)
        yield Check("GPU memory", MISSING, "0 GiB", memory_purpose, "Use GPUs", GPUS)
        yield Check(
            "FP8", MISSING, "-", "faster matrix products", "Needs compute capability 8.9", GPUS
        )
        return
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    first = devices[0]
    names = f"{len(devices)} x {first.name} (capability {first.major}.{first.minor}{_driver()})"
    bf16 = torch.cuda.is_bf16_supported()
    status = OK if bf16 else WARN
    yield Check("GPU", status, names, "bf16 training", "bf16 needs compute capability 8.0", GPUS)
    memory_gib = sum(device.total_memory for device in devices) / GIB
    status = OK if memory_gib >= TRAINING_GIB_7B else MISSING
    yield Check(
        "GPU memory", status, f"{memory_gib:.0f} GiB", memory_purpose, "Use more GPUs", GPUS
    )
    fp8 = (first.major, first.minor) >= (8, 9)
    found = "yes" if fp8 else f"capability {first.major}.{first.minor}"
    yield Check(
        "FP8", OK if fp8 else WARN, found, "faster matrix products", "Needs 8.9 or higher", GPUS
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f", driver {output.stdout.splitlines()[0].strip()}" if output.stdout.strip() else ""


def _machine() -> Iterator[Check]:
    cores, quota = len(os.sched_getaffinity(0)), _cpu_quota()
    found = f"{cores}, of which this container may use {quota:g}" if quota else str(cores)
    yield Check("CPU cores", OK if (quota or cores) >= 2 else WARN, found, "the demo takes 2", MORE)
    yield from _instructions()
    memory_gib = machine_memory() / GIB
    status = OK if memory_gib >= 4 else WARN if memory_gib >= 2 else MISSING
    found = f"{memory_gib:.0f} GiB" if memory_gib >= 10 else f"{memory_gib:.1f} GiB"
    yield Check("Memory", status, found, "the demo needs 4 GiB", MORE, required=True)
    free_gib = shutil.disk_usage(Path.cwd()).free / GIB
    status = OK if free_gib >= 2 else WARN if free_gib >= 0.5 else MISSING
    found = f"{free_gib:.1f} GiB free here"
    purpose = "the demo writes 0.3 GiB; a 7B checkpoint about 90"
    yield Check("Disk", status, found, purpose, "Free some space", required=True)
    shm = Path("/dev/shm")
    shm_gib = shutil.disk_usage(shm).free / GIB if shm.is_dir() else 0.0
    status, found = (OK if shm_gib >= 0.05 else WARN), f"{shm_gib:.1f} GiB free"
    yield Check("/dev/shm", status, found, "data loaders, NCCL", "docker run --shm-size=8g")
    threads = os.environ.get("OMP_NUM_THREADS")
    found = threads or "not set; a command then takes all cores"
    yield Check("OMP_NUM_THREADS", OK, found, "threads per process")


MORE = "Use a larger machine, or give the container more"


def _cpu_quota() -> float | None:
    """The number of cores that a container's limit amounts to; None without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _instructions() -> Iterator[Check]:
    """What torch found out about the CPU. Without AVX2 it computes several times as slowly."""
    torch = sys.modules.get("torch")
    if torch is None or platform.machine() not in ("x86_64", "AMD64"):
        return
    found = torch.backends.cpu.get_cpu_capability()
    slow = found in ("DEFAULT", "NO AVX")
    name, purpose = ("none that torch uses" if slow else found), "the speed of torch on the CPU"
    remedy = "Use a CPU, or a virtual machine's CPU type, with AVX2"
    yield Check("CPU instructions", WARN if slow else OK, name, purpose, remedy)


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
    yield from _requirements({"torch", "megatron-core", *required})


def _requirements(named: set[str]) -> Iterator[Check]:
    """Whether all packages that are required are here, in versions that fit.

    Args:
        named: Packages with a row of their own.
    """
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        remedy = f"pip install {DISTRIBUTION}, or -e . in a clone"
        yield Check("Installation", WARN, "not installed, runs from a folder", "versions", remedy)
        return
    wrong, right, tested = [], 0, _tested_versions()
    others = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            needed = f"{requirement.name}{requirement.specifier}"
            has_row = requirement.name in named and version is None
            if not has_row and requirement.name != "megatron-core":  # which has one for both
                wrong.append((needed, f"{requirement.name} {version or 'is missing'}"))
            continue
        right += 1
        wanted = tested.get(requirement.name)
        if wanted is not None and version.split("+")[0] != wanted:
            others.append(f"{requirement.name} {version} (tested: {wanted})")
    purpose = "what the package requires"
    if wrong:
        remedy = "pip install " + " ".join(f"'{needed}'" for needed, _ in wrong)
        found = ", ".join(found for _, found in wrong)
        yield Check("Requirements", MISSING, found, purpose, remedy, required=True)
    else:
        yield Check("Requirements", OK, f"all {right} fit", purpose)
    if others:
        remedy = "If something fails: pip install -c constraints.txt -e ."
        yield Check("Tested versions", WARN, ", ".join(others), "the versions of our tests", remedy)


def _tested_versions() -> dict[str, str]:
    try:
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    found = (re.fullmatch(r"([\w.-]+)==([^\s;]+).*", line) for line in lines)
    return {match[1].replace("_", "-"): match[2] for match in found if match}


def _command() -> Check:
    """Whether a shell finds ``chameleon``, and this one."""
    purpose = "typing `chameleon`"
    found = shutil.which("chameleon")
    folders = _script_folders()
    there = next((folder for folder in folders if (folder / "chameleon").is_file()), None)
    activate = (there or folders[0]) / "activate"
    remedy = f'export PATH="{there or folders[0]}:$PATH"'
    remedy = f"source {activate}" if activate.is_file() else remedy
    if found is None:
        what = f"not on the PATH, but in {there}" if there else "not on the PATH"
        remedy = remedy if there else f"python -m pip install {DISTRIBUTION}, or -e . in a clone"
        return Check("Command", WARN, what, purpose, remedy)
    if Path(found).parent.resolve() not in [folder.resolve() for folder in folders]:
        what = f"{found}, of another environment than {sys.executable}"
        return Check("Command", WARN, what, purpose, remedy)
    return Check("Command", OK, found, purpose)


def _script_folders() -> list[Path]:
    """Where pip puts the commands of this Python, the likeliest place first.

    Debian's Python in /usr/bin puts them into /usr/local/bin, and ``pip install --user`` puts them
    below the home folder.
    """
    folders = [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]
    if site.ENABLE_USER_SITE:  # not in a virtual environment
        user = sysconfig.get_preferred_scheme("user")
        folders.append(Path(sysconfig.get_path("scripts", user)))
    return folders


def _gpu_packages() -> Iterator[Check]:
    yield _package("transformer-engine", "FP8", "pip install transformer-engine[pytorch]", GPUS)
    yield _apex()
    yield _package("flash-attn", "attention on GPUs", "pip install flash-attn", GPUS)
    yield _package("deepspeed", "ZeRO, as a second engine", "pip install deepspeed", GPUS)


def _package(
    name: str, purpose: str, remedy: str, group: str = DEMO, required: bool = False
) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, MISSING, "-", purpose, remedy, group, required)
    module = _MODULES.get(name, name)
    if required and not _importable(module):
        what = f"{version}, but its files are missing"
        remedy = f"pip install --force-reinstall --no-deps {name}"
        return Check(name, MISSING, what, purpose, remedy, group, required)
    return Check(name, OK, version, purpose, remedy, group, required)


_MODULES = {"megatron-core": "megatron.core"}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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
        return Check("apex", MISSING, "-", purpose, build, GPUS)
    if not _importable("apex.optimizers"):
        what = "a different project of that name"
        return Check("apex", WARN, what, purpose, f"pip uninstall apex. {build}", GPUS)
    return Check("apex", OK, "NVIDIA's", purpose, group=GPUS)


def _cluster() -> Iterator[Check]:
    for command, purpose in (("sbatch", "submitting jobs"), ("scontrol", "requeueing jobs")):
        path = shutil.which(command)
        status, remedy = (OK if path else MISSING), "Log in to a SLURM cluster"
        yield Check(f"SLURM {command}", status, path or "-", purpose, remedy, CLUSTERS)
    yield _package("mpi4py", "starting with mpiexec", "pip install mpi4py mpich", CLUSTERS)


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _yes(value: bool) -> str:
    return "yes" if value else "no"
