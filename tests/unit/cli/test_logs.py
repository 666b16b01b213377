"""Log lines of the library on the console: which stream, which level, which words."""

import logging
import re
import sys

import pytest

from megatron_chameleon.cli import logs
from megatron_chameleon.cli import main as cli
from places import REPOSITORY

library = logging.getLogger("megatron_chameleon.data.preprocess")


@pytest.fixture
def logging_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    """``chameleon doctor`` and ``chameleon data audit``, but all they do is log."""

    def run(args: object) -> None:
        library.debug("detail")
        library.info("32 documents")
        library.warning("disk is nearly full")
        library.error("stacks of all ranks")
        logs.progress("1/2 answers")
        logging.getLogger("another.library").warning("chatter")
        print("result")

    monkeypatch.setattr("megatron_chameleon.cli.doctor.run", run)
    monkeypatch.setattr("megatron_chameleon.cli.data.run", run)


@pytest.mark.parametrize(
    ("words", "out", "err"),
    [
        ((), "32 documents\nresult\n", "1/2 answers\n"),
        (("--verbose",), "detail\n32 documents\nresult\n", "1/2 answers\n"),
        (("--quiet",), "result\n", ""),
    ],
)
@pytest.mark.usefixtures("logging_verb")
def test_levels_and_streams(
    words: tuple[str, ...], out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["doctor", *words])
    printed = capsys.readouterr()
    assert printed.out == out
    assert printed.err == f"warning: disk is nearly full\nstacks of all ranks\n{err}"


@pytest.mark.parametrize(
    "words",
    [
        ("data", "--quiet", "audit", "x.yaml", "--step", "1"),
        ("data", "audit", "x.yaml", "--step", "1", "--quiet"),
    ],
)
@pytest.mark.usefixtures("logging_verb")
def test_an_action_takes_the_options_before_and_after_its_name(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main([*words])
    assert capsys.readouterr().out == "result\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_the_common_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    usage = capsys.readouterr().out
    for option in ("--debug", "--verbose", "--quiet"):
        assert option in usage


def test_verbose_and_quiet_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--verbose", "--quiet"])
    assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_line_is_printed_once_when_the_root_logger_prints_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = logging.getLogger()
    handler = logging.StreamHandler()
    root.addHandler(handler)
    try:
        with logs.shown_logs():
            library.warning("once")
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr().err == "warning: once\n"


def test_nothing_of_the_handler_is_left_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    package = logging.getLogger(logs.PACKAGE)
    before = package.level, package.propagate, list(package.handlers)
    with pytest.raises(KeyboardInterrupt), logs.shown_logs(logging.DEBUG):
        assert library.isEnabledFor(logging.DEBUG)
        raise KeyboardInterrupt
    assert (package.level, package.propagate, list(package.handlers)) == before
    library.warning("seen by the caller's own handlers")
    assert "seen by" in caplog.text


HOSTILE = "doc\x1b]0;owned\x07\x9b2J\u202egpj\rerror: x"
ESCAPED = r"doc\x1b]0;owned\x07\x9b2J\u202egpj\rerror: x"


def test_control_characters_are_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.shown_logs():
        library.info(HOSTILE + "\nerror: forged")
        library.warning(HOSTILE)
    logs.show(f"{HOSTILE}\n\t{HOSTILE}")
    logs.show_error(f"{HOSTILE}\nerror: forged")
    printed = capsys.readouterr()
    assert printed.out == f"{ESCAPED}\\nerror: forged\n{ESCAPED}\n\t{ESCAPED}\n"
    assert printed.err == f"warning: {ESCAPED}\nerror: {ESCAPED}\\nerror: forged\n"


def test_generated_text_is_escaped_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.show_generated(HOSTILE)
    assert capsys.readouterr().out == f"{HOSTILE}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    logs.show_generated(HOSTILE)
    assert capsys.readouterr().out == f"{ESCAPED}\n"


def test_secrets_are_masked(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.shown_logs():
        library.info("reading https://me:pw@host/a.jsonl")
    logs.show_error("s3://key:secret@bucket/a: no such file. Check HF_TOKEN=hf_abc")
    printed = capsys.readouterr()
    assert printed.out == "reading https://***@host/a.jsonl\n"
    assert printed.err == "error: s3://***@bucket/a: no such file. Check HF_TOKEN=***\n"


def test_verbs_print_through_show() -> None:
    """``print`` would send what a file says to the terminal as it is."""
    folder = REPOSITORY / "megatron_chameleon" / "cli"
    own = {"logs.py", "main.py", "interrupts.py", "bugs.py", "console.py"}
    printing = {
        path.name
        for path in folder.glob("*.py")
        if re.search(r"(?m)^\s+print\(", path.read_text(encoding="utf-8"))
    }
    assert printing <= own
