"""``chameleon report`` and ``chameleon compare``: files and errors."""

from pathlib import Path

import pytest

from megatron_chameleon.cli.compare import AXES
from megatron_chameleon.cli.main import main
from synthetic_run import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", steps=60)


def test_a_report_is_written_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in run.iterdir()}
    main(["report", str(run)])
    assert {path.name for path in run.iterdir()} - before == {"report.html"}
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert f"{run}/report.html: run to step 60, " in capsys.readouterr().out
    output = run.parent / "new" / "page.html"
    main(["report", str(run / "metrics.jsonl"), "--output", str(output)])
    assert output.is_file()


def test_what_could_not_be_read_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text("[")
    main(["report", str(run)])
    assert "note: " in (out := capsys.readouterr().out) and "config.yaml" in out


def test_a_name_with_line_breaks_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(write_run(tmp_path / "a\nb\x1b[2J", steps=1))])
    assert capsys.readouterr().out.count("\n") == 1


def test_a_comparison_is_printed_and_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", steps=30, batch=16)
    page = tmp_path / "page.html"
    main(["compare", str(run), str(other), "--x", "tokens", "--output", str(page)])
    out = capsys.readouterr().out
    assert "training.global_batch_size  8    16\n" in out
    assert "tokens consumed, with padding" in page.read_text()
    main(["compare", str(run), str(other)])
    assert "lowest loss of a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "nowhere"], "nowhere: no such run folder. Check the path."),
        (["report", ""], "RUN: the name is empty. Give a run folder."),
        (["report", "RUN", "--output", "RUN/config.yaml"], "would replace RUN/config.yaml, which"),
        (["report", "RUN", "--output", "RUN"], "RUN: cannot be written (Is a directory)."),
        (["report", "RUN", "--output", ""], "--output: the name is empty."),
        (["compare", "RUN"], "compare: 1 run given. Give 2 to 30 run folders."),
        (["compare", "RUN", "nowhere"], "nowhere: no such run folder."),
        (["compare", "RUN", "RUN", "--x", "time"], "--x: invalid choice: 'time'"),
        (["compare", "RUN", "RUN", "--output", "RUN/metrics.jsonl"], "would replace RUN/metrics"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([word.replace("RUN", str(run)) for word in words])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error or message.replace("RUN", str(run)) in error


def test_the_axes_are_the_librarys() -> None:
    from megatron_chameleon.reports import comparison

    assert tuple(comparison.AXES) == AXES
