"""Ctrl-C and SIGTERM end a command whatever it is doing, with one line and the signal's code."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from megatron_chameleon.cli import interrupts
from megatron_chameleon.cli import main as cli
from run_command import environment

LINE = "the same command starts again\n"
# Replaces the work of `chameleon VERB` and says when it has begun.
SCRIPT = """
import ctypes, os, signal, subprocess, sys, threading, time
from megatron_chameleon.cli import doctor, interrupts, main, train
interrupts.GRACE_SECONDS = 0.4
interrupts.SAME_PRESS_SECONDS = 0.1
MUTEX = ctypes.create_string_buffer(64)
def work(args):
    print("begun", flush=True)
    {work}
doctor.run = train.run = work
main.main()
"""
WORKS = {
    "in Python": "time.sleep(60)",
    "in C": "[ctypes.CDLL(None).pthread_mutex_lock(MUTEX) for _ in range(2)]",
    "in a callback that drops exceptions": """
    class Dropping:
        def __del__(self):
            time.sleep(60)
    Dropping()
    time.sleep(60)""",
    "in a library that goes on": """
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass""",
    "with a thread that does not end": """
    threading.Thread(target=time.sleep, args=(60,)).start()
    time.sleep(60)""",
    "in a clean-up that takes long": """
    try:
        time.sleep(60)
    finally:
        time.sleep(60)""",
    "and fails because of it": """
    try:
        time.sleep(60)
    except BaseException as error:
        raise RuntimeError("the pool is broken") from error""",
}


def as_in_a_terminal() -> None:
    """Where a test run in the background ignores SIGINT, its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(
    work: str, *words: str, before: Callable[[], object] = as_in_a_terminal
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(work=work), *(words or ("doctor",))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=before,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    return process


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, float]:
    """Send a signal; returns the exit code, what was printed on stderr, and the seconds."""
    begin = time.monotonic()
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    return process.returncode, errors, time.monotonic() - begin


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_ctrl_c(work: str) -> None:
    process = start(work)
    code, errors, seconds = end(process, signal.SIGINT)
    assert (code, errors) == (130, f"interrupted: {LINE}")
    assert seconds < 4


@pytest.mark.parametrize(
    ("verb", "number", "code"),
    [
        ("doctor", signal.SIGTERM, 143),
        ("doctor", signal.SIGHUP, 129),
        ("train", signal.SIGTERM, 75),
        ("train", signal.SIGUSR1, 75),
    ],
)
def test_other_signals(verb: str, number: signal.Signals, code: int) -> None:
    process = start("time.sleep(60)", *{"train": ("train", "x.yaml")}.get(verb, (verb,)))
    found, errors, _ = end(process, number)
    assert found == code
    step = "the same command resumes from the run's newest" if verb == "train" else LINE
    assert errors.startswith(f"ended by {number.name}: {step}") and errors.count("\n") == 1


def test_a_second_ctrl_c_ends_at_once() -> None:
    work = "interrupts.GRACE_SECONDS = 60\n    try: time.sleep(60)\n    finally: time.sleep(60)"
    process = start(work)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    code, errors, seconds = end(process, signal.SIGINT)
    assert (code, errors) == (130, f"interrupted: {LINE}")
    assert seconds < 4


def test_a_command_that_has_done_its_work_says_so() -> None:
    work = "\n    try: time.sleep(60)\n    except BaseException: pass"
    process = start(work)
    code, errors, _ = end(process, signal.SIGINT)
    assert (code, errors) == (130, f"interrupted: {interrupts.COMPLETE}\n")


def test_a_signal_that_the_starter_ignores_stays_ignored() -> None:
    def as_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = start("time.sleep(0.5)", before=as_nohup)
    assert end(process, signal.SIGHUP)[:2] == (0, "")


def test_a_forked_process_has_signals_of_its_own() -> None:
    work = """
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.1)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
    time.sleep(0.6)"""
    process = start(work)
    errors = process.communicate(timeout=30)[1]
    assert (process.returncode, errors) == (0, "")


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    process = start("time.sleep(60)", "train", "x.yaml")
    process.kill()
    process.communicate()
    with interrupts.interruptible(["train"], ends_process=False) as silent:
        assert silent._is_silent
    with interrupts.interruptible(["doctor"], ends_process=False) as speaking:
        assert not speaking._is_silent


def test_in_a_program_the_handlers_are_put_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(
        "megatron_chameleon.cli.doctor.run", lambda args: signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor"])
    assert caught.value.code == 130
    assert capsys.readouterr().err == f"interrupted: {LINE}"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_next_step_of_each_verb() -> None:
    assert {name.split()[0] for name in interrupts.NEXT_STEPS} <= set(cli.VERBS)
    steps = {
        ("train", "x.yaml"): "resumes from the run's newest checkpoint",
        ("train", "x.yaml", "--dry-run"): "nothing was written",
        ("preprocess", "a", "--output", "b"): "continues from what it has saved",
        ("preprocess", "--status", "--output", "b"): "starts again",
        ("annotate", "answer", "x"): "continues after the answers",
        ("annotate", "score", "x"): "starts again",
        ("plot", "x"): "starts again",
        (): "starts again",
    }
    for words, step in steps.items():
        assert step in interrupts._next_step(list(words))
