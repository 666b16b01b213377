"""``chameleon annotate``: from answers to a table, and mistakes."""

import json
from pathlib import Path

import pytest

from megatron_chameleon.cli.main import main


def annotate(*words: object) -> None:
    main(["annotate", *(str(word) for word in words)])


def write_answers(folder: Path, name: str) -> Path:
    lines = [
        {
            "id": str(number),
            "prompt": [{"type": "text", "text": f"prompt {number}"}],
            "content": [{"type": "text", "text": f"{name}: I can't help" if number else name}],
        }
        for number in range(4)
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def fill(folder: Path, form: int, label: str) -> Path:
    """What a form saves."""
    key = json.loads((folder / "key.json").read_text())
    saved = {
        "format": "megatron_chameleon.judgements/1",
        "questionnaire": key["questionnaire"],
        "form": str(form),
        "judgements": dict.fromkeys(list(key["forms"][str(form)]), label),
    }
    file = folder / f"judgements_{form}.json"
    file.write_text(json.dumps(saved))
    return file


def test_safety_from_answers_to_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotate("prepare", "safety", write_answers(tmp_path, "ours"), "--output", tmp_path / "judged")
    files = [fill(tmp_path / "judged", form, label) for form, label in ((1, "safe"), (2, "safe"))]
    files.append(fill(tmp_path / "judged", 3, "unsafe"))
    words = ("--key", tmp_path / "judged/key.json", "--output", tmp_path / "scores.json")
    annotate("score", *files, *words, "--bootstraps", 20)
    printed = capsys.readouterr().out
    assert "3 forms of 4 items" in printed
    assert "safe 4 (100.0% [51.0, 100.0])" in printed
    assert "all agree 0 (0.0%), a majority 4 (100.0%), none 0" in printed
    assert "refusals (a heuristic, not a judgement): 75.0%" in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["all"]["counts"] == {"safe": 4, "unsure": 0, "unsafe": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("prepare", "pairwise", "a.jsonl", "--output", "o"),
            "error: ANSWERS: pairwise needs 2 different files of answers, but got a.jsonl. Give",
        ),
        (("prepare", "safety", "gone.jsonl", "--output", "o"), "error: gone.jsonl: no such file"),
        (("prepare", "safety", "a.jsonl", "--output", "o", "--annotators", "0"), "error: --annota"),
        (("score", "rows.csv"), "error: --kind: is missing; the key's kind is unknown."),
        (("score", "rows.csv", "--kind", "pairwise"), "error: item 1, annotator a: the label 'x'"),
        (("answer", "gone", "gone.jsonl", "--output", "o"), "error: gone.jsonl: no such file"),
        (("answer", "gone", "a.jsonl", "--output", "o", "--top-p", "0"), "error: --top-p: '0' is"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_answers(tmp_path, "a")
    (tmp_path / "rows.csv").write_text("item,annotator,label\n1,a,x\n")
    with pytest.raises(SystemExit) as end:
        annotate(*words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert not (tmp_path / "o").exists()
