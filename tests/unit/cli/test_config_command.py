"""``chameleon config check``: what it prints and its exit codes; the examples of both sizes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chameleon.cli.main import main
from places import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def check(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    main(["config", "check", *(str(word) for word in words)])
    captured = capsys.readouterr()
    return captured.out, captured.err


def line_of(text: str, key: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line[3:].split()[:1] == [key]]
    return line.split()


@pytest.mark.parametrize("columns", ["20", "80"])
def test_nothing_is_cut_in_a_pipe(tmp_path: Path, columns: str) -> None:
    prefix = "/a/very/long/path/" + "x" * 200
    config = tmp_path / "config.yaml"
    config.write_text(
        f"preset: chameleon_7b\ndata: {{stage1: [{{prefix: {prefix}, image_first: 0.5}}]}}"
    )
    words = [sys.executable, "-m", "megatron_chameleon", "config", "check", str(config)]
    result = subprocess.run(
        words, capture_output=True, text=True, env={"COLUMNS": columns, "PATH": ""}
    )
    assert result.returncode == 0, result.stderr
    assert prefix in result.stdout
    assert "virtual_pipeline_model_parallel_size" in result.stdout
    assert "9.24T, leaving out the 0.4T of interleaved documents" in result.stdout
    assert "…" not in result.stdout


def test_a_bare_preset_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = check(capsys, "chameleon_7b")
    assert err == ""
    assert out.startswith("chameleon_7b beside the paper's 7B, pretraining: arXiv 2405.09818")
    assert "7,013,158,912 parameters: input embeddings 268,435,456 + output layer" in out
    assert "to be set before training: tokenizer.path, data.stage1" in out
    assert re.search(r"\n0 of \d+ values deviate", out)
    assert line_of(out, "lr") == ["=", "lr", "0.0001", "0.0001", "paper,", "table", "1"]
    assert line_of(out, "hidden_dropout")[:4] == ["=", "hidden_dropout", "0.1", "0.1"]


def test_deviations_are_marked_and_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = check(capsys, "chameleon_34b", "optimizer.lr=3e-4", "training.z_loss=1e-4")
    assert line_of(out, "lr")[:4] == ["!", "lr", "0.0003", "0.0001"]
    assert re.search(r"\n2 of \d+ values deviate", out)


def test_which_size_it_compares_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("preset: chameleon_34b\nmodel: {num_layers: 4}")
    assert "the paper's 34B, pretraining: " in check(capsys, config)[0]
    assert "the paper's 7B, pretraining: " in check(capsys, config, "--paper", "7b")[0]
    assert "the paper's 7B, pretraining: " in check(capsys, config, "preset=chameleon_7b")[0]
    config.write_text("model: {num_layers: 50, hidden_size: 9216, num_attention_heads: 72}")
    assert "the paper's 34B, pretraining (the nearest in depth" in check(capsys, config)[0]


def test_fine_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = check(capsys, "chameleon_7b", "optimizer.lr=1e-5", "--stage", "sft")
    assert line_of(out, "lr") == ["=", "lr", "1e-05", "1e-05", "paper,", "section", "3.2"]
    assert line_of(out, "hidden_dropout")[:4] == ["!", "hidden_dropout", "0.1", "0.05"]
    assert line_of(out, "lr_warmup_steps") == ["-", "lr_warmup_steps", "4,000", "-"]


def test_the_vocabulary_of_a_tokenizer_that_is_there(
    tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = check(capsys, "chameleon_7b", f"tokenizer.path={tiny_tokenizer}")
    assert line_of(out, "vocabulary")[:4] == ["!", "vocabulary", "320", "65,536"]
    assert "(vocabulary 320)" in out
    assert "to be set before training: data.stage1" in out


def test_errors_are_all_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        check(capsys, "chameleon_7b", "model.num_query_groups=3", "optimizer.lr_warmup_steps=2e6")
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " model.num_query_groups",
        " optimizer.lr_warmup_steps",
    ]


def test_neither_a_file_nor_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        check(capsys, "chameleon_8b")
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: chameleon_8b: no such config file. Did you mean chameleon_7b or chameleon_34b? "
        "Give the path of a YAML file, or a preset: chameleon_34b, chameleon_7b.\n"
    )


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = check(capsys, "chameleon_34b", "model.hidden_dropout=0.1")
    assert err.startswith("warning: model.hidden_dropout is 0.1 with model.norm_order swin: the ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("size", ["7b", "34b"])
def test_a_dry_run_of_an_example_gets_to_the_missing_tokenizer(
    size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", str(EXAMPLES / f"chameleon_{size}" / "train.yaml"), "--dry-run"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data/tokenizer: no such folder. Give a folder made by")
