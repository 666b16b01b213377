"""``chameleon status``: what it prints, and how it watches."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_chameleon.cli import status as verb
from megatron_chameleon.cli.main import main
from run_command import environment


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5}\n')
    return tmp_path


def test_screens_and_objects(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", str(runs)])
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("one: ") and second.startswith("two: ")
    assert "loss        2.5000 (text -, image -)" in first
    main(["status", str(runs / "two"), str(runs / "one"), "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [status["name"] for status in found] == ["two", "one"]
    assert found[0]["loss"]["all"] == 2.5 and found[0]["steps"] is None


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "error: RUN: no run is given. Give a run folder, such as runs/default.\n"),
        (["--watch"], "error: RUN: no run is given. Give a run folder, such as runs/default.\n"),
        (["RUNS/none"], "error: RUNS/none: no such run folder. Check the path.\n"),
        (["RUNS/one", "RUNS/none"], "error: RUNS/none: no such run folder. Check the path.\n"),
        (["RUNS", "--watch", "0"], "error: --watch: '0' is not a number between 0.1 and 86,400."),
        (["RUNS", "--watch", "nan"], "error: --watch: 'nan' is not a number between 0.1 and"),
    ],
)
def test_what_cannot_be_shown(
    words: list[str], error: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["status", *(word.replace("RUNS", str(runs)) for word in words)])
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.startswith(error.replace("RUNS", str(runs)))
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("words", [["RUN", "--watch"], ["--watch", "RUN"], ["--watch", "5", "RUN"]])
def test_watching(
    words: list[str],
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        (runs / "three").mkdir(exist_ok=True)
        (runs / "three" / "metrics.jsonl").write_text("")
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(verb.time, "sleep", sleep)
    with pytest.raises(SystemExit) as end:
        main(["status", *(word.replace("RUN", str(runs)) for word in words)])
    assert end.value.code == 130 and slept == [5.0, 5.0]
    printed = capsys.readouterr()
    assert printed.err == "interrupted: the runs go on, and the same command shows them again\n"
    names = [line.split()[1] for line in printed.out.splitlines()]
    assert names == ["one:", "two:", "one:", "two:", "three:"]


def test_a_terminal_is_redrawn(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal:
        def __init__(self, columns: int, lines: int) -> None:
            self.size = columns, lines

        def get_terminal_size(self) -> tuple[int, int]:
            return self.size

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(verb.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    for rows, expected in ((50, 20), (15, 2), (3, 2)):
        monkeypatch.setattr(verb, "shutil", Terminal(60, rows))
        with pytest.raises(SystemExit):
            main(["status", str(runs), "--watch"])
        out = capsys.readouterr().out
        assert out.startswith("\x1b[H") and out.endswith("\x1b[J")
        lines = out.removeprefix("\x1b[H").removesuffix("\x1b[J").splitlines()
        assert all(line.endswith("\x1b[K") and len(line) <= 63 for line in lines)
        assert len(lines) < rows and abs(len(lines) - expected) <= 4
    assert lines[-1].startswith("... 1 more run") or len(lines) == 2


def test_torch_is_not_imported(runs: Path) -> None:
    program = (
        "import sys; from megatron_chameleon.cli.main import main\n"
        "main(['status', sys.argv[1]])\n"
        "assert not {'torch', 'megatron.core'} & sys.modules.keys()"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", program, str(runs)], check=True, env=environment())
    assert time.monotonic() - start < 30
