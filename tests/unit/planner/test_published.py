"""The planner compared with published speeds: the goal is a median error below 15%."""

from pathlib import Path

import pytest

from megatron_chameleon.errors import ConfigErrors
from megatron_chameleon.planner.gpus import GPUS
from megatron_chameleon.planner.published import (
    PUBLISHED_RUNS,
    PublishedRun,
    median_error,
    read_published_runs,
)


@pytest.fixture(scope="module")
def runs() -> list[PublishedRun]:
    return read_published_runs()


def test_the_median_error_of_runs_that_nothing_was_fitted_to(runs: list[PublishedRun]) -> None:
    held_out = [run for run in runs if not run.calibration]
    assert len(held_out) >= 20
    assert median_error(held_out) < 0.15


def test_one_run_for_each_efficiency_and_no_more(runs: list[PublishedRun]) -> None:
    used = [(run.gpu, run.fp8) for run in runs if run.calibration]
    assert sorted(used) == [("a100", False), ("h100", False), ("h100", True)]
    assert all(abs(run.error()) < 0.02 for run in runs if run.calibration)
    same = ("bf16_efficiency", "fp8_efficiency")
    assert all(getattr(GPUS["h100"], name) == getattr(GPUS["h200"], name) for name in same)


def test_the_convention_is_that_of_the_published_runs(runs: list[PublishedRun]) -> None:
    """llm-foundry and NeMo give MFU or TFLOP/s beside tokens per second."""
    by_name = {(run.name, run.gpu): run for run in runs}
    assert abs(by_name["MPT-7b, 2048", "h100"].published_mfu() - 0.4644) < 0.002
    assert abs(by_name["MPT-7b, 2048", "a100"].published_mfu() - 0.6423) < 0.002
    llama = by_name["Llama-2 7B", "h100"]
    assert abs(llama.published_mfu() * 1978.9 - 776) < 3


def test_speeds_that_are_published_in_other_units(runs: list[PublishedRun]) -> None:
    by_name = {(run.name, run.gpus): run for run in runs}
    assert by_name["GPT-3 175B", 64].published_speed == pytest.approx(2048 / 13.75)
    assert by_name["Llama-3 405B", 8192].published_mfu() == pytest.approx(0.43)


def test_a_feed_forward_without_a_gate_keeps_its_parameters(runs: list[PublishedRun]) -> None:
    model = next(run.model for run in runs if run.name == "Nemotron 340B")
    assert not model.gated
    assert 3 * model.model_config(4096).ffn_hidden_size == 2 * model.ffn_hidden_size


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpu: h100", "gpu: b200", "does not know the GPU 'b200'. Use one of: a100, h100, h200"),
        (
            "mfu: 0.41",
            "note: ''",
            "(Llama-3 405B): the speed must be given exactly once (got none)",
        ),
        ("mfu: 0.41", "mfu: 0.41\n    step_seconds: 2", "(got step_seconds, mfu). Set one of"),
        ("seq_length: 8192", "seq_length: 0", "(Llama-3 405B): the run lacks seq_length. Add"),
        (", vocab_size: 32000}", "}", "(Llama-2 70B): the run lacks model.vocab_size. Add"),
        ("gpus: 16384", "gpu_count: 16384", "gpu_count"),
        ("gpus: 16384", "gpus: many", "'many'"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = PUBLISHED_RUNS.read_text(encoding="utf-8")
    file = tmp_path / "runs.yaml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigErrors) as caught:
        read_published_runs(file)
    assert message in str(caught.value) and f"{file}: runs[" in str(caught.value)
