"""``chameleon init``, and every command of its ``run.sh``, with too few steps to learn.

The script runs once with a stand-in for Python that notes the commands. They then run in forked
processes, which need not load the libraries again.
"""

import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from run_command import run_chameleon

NOTE = r"""#!/usr/bin/env bash
shift 2
printf '%s\0' "$@" END >> "$NOTED"
[ "$1" != status ] || echo BEST
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a project, whose commands have all run."""
    place = tmp_path_factory.mktemp("init")
    (place / "my pictures" / "it's red").mkdir(parents=True)
    for n in range(24):
        image = Image.new("RGB", (16, 16), "white")
        ImageDraw.Draw(image).ellipse((n % 5, n % 7, 10 + n % 4, 11), fill=(200, n * 9, 40))
        image.save(place / "my pictures" / "it's red" / f"ball {n}.png")
    output = place / "a run"
    run_chameleon("init", place / "my pictures", "--size", "tiny", "--output", output)
    here = Path.cwd()
    os.chdir(output)
    try:
        for words in noted_commands(output, place):
            if words[0] != "status":
                run_chameleon(*(word.replace("BEST", best()) for word in words))
    finally:
        os.chdir(here)
    return output


def noted_commands(output: Path, place: Path) -> list[list[str]]:
    """The words of each command that the script would run."""
    (place / "python").write_text(NOTE)
    (place / "python").chmod(0o755)
    variables = {"PYTHON": str(place / "python"), "NOTED": str(place / "noted"), "QUICK": "1"}
    ended = subprocess.run(
        ["bash", output / "run.sh"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    (output / "held_out_loss.txt").unlink()
    words = (place / "noted").read_bytes().decode().split("\0")[:-1]
    ends = [index for index, word in enumerate(words) if word == "END"]
    starts = [0, *(end + 1 for end in ends)]
    return [words[start:end] for start, end in zip(starts, ends, strict=False)]


def best() -> str:
    """The checkpoint that ``chameleon status --best`` names; empty before there is one."""
    if not Path("checkpoints").is_dir():
        return ""
    return run_chameleon("status", ".", "--best").stdout.strip()


def test_it_ends_with_a_report(folder: Path) -> None:
    page = (folder / "report/index.html").read_text()
    assert "eld-out loss" in page and "data:image/png;base64," in page
    assert (folder / "exported/model.safetensors").is_file()
    assert list((folder / "drawn").rglob("*.png"))


def test_the_best_checkpoint_is_one_of_the_run(folder: Path) -> None:
    shown = run_chameleon("status", folder, "--best").stdout.strip()
    assert shown in {str(folder / f"checkpoints/step_{step:08}") for step in (2, 4)}
