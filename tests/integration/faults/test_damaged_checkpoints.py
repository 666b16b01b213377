"""A run whose newest checkpoints are damaged resumes from an older one, and names the files."""

import shutil
from pathlib import Path

import pytest

SETTINGS = ("checkpoint.every_steps=3", "checkpoint.keep_last=2", "checkpoint.keep_every=6")


@pytest.fixture(scope="module")
def saved(tiny) -> Path:
    """A run of 15 steps with its checkpoints 6, 12 and 15."""
    tiny.train("saved", *SETTINGS, "training.steps=15", "checkpoint.async_save=true")
    folder = tiny.folder / "saved" / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step_00000006", "step_00000012", "step_00000015"]
    return folder


def flip_a_bit(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_older_one_is_used(tiny, saved: Path) -> None:
    unbroken = tiny.metrics("saved")
    shutil.copytree(saved.parent, tiny.folder / "damaged")
    folder = tiny.folder / "damaged" / "checkpoints"
    flipped = flip_a_bit(next((folder / "step_00000015").glob("*.distcp")))
    half = folder / "step_00000012"
    (half / "state.json").unlink()
    result = tiny.train("damaged", *SETTINGS, "training.steps=15", processes=2)
    words = " is not what was written (its SHA-256 differs). It is now called step_00000015.damaged"
    assert f"warning: {flipped}{words}; the run resumes from step_00000006" in result.stderr
    assert f"warning: {half / 'state.json'} is missing. It is now" in result.stderr
    assert "starts at step 6" in result.stdout
    assert [r["step"] for r in tiny.metrics("damaged")] == list(range(1, 16))
    # on two processes, so sums are in another order, as in tests/parity
    losses = [record["loss"] for record in unbroken]
    assert [r["loss"] for r in tiny.metrics("damaged")] == pytest.approx(losses, rel=1e-5)
    names = sorted(path.name for path in folder.iterdir())
    assert names[-2:] == ["step_00000015", "step_00000015.damaged"]


def test_none_is_left(tiny, saved: Path) -> None:
    shutil.copytree(saved.parent, tiny.folder / "hopeless")
    folder = tiny.folder / "hopeless" / "checkpoints"
    for checkpoint in folder.iterdir():
        next(checkpoint.glob("*.distcp")).unlink()
    before = sorted(folder.rglob("*"))
    result = tiny.train("hopeless", *SETTINGS, "training.steps=20", succeeds=False)
    assert result.returncode == 2
    assert f"error: {folder}: none of 3 checkpoints is sound: " in result.stderr
    assert "Restore one of them, or start again in another logging.run_dir" in result.stderr
    assert sorted(folder.rglob("*")) == before


def test_one_that_was_named_is_not_replaced(tiny, saved: Path) -> None:
    named = tiny.folder / "elsewhere" / "step_00000012"
    shutil.copytree(saved / named.name, named)
    flipped = flip_a_bit(named / ".metadata")
    result = tiny.train("from-named", "--resume", str(named), succeeds=False)
    assert result.returncode == 2
    assert f"error: {named}: {flipped} is not what was written" in result.stderr
