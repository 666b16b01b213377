"""``chameleon evaluate``: the files it writes, continuing after a kill, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_chameleon.cli.main import main


def evaluate(*words: object) -> None:
    main(["evaluate", *(str(word) for word in words)])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    records = [{"id": str(n), "text": f"{n} is", "answer": f"digit {n}"} for n in range(5)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = "data: items.jsonl\nmetric: contains\nmax_tokens: 4\nname: own\n"
    (tmp_path / "own.yaml").write_text(text)
    return tmp_path


def test_results_and_samples_are_written_and_kept(
    tiny_checkpoint: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: tuple[Any, ...] = (tiny_checkpoint, "--tasks", own / "own.yaml", "--output", own / "out")
    evaluate(*words, "--batch-size", 2)
    printed = capsys.readouterr()
    assert "own   contains" in printed.out and "5/5 answers" in printed.err
    results = json.loads((own / "out/results.json").read_text())
    assert results["step"] == 7 and results["tasks"]["own"]["items"] == 5
    assert set(results["versions"]) >= {"megatron_chameleon", "torch", "transformers"}
    samples = (own / "out/samples.jsonl").read_text().splitlines()
    first = json.loads(samples[0])
    assert first["prompt"] == ["0 is"] and set(first["scores"]) == {"contains"}
    page = (own / "out/results.html").read_text()
    assert "chameleon evaluate" in page and "<h3>Wrong: 5</h3>" in page and "<h3>Right: 0" in page
    assert "0.0 – 43.4" in page and page.count('class="wrong"') == 5  # Wilson's interval of 0 of 5
    answers = own / "out/answers.jsonl"
    kept = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(kept[:3]))  # killed after the first batch
    evaluate(*words, "--batch-size", 2)
    assert "found 2 answers of an earlier run" in capsys.readouterr().err
    assert answers.read_text() == "".join(kept)
    assert (own / "out/samples.jsonl").read_text().splitlines() == samples


def test_the_list_needs_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("--tasks", "list")
    assert "hellaswag_10shot" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("gone", "--tasks", "piqq", "--output", "o"),
            "error: --tasks: there is no task 'piqq'. Use piqa,",
        ),
        (("gone", "--tasks", "piqa,piqa", "--output", "o"), "error: --tasks: piqa occurs twice."),
        (("gone", "--tasks", "piqa"), "error: --output: is missing."),
        (("--tasks", "piqa", "--output", "o"), "error: CHECKPOINT: is missing."),
        (
            ("gone", "--tasks", "piqa", "--output", "o", "--limit", "0"),
            "error: --limit: '0' is not a whole number between 1 and",
        ),
        (("gone", "--tasks", "piqa", "--output", "o", "--data", "d"), "error: d/piqa: no such fol"),
        (
            ("gone", "--tasks", "vqav2", "--output", "o"),
            "error: vqav2: the hub does not have the images of this task.",
        ),
        (("gone", "--tasks", "x.yaml", "--output", "o"), "error: x.yaml: no such file"),
        (("gone", "--tasks", "own.yaml", "--output", "o"), "error: gone: "),
    ],
)
def test_mistakes_are_one_line(
    own: Path,
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(own)
    with pytest.raises(SystemExit) as end:
        evaluate(*words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert not (own / "o").exists()
