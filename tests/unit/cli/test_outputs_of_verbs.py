"""Outputs that would replace an input are refused before the work, by every verb that writes."""

from pathlib import Path

import pytest

from megatron_chameleon.cli.main import main

SIZES = ("--vocab-size", "320", "--image-codes", "16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "run", "--prompt", "a", "--output", "run"), "is the checkpoint"),
        (("generate", "run", "--document", "documents.jsonl", "--output", "."), "would replace"),
        (("generate", "run", "--image", "0000-0.png", "--output", "."), "would replace"),
        (("generate", "run", "--prompt", "a", "--output", "-"), "a dash is not a name here"),
        (("inspect", "tokens", "--html", "tokens.bin"), "would replace tokens.bin"),
        (("inspect", "train.yaml", "--html", "link.html"), "would replace link.html"),
        (("plot", "curve.svg", "--output", "curve.svg"), "would replace curve.svg"),
        (("tokenizer", "text", "vocabulary.json", "--output", ".", *SIZES), "would replace"),
        (("tokenizer", "image", "image.json", "--output", "."), "would replace image.json"),
        (("tokenizer", "text", "a.txt", "--output", "", *SIZES), "the name is empty"),
    ],
)
def test_an_input_is_not_replaced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    names = ("documents.jsonl", "0000-0.png", "tokens.bin", "train.yaml", "curve.svg", "a.txt")
    for name in (*names, "tokens.idx", "vocabulary.json", "image.json"):
        Path(name).write_text("kept")
    Path("link.html").symlink_to("train.yaml")
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    # before it, the first verb of a process says that it loads libraries
    lines = capsys.readouterr().err.splitlines()
    (error,) = (line for line in lines if not line.endswith(" ..."))
    assert caught.value.code == 2
    assert error.startswith("error: --") and message in error
    assert {path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {"kept"}
