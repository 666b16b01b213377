"""The demo's script from beginning to end, with too few steps for the model to learn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from places import REPOSITORY
from run_command import environment

REPORTED = (
    "caption_accuracy",
    "generated_image_accuracy",
    "reconstruction_psnr_db",
    "chat_drawing_accuracy",
    "chat_second_drawing_accuracy",
    "chat_recall_accuracy",
    "chat_reading_accuracy",
    "chat_sum_accuracy",
    "steps",
    "train_seconds",
    "tokens_per_second",
    "final_loss_text",
    "final_loss_image",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "digits"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(REPOSITORY / "examples" / "digits" / "run.sh"), str(folder)],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment(QUICK="1", SEED="2", PATH=path),
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder


def test_the_report_has_every_figure(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert all(isinstance(report[name], int | float) for name in REPORTED)
    assert (report["steps"], report["heldout_images"], report["generated_images"]) == (20, 359, 100)
    assert 0 <= report["caption_accuracy"] < 0.5, "20 steps are too few to learn to read"
    assert report["judge_accuracy_on_real_images"] > 0.95


def test_the_page_is_self_contained(run: Path) -> None:
    page = (run / "report" / "index.html").read_text()
    for heading in ("Losses", "Images", "Which digits are confused", "In conversations", "Config"):
        assert f"<h2>{heading}" in page
    assert 'src="http' not in page and "src='http" not in page
    assert (run / "report" / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_digits_are_in_no_token_file(run: Path) -> None:
    for name in ("pairs", "sums", "text", "chats", "quality"):
        assert "heldout" not in (run / "data" / f"{name}.jsonl").read_text()


def test_the_run_folder_has_what_the_guide_says(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "command.txt", "environment.json", "metrics.jsonl"}
    assert names >= {"checkpoints", "data", "exported", "report", "report.json", "tokenizer"}
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 20


def test_its_model_is_fine_tuned_on_conversations(run: Path) -> None:
    folder = run.parent / "sft"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(REPOSITORY / "examples" / "sft" / "run.sh"), str(run), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(QUICK="1", PATH=path),
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    after = json.loads((folder / "after.json").read_text())
    shares = [share for kind in ("questions", "drawings") for share in after[kind].values()]
    assert len(shares) == 4 and all(0 <= share <= 1 for share in shares)
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and all(record["loss_image"] for record in losses)
    assert '<div class="untrained">' in (folder / "dialogues.html").read_text()
