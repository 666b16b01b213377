"""``chameleon data audit`` and ``chameleon inspect CONFIG`` from the command line."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_chameleon.cli.main import main
from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.tokenizer.folder import load_tokenizer


@pytest.fixture
def config(tiny_tokenizer: Path, tmp_path: Path) -> Path:
    tokenizer = load_tokenizer(tiny_tokenizer)
    with TokenFileWriter(tmp_path / "text", tokenizer) as writer:
        for length in range(5, 60):
            writer.add(np.array([0, *[300] * length, 2]), 0)
        writer.commit()
    path = tmp_path / "train.yaml"
    values = {
        "model": {"seq_length": 64},
        "tokenizer": {"path": str(tiny_tokenizer)},
        "data": {"stage1": [{"prefix": str(tmp_path / "text")}]},
        "training": {"steps": 5, "global_batch_size": 4},
        "logging": {"run_dir": str(tmp_path / "run")},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_audit(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "audit", str(config), "--step", "2", "--documents", "3"])
    out = capsys.readouterr().out
    assert out.startswith("step 2: samples 4 to 7, 256 tokens, stage 1\n")
    assert "more: --documents " in out
    main(["data", "audit", str(config), "training.global_batch_size=8", "--step", "2", "--new"])
    assert capsys.readouterr().out.startswith("step 2: samples 8 to 15, 512 tokens, stage 1\n")


def test_inspect_a_config(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ["--html", str(page), "--step", "3", "--sequences", "2", "training.steps=6"]
    main(["inspect", str(config), *words])
    out = capsys.readouterr().out
    assert out.startswith("6 steps, 24 sequences of 64 tokens; 1 mixture\n")
    assert out.endswith(f"{page}: 2 sequences\n")
    assert page.read_text().count("<article>") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data", "audit", "CONFIG", "--step", "6"],
            "--step: the run has no step 6. Give 1 to 5.",
        ),
        (
            ["data", "audit", "CONFIG", "--step", "1", "--documents", "0"],
            "--documents: '0' is not a whole number between 1 and",
        ),
        (["data", "audit", "/none.yaml", "--step", "1"], "/none.yaml: no such config file"),
        (["inspect", "CONFIG", "--html", "UNDER"], "UNDER: cannot be written (Not a directory)"),
        (
            ["inspect", "CONFIG", "--sequences", "0"],
            "--sequences: '0' is not a whole number between 1",
        ),
        (["inspect", "PREFIX", "training.steps=3"], "training.steps=3: PREFIX is a token file"),
    ],
)
def test_bad_input(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    names = {"CONFIG": config, "PREFIX": config.with_name("text"), "UNDER": config / "page.html"}
    words = [str(names.get(word, word)) for word in words]
    for name, path in names.items():
        message = message.replace(name, str(path))
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
