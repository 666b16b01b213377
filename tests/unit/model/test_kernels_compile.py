"""Every kernel compiles for an H100 at the sizes of the 7B, without a GPU."""

import re
import subprocess
import sys

import pytest

from megatron_chameleon.parallel import platform
from places import REPOSITORY
from run_command import environment

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
KERNELS = (
    "loss forward",
    "loss backward",
    "QK-norm and rotary forward",
    "QK-norm and rotary backward",
)


@pytest.fixture(scope="module")
def table() -> dict[str, str]:
    """Figures by variant, from a separate process, because this one uses Triton's interpreter."""
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.compile_kernels"]
    result = subprocess.run(
        words, capture_output=True, text=True, env=environment(), cwd=REPOSITORY, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr  # 1 means that a kernel spills
    return dict(line.split(": ", 1) for line in result.stdout.splitlines()[1:])


def test_no_kernel_needs_too_many_registers(table: dict[str, str]) -> None:
    assert {name.split(",")[0] for name in table} == set(KERNELS)
    for name, figures in table.items():
        registers = re.search(r"registers (\d+), spilled bytes 0,", figures)
        assert registers is not None, name
        assert int(registers[1]) <= 128, name


def test_at_the_real_sizes_loads_are_16_bytes_wide(table: dict[str, str]) -> None:
    """And a multiprocessor holds enough threads to hide the latency of memory."""
    for name, figures in table.items():
        if "odd" in name:
            continue
        assert "x 128" in figures.split("loads")[1].split(",")[0], name
        assert int(figures.rsplit(" ", 1)[1]) >= (1024 if "loss" in name else 512), name


def test_the_largest_logit_keeps_nan(table: dict[str, str]) -> None:
    """Only compiled code can show this, because the interpreter always keeps NaN."""
    for name, figures in table.items():
        maxima = int(re.findall(r"maxima that keep NaN (\d+)", figures)[0])
        assert (maxima > 0) == name.startswith("loss forward"), name


def test_every_choice_of_constants_is_timed() -> None:
    """A tiny run for each choice; without a GPU it uses the interpreter."""
    from benchmarks.gpu.kernels.kernel_shapes import CHOICES, sweep

    lines = list(sweep(platform.device(), tiny=True))
    assert [line.split(":")[0] for line in lines] == list(CHOICES)
    assert all("GB/s" in line for line in lines)
