"""How much memory this machine has, and an error for what cannot fit into it."""

import os
import resource
from pathlib import Path

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.wording import format_bytes

MARGIN = 0.8
"""Only what would not fit even if an estimate were a fifth too high is refused."""


def machine_memory() -> int:
    """Bytes that the processes of this machine may use: RAM and swap, or this container's limit."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _swap()
    limits = [_number(path) for path in _CGROUP_LIMITS]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    return min([found, *(limit for limit in limits if limit)])


def too_large(
    where: str, needed: float, has: float, remedy: str, place: str = "this machine"
) -> ConfigError | None:
    """The error to raise for what needs more memory than there is; None if it may fit.

    Args:
        where: The key or option to change.
        needed: An estimate, in bytes.
        has: What ``place`` has, in bytes.
        remedy: What to do.
        place: What the error calls it.
    """
    if needed * MARGIN <= has:
        return None
    what = f"needs about {format_bytes(needed)} of memory, and {place} has {format_bytes(has)}"
    return ConfigError(where, what, remedy)


_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none, as for "max"."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdecimal() else None


def _swap() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return 0
    sizes = [line.split()[1] for line in lines if line.startswith("SwapTotal:")]
    return int(sizes[0]) * 1024 if sizes else 0
