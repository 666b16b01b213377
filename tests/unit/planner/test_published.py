"""The planner beside published speeds: the goal is a median error under 15%."""

from megatron_chameleon.planner.gpus import GPUS
from megatron_chameleon.planner.published import PUBLISHED, median_error


def test_the_median_error_of_rows_that_nothing_was_fitted_to() -> None:
    held_out = [row for row in PUBLISHED if not row.calibration]
    assert len(held_out) >= 20
    assert median_error(held_out) < 0.15


def test_one_row_for_each_efficiency_and_no_more() -> None:
    used = [(row.gpu, row.fp8) for row in PUBLISHED if row.calibration]
    assert sorted(used) == [("a100", False), ("h100", False), ("h100", True)]
    assert all(abs(row.error()) < 0.02 for row in PUBLISHED if row.calibration)
    same = ("bf16_efficiency", "fp8_efficiency")
    assert all(getattr(GPUS["h100"], name) == getattr(GPUS["h200"], name) for name in same)


def test_the_convention_is_the_one_of_the_published_rows() -> None:
    """llm-foundry and NeMo give MFU or TFLOP/s beside tokens a second."""
    rows = {(row.name, row.gpu): row for row in PUBLISHED}
    assert abs(rows["MPT-7b, 2048", "h100"].mfu() - 0.4644) < 0.002
    assert abs(rows["MPT-7b, 2048", "a100"].mfu() - 0.6423) < 0.002
    llama = rows["Llama-2 7B", "h100"]
    assert abs(llama.mfu() * 1978.9 - 776) < 3
