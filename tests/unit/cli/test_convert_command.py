"""``chameleon convert`` and ``chameleon verify`` from the command line to the last printed line."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_chameleon.cli.main import main
from places import REPOSITORY

Chameleon = Callable[..., subprocess.CompletedProcess[str]]


def test_it_prints_what_it_wrote(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["convert", str(tiny_checkpoint.parents[1]), str(tmp_path / "hf"), "--to", "hf"])
    output = capsys.readouterr()
    assert "(step 7) ->" in output.out
    assert "parameters" in output.out
    assert "bytes" in output.out
    assert "verified bit for bit" in output.out
    assert "layer 3/3" in output.err


def test_verification_can_be_left_out(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(tiny_checkpoint), str(tmp_path / "hf"), "--to", "hf", "--no-verify"]
    main(words)
    assert "not verified" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(tiny_checkpoint), str(tmp_path / "out"), "--to", "meta"]
    main([*words, "--shards", "2", "--dtype", "bf16", "--dry-run"])
    output = capsys.readouterr().out
    assert f"{tiny_checkpoint} (megatron, step 7) -> {tmp_path / 'out'} (meta)" in output
    assert "parameters in bfloat16: 3 layers, hidden 48" in output
    assert "2 QK-norm groups" in output
    assert output.count("consolidated.0") == 2
    assert "bytes needed on disk" in output
    assert list(tmp_path.iterdir()) == []


def test_a_cast_is_reported(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(tiny_checkpoint), str(tmp_path / "out"), "--to", "megatron"]
    main([*words, "--dtype", "bf16", "--no-verify"])
    assert "largest relative change by the cast to bf16: 0.003" in capsys.readouterr().out


def test_verify_alone_looks_at_the_files(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    main(["convert", str(tiny_checkpoint), str(folder), "--to", "hf"])
    capsys.readouterr()
    main(["verify", str(folder)])
    assert f"whole: {folder}: " in capsys.readouterr().out
    origin = (folder / "chameleon.json").read_text()
    (folder / "chameleon.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        main(["verify", str(folder)])
    assert end.value.code == 2
    assert "the first: chameleon.json is not what was written" in capsys.readouterr().err
    (folder / "SHA256SUMS").unlink()
    (folder / "chameleon.json").write_text(origin)
    with pytest.raises(SystemExit):
        main(["verify", str(folder)])
    assert capsys.readouterr().err == (
        f"error: {folder}: has no SHA256SUMS to compare its files with. Give a second checkpoint "
        "to compare the tensors of both.\n"
    )


@pytest.mark.parametrize("name", ["onnx", "nonsense"])
def test_other_formats_are_one_clear_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["convert", "anything", str(tmp_path / "out"), "--to", name])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"error: --to {name}: Unknown format. Use one of megatron, deepspeed, hf, meta.\n"
    )


def test_the_tool_forwards_to_the_verb(tmp_path: Path) -> None:
    import sys

    tool = REPOSITORY / "tools" / "convert_checkpoint.py"
    words = [sys.executable, str(tool), str(tmp_path / "none"), str(tmp_path / "out"), "--to", "hf"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    # slow imports are announced in a line before
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'none'}: no such folder.")
