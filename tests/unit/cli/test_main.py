"""The command line: quick help, exit codes and one line for a user's mistake."""

import subprocess
import sys

import pytest

from megatron_chameleon.cli import main as cli
from megatron_chameleon.errors import ConfigError, ConfigErrors

HEAVY = ("torch", "transformers", "megatron.core", "numpy", "matplotlib")


def loaded_by(code: str) -> list[str]:
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\n"
    script += f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return eval(result.stderr)


@pytest.mark.parametrize("verb", [None, *cli.VERBS])
def test_help_imports_nothing_heavy(verb: str | None) -> None:
    words = ["--help"] if verb is None else [verb, "--help"]
    assert loaded_by(f"import megatron_chameleon.cli.main as m; m.main({words})") == []


def test_the_package_imports_nothing_heavy() -> None:
    assert loaded_by("import megatron_chameleon") == []


def run_with(error: Exception, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    def run(args: object) -> None:
        raise error

    monkeypatch.setattr("megatron_chameleon.cli.doctor.run", run)
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", *words])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(ConfigError("x.yaml", "2 is odd", "Use 3"), monkeypatch) == 2
    assert capsys.readouterr().err == "error: x.yaml: 2 is odd. Use 3.\n"


def test_several_mistakes_are_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mistakes = ConfigErrors([ConfigError("a", "b", "c"), ConfigError("d", "e", "f")])
    assert run_with(mistakes, monkeypatch) == 2
    assert capsys.readouterr().err == "error: a: b. c.\nerror: d: e. f.\n"


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(ConfigError("a", "b", "c"), monkeypatch, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_not_reported_as_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_chameleon.cli.doctor.run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_an_unknown_verb_is_refused_with_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["trian"])
    assert caught.value.code == 2
    assert "preprocess" in capsys.readouterr().err
