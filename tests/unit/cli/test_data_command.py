"""``chameleon data audit`` and ``chameleon inspect CONFIG`` from the command line."""

import json
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


def test_borders(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "audit", str(config), "--borders"]
    main(words)
    out = capsys.readouterr().out
    assert out.startswith("5 steps with 0 ends of packing blocks; each step is compared with")
    assert "sample 20: the run ends\n" in out and "padding of all steps: " in out
    assert "gradient norm at" not in out
    run = tmp_path / "run"
    run.mkdir()
    norms = [{"step": n, "grad_norm": 0.5 if n < 5 else None if n > 5 else 0.6} for n in range(9)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in norms))
    for metrics in (run, run / "metrics.jsonl"):
        main([*words, "--metrics", str(metrics)])
        assert "at most 1.20 of the median beside it (step 5)" in capsys.readouterr().out
    # A run folder as the config has its own metrics.
    (run / "config.yaml").write_text(config.read_text())
    main(["data", "audit", str(run), "--borders"])
    assert "at most 1.20 of the median beside it (step 5)" in capsys.readouterr().out


def test_inspect_a_config(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ["--html", str(page), "--step", "3", "--sequences", "2", "training.steps=6"]
    main(["inspect", str(config), *words])
    out = capsys.readouterr().out
    assert out.startswith("6 steps, 24 sequences of 64 tokens; 1 mixture\n")
    assert out.endswith(f"{page}: 2 sequences\n")
    assert page.read_text().count("<article") == 2


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
        (
            ["data", "audit", "CONFIG"],
            "one of the arguments --step --borders is required. See",
        ),
        (
            ["data", "audit", "CONFIG", "--step", "1", "--borders"],
            "--borders: not allowed with argument --step. See",
        ),
        (
            ["data", "audit", "CONFIG", "--step", "1", "--metrics", "UNDER"],
            "--metrics: shows the gradient norms at the borders of a run, but --borders is not "
            "given. Add --borders in place of --step, or leave it out.",
        ),
        (
            ["data", "audit", "CONFIG", "--borders", "--metrics", "/none"],
            "/none: no such file",
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
