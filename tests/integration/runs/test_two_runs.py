"""Two runs with one run folder: all ranks of the second are refused, the first is unharmed."""

import signal
import socket
import subprocess
import time

from run_command import TIMEOUT_SECONDS, command, environment

LONG = ("training.steps=100000", "checkpoint.every_steps=5")


def start(tiny, *overrides: str, processes: int = 1) -> subprocess.Popen[str]:
    """``chameleon train`` into FOLDER/shared."""
    words = ("train", tiny.config, f"logging.run_dir={tiny.folder / 'shared'}", *overrides)
    return subprocess.Popen(
        command(*words, processes=processes),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(tiny, process: subprocess.Popen[str], count: int) -> None:
    """Wait until this many steps are written; the run must still be alive."""
    path = tiny.folder / "shared" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_run_is_refused_and_a_killed_one_is_not_in_the_way(tiny) -> None:
    first = start(tiny, *LONG)
    wait_for_steps(tiny, first, 6)
    second = start(tiny, *LONG, processes=2)
    error = second.communicate(timeout=TIMEOUT_SECONDS)[1]
    assert f"shared: another run (host {socket.gethostname()}, pid {first.pid}, since" in error
    assert error.count("error: ") == 1 and error.count("Traceback") == 1  # torchrun's own
    assert "exitcode  : 2 (pid" in error and "exitcode  : 1 (pid" not in error

    wait_for_steps(tiny, first, len(tiny.metrics("shared")) + 6)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = len(tiny.metrics("shared"))
    last = f"training.steps={done + 1}"
    third = start(tiny, last, "checkpoint.every_steps=0")
    assert third.communicate(timeout=TIMEOUT_SECONDS)[1] is not None
    assert third.returncode == 0
    steps = [record["step"] for record in tiny.metrics("shared")]
    assert steps == list(range(1, done + 2))
