"""A line about what takes long: only then, once, and whenever it begins."""

import importlib
import logging
import sys
import time
from pathlib import Path

import pytest

from megatron_chameleon import announce
from megatron_chameleon.cli.main import main


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that takes half a second to import."""
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.5)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slow_to_import", raising=False)
    monkeypatch.setattr(announce, "IMPORT_SECONDS", 0.1)
    monkeypatch.setattr(announce, "_WATCH_SECONDS", 0.02)
    return "slow_to_import"


@pytest.mark.parametrize("seconds_before", [0.0, 0.4])
def test_an_import_is_announced_whenever_it_begins(
    seconds_before: float, slow_module: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, announce.__name__), announce.announced_imports():
        time.sleep(seconds_before)  # a verb checks its arguments before it loads a library
        assert caplog.messages == []
        importlib.import_module(slow_module)
    assert caplog.messages == ["loading PyTorch and other libraries ..."]


def test_imports_in_several_parts_add_up(
    slow_module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of a verb whose first line came after seven seconds on a busy machine."""
    monkeypatch.setattr(announce, "IMPORT_SECONDS", 0.7)
    with caplog.at_level(logging.INFO, announce.__name__), announce.announced_imports():
        importlib.import_module(slow_module)
        time.sleep(0.1)
        assert caplog.messages == []
        monkeypatch.delitem(sys.modules, slow_module)
        importlib.import_module(slow_module)
    assert caplog.messages == ["loading PyTorch and other libraries ..."]


@pytest.mark.parametrize(
    ("words", "work", "line"),
    [
        (
            "preprocess a b --tokenizer {0} --output c",
            "preprocess._preprocess",
            "encode 2 inputs",
        ),
        ("annotate answer x p --output o", "annotate._answer", "ask the model"),
    ],
)
def test_the_first_line_comes_before_the_libraries(
    words: str,
    work: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "vocabulary.json").touch()

    def slow(*_: object) -> None:
        time.sleep(0.3)

    verb = importlib.import_module(f"megatron_chameleon.cli.{work.partition('.')[0]}")
    monkeypatch.setattr(verb, work.partition(".")[2], slow)
    monkeypatch.setattr(announce.announced.__wrapped__, "__defaults__", (0.05,))
    main(words.format(tmp_path).split())
    assert capsys.readouterr().err == f"preparing to {line} ...\n"


def test_other_work_and_short_imports_are_not_announced(
    slow_module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(announce, "IMPORT_SECONDS", 5.0)
    with caplog.at_level(logging.INFO, announce.__name__), announce.announced_imports():
        importlib.import_module(slow_module)
        time.sleep(0.2)
    assert caplog.messages == []


def test_a_step_is_announced_if_it_takes_long(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, announce.__name__):
        with announce.announced("counting", after_seconds=0.05):
            time.sleep(0.3)
        with announce.announced("adding", after_seconds=5):
            pass
    assert caplog.messages == ["counting ..."]
