"""The progress line: every figure, and the time left."""

import pytest

from megatron_chameleon.training.run import console
from megatron_chameleon.training.run.console import Progress
from megatron_chameleon.wording import format_duration

METRICS = {
    "loss": 3.25,
    "loss_text": 2.5,
    "loss_image": None,
    "grad_norm": 1.5,
    "learning_rate": 1e-4,
    "tokens_per_second": 12345.6,
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (4.6, "5s"),
        (59.6, "1m00s"),
        (75, "1m15s"),
        (185, "3m05s"),
        (3675, "1h01m"),
        (7625, "2h07m"),
        (363600, "4d05h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_time_left_counts_samples_where_batches_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 130.0])  # 30 s for 10 steps of 4 samples; 80 steps of 8 are left
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    progress = Progress(10, 100, samples_before=lambda steps: 4 * steps + 4 * max(0, steps - 20))
    assert progress.line(20, METRICS).endswith("ETA 8m00s")


def test_the_line_and_its_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 130.0])  # 30 s for the 10 steps since the resume; 80 steps are left
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    line = Progress(steps_done=10, steps=100).line(20, METRICS)
    assert line == (
        "step  20/100  loss 3.2500 (text 2.5000, image -)  grad norm 1.500  lr 1.00e-04  "
        "12,346 tokens/s  ETA 4m00s"
    )
