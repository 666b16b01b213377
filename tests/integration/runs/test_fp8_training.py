"""Training with emulated FP8: its loss, its checkpoints, and what is refused."""

import shutil
from collections.abc import Callable

import pytest

from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.cli.main import main

COMMON = ["training.dtype=bf16", "training.steps=40", "checkpoint.every_steps=20"]
DELAYED = [*COMMON, "fp8.format=hybrid", "fp8.emulate=true", "fp8.amax_history_len=16"]
TENSORWISE = [
    *COMMON,
    "fp8.format=hybrid",
    "fp8.emulate=true",
    "fp8.recipe=tensorwise",
    "fp8.num_layers_at_end_in_bf16=1",
]
EXACT = ("step", "loss", "loss_text", "loss_image", "z_loss", "grad_norm")


def train(tiny, run: str, *words: str) -> list[dict]:
    """Run the command in this process, which saves the imports of ten runs; returns its metrics."""
    main(["train", str(tiny.config), f"logging.run_dir={tiny.folder / run}", *words])
    return tiny.metrics(run)


@pytest.fixture(scope="module")
def bf16(tiny):
    return train(tiny, "bf16", *COMMON)


@pytest.fixture(scope="module")
def delayed(tiny):
    return train(tiny, "delayed", *DELAYED)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command in this process and returns the error that it prints."""

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        assert caught.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        return "\n".join(line for line in lines if line.startswith("error:"))

    return run


def checkpoint(tiny, run: str, step: int) -> str:
    return str(tiny.folder / run / "checkpoints" / f"step_{step:08d}")


def final_loss(metrics: list[dict]) -> float:
    """The mean over ten steps, in which all runs saw the same samples."""
    return sum(record["loss"] for record in metrics[-10:]) / 10


def test_both_recipes_end_within_two_percent_of_bf16(tiny, bf16, delayed) -> None:
    tensorwise = train(tiny, "tensorwise", *TENSORWISE)
    assert final_loss(bf16) < 0.8 * bf16[0]["loss"]
    for metrics in (delayed, tensorwise):
        assert final_loss(metrics) == pytest.approx(final_loss(bf16), rel=0.02)
        assert final_loss(metrics) != final_loss(bf16)


def test_resumed_equals_unbroken_bit_for_bit(tiny, delayed) -> None:
    found = train(tiny, "resumed", *DELAYED, "--resume", checkpoint(tiny, "delayed", 20))
    assert found[0]["step"] == 21
    assert [[r[k] for k in EXACT] for r in found] == [[r[k] for k in EXACT] for r in delayed[20:]]


def test_recomputation_changes_nothing(tiny) -> None:
    words = [*DELAYED, "training.steps=4"]
    direct = train(tiny, "direct", *words)
    again = train(tiny, "recomputed", *words, "parallel.recompute_granularity=full")
    assert [[r[k] for k in EXACT] for r in again] == [[r[k] for k in EXACT] for r in direct]


def test_fp8_can_be_switched_on_and_off_on_resume(tiny, bf16, delayed) -> None:
    for run, settings, start, other in (
        ("on", DELAYED, "bf16", bf16),
        ("off", COMMON, "delayed", delayed),
    ):
        words = [*settings, "training.steps=22", "--resume", checkpoint(tiny, start, 20)]
        found = train(tiny, run, *words)[0]
        # the same weights and samples in another number format
        assert found["step"] == 21
        assert found["loss"] == pytest.approx(other[20]["loss"], rel=0.05)
        assert found["loss"] != other[20]["loss"]


def test_emulation_and_transformer_engine_do_not_read_each_others_scales(
    tiny, delayed, refused
) -> None:
    shutil.copytree(tiny.folder / "delayed", tiny.folder / "other")
    run_dir = f"logging.run_dir={tiny.folder / 'other'}"
    message = refused("train", tiny.config, run_dir, *DELAYED, "fp8.emulate=false", "--dry-run")
    assert "fp8.emulate=true (your config: false). Set it in your config, or" in message


def test_checkpoints_hold_the_same_weights_for_export(tiny, bf16, delayed) -> None:
    readers = [TrainingCheckpoint(checkpoint(tiny, run, 40)) for run in ("bf16", "delayed")]
    assert readers[0].tensors == readers[1].tensors
    exported = tiny.folder / "exported"
    main(["convert", checkpoint(tiny, "delayed", 40), str(exported), "--to", "hf"])
    assert (exported / "config.json").is_file()


def test_without_a_gpu_fp8_is_refused_before_anything_starts(tiny, refused) -> None:
    run_dir = tiny.folder / "refused"
    message = refused("train", tiny.config, f"logging.run_dir={run_dir}", "fp8.format=hybrid")
    assert message == (
        "error: fp8.format: hybrid needs a GPU, and this machine has none. Set fp8.emulate=true to "
        "see the recipe's effect, or run on H100/H200 with Transformer Engine."
    )
    assert not run_dir.exists()


def test_a_dry_run_checks_a_gpus_config_and_says_what_is_missing(tiny, capsys) -> None:
    run_dir = f"logging.run_dir={tiny.folder / 'dry'}"
    main(["train", str(tiny.config), run_dir, "fp8.format=hybrid", "--dry-run"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "But this machine cannot run it: fp8.format: hybrid needs a GPU, and this machine has none."
    )
