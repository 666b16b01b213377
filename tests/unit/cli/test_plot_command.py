"""``chameleon plot``: files and errors."""

import json
from pathlib import Path

import pytest

from megatron_chameleon.cli.main import main
from megatron_chameleon.cli.plot import KEYS
from megatron_chameleon.evaluation.curves import DEFAULT_KEYS


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "one"
    folder.mkdir()
    records = [dict.fromkeys(DEFAULT_KEYS, 1.0 / step) | {"step": step} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_picture_is_written(
    run_folder: Path, suffix: str, start: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run_folder / "figures" / f"curves{suffix}"
    main(["plot", str(run_folder), str(run_folder / "metrics.jsonl"), "--output", str(output)])
    assert output.read_bytes().startswith(start)
    assert list(output.parent.iterdir()) == [output]
    assert "4 panels" in capsys.readouterr().out


def test_two_runs_of_one_name_are_told_apart(run_folder: Path, tmp_path: Path) -> None:
    from megatron_chameleon.cli.plot import _names

    assert _names([str(run_folder), str(tmp_path / "two")]) == ["one", "two"]
    first, second = _names([str(run_folder), str(tmp_path / "other/one")])
    assert first != second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "x.pdf"], "x.pdf: the suffix is '.pdf'. Use .png or .svg."),
        (
            ["--output", "x.png", "--smooth", "0"],
            "--smooth: '0' is not a whole number between 1 and",
        ),
        (["--output", "x.png", "--keys", ","], "--keys: no key is given."),
        (["--output", "x.png", "--keys", "lr"], "--keys lr: no run has a value for it."),
    ],
)
def test_mistakes_are_one_line(
    run_folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plot", str(run_folder), *words])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_the_default_keys_are_the_librarys() -> None:
    assert KEYS.split(",") == list(DEFAULT_KEYS)
