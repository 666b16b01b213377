"""The figures that the digits report measures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from megatron_chameleon.errors import DataError
from megatron_chameleon.runs.metrics import metrics_of
from places import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "digits"


@pytest.fixture(autouse=True)
def example_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])


def test_the_judge_reads_real_digits_through_the_rendering() -> None:
    """Held-out digits at 16 x 16 pixels; 99.2% were right when this test was written."""
    from make_documents import HELD_OUT_SHARE, SPLIT_SEED, render
    from report import Judge, to_8x8

    digits = load_digits()
    order = np.random.RandomState(SPLIT_SEED).permutation(len(digits.target))
    held_out = order[: round(HELD_OUT_SHARE * len(order))]
    images = [render(digits.images[i], 16) for i in held_out]
    # Scaling up (bicubic) and down (boxes) smooths a little; 16 is full ink.
    assert np.abs(to_8x8(images[0]) - digits.data[held_out[0]]).mean() < 1.5
    right = np.array(Judge().classify(images)) == digits.target[held_out]
    assert right.mean() > 0.97


def test_psnr_is_the_formula() -> None:
    from report import psnr_db

    black, grey = (Image.new("RGB", (4, 4), (value,) * 3) for value in (0, 51))
    assert psnr_db([black], [grey]) == pytest.approx(20 * np.log10(5))
    assert psnr_db([grey], [grey]) == float("inf")


def test_final_losses_are_means_of_the_last_steps() -> None:
    from report import training_numbers

    records = [
        {"step": i, "loss_text": float(i > 30), "step_seconds": 0.5, "tokens_per_second": i}
        for i in range(1, 41)
    ]
    numbers = training_numbers(metrics_of(records))
    assert numbers["final_loss_text"] == 0.5
    assert numbers["final_loss_image"] is None
    assert (numbers["steps"], numbers["train_seconds"]) == (40, 20.0)
    assert numbers["tokens_per_second"] == 20.5


def test_heldout_files_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    from report import read_heldout

    with pytest.raises(DataError, match=r"heldout\.jsonl: cannot be read .*make_documents"):
        read_heldout(tmp_path / "heldout.jsonl")
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"content": []}) + "\n")
    with pytest.raises(DataError, match=r"heldout\.jsonl:1: no image or no label"):
        read_heldout(tmp_path / "heldout.jsonl")


def test_answers_in_conversations_are_counted() -> None:
    from chat_figures import Talk, last_number, seen, text_of

    class Judge:
        def classify(self, images: list[Image.Image]) -> list[int]:
            return [image.width for image in images]

    two, five = (Image.new("RGB", (width, 8)) for width in (2, 5))
    answers = [["Here is your two.", two], [two, five], ["I can only draw digits."], [five]]
    turns = [[["draw"], answer] for answer in answers]
    assert seen(turns, Judge()) == [2, None, None, 5]
    assert Talk(turns, [2, 2, 2, 2], seen(turns, Judge())).right == 0.25
    assert [text_of(t) for t in turns] == ["", "", "I can only draw digits.", ""]
    assert last_number("Nine plus nine is eighteen.") == 18
    assert last_number("Two plus two is") is last_number("") is None
