"""``train --dry-run`` does the step that comes next for real, and keeps nothing."""

import math
import re
from pathlib import Path

import pytest

from megatron_chameleon.cli.main import main
from megatron_chameleon.training import dry_run
from megatron_chameleon.training.engines.megatron import MegatronEngine

PASSED = "Dry run passed: config, tokenizer, data and checkpoint are ready."


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all that lies in a folder."""
    found = [folder, *folder.rglob("*")] if folder.exists() else []
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


def found_losses(stdout: str) -> tuple[int, list[str]]:
    """The step of a dry run, and its losses as they were printed."""
    pattern = r"Step (\d+) was computed and dropped: loss (\S+) \(text (\S+), image (\S+)\), grad"
    (match,) = re.finditer(pattern, stdout)
    return int(match[1]), [match[2], match[3], match[4]]


def as_printed(record: dict) -> list[str]:
    return [f"{record[key]:.4f}" for key in ("loss", "loss_text", "loss_image")]


def check_page(page: Path, loss: str) -> None:
    """It has what was printed, and the numbers behind it."""
    text = page.read_text()
    assert PASSED in text and f"loss {loss} (text" in text
    headings = re.findall(r"<h2>([^<]*)</h2>", text)
    assert headings == [
        *(
            "Possible problems",
            "Layout",
            "Parameters",
            "Memory and time",
            "Mixture",
            "What is read",
        ),
        *("Steps", "Config"),
    ]
    begin = text.index('aria-label="Parameters"')
    parts = [
        int(number.replace(",", ""))
        for number in re.findall(r'<td class="n">([\d,]+)</td>', text[begin:])[:7]
    ]
    assert sum(parts[:6]) == parts[6] > 0
    assert "Times that each source has been read" in text and "Learning rate" in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_step_is_the_one_that_the_run_does_next(tiny) -> None:
    words = ("training.steps=5", "checkpoint.every_steps=3")
    folder = tiny.folder / "tried"
    page = tiny.folder / "dry_run.html"
    first = tiny.train("tried", *words, "--dry-run", "--html", page).stdout
    assert not folder.exists()
    check_page(page, found_losses(first)[1][0])
    first = first.removesuffix(f"{page}\n")
    on_two = tiny.train("tried", *words, "--dry-run", processes=2).stdout
    assert not folder.exists()
    tiny.train("tried", *words)
    # The config leaves it open, and few documents share a sequence.
    assert "\n  reset_attention: false\n" in (folder / "config.yaml").read_text()
    assert "; documents are not isolated (about" in first
    metrics = tiny.metrics("tried")
    assert found_losses(first) == (1, as_printed(metrics[0]))
    assert found_losses(on_two)[0] == 1
    two = [float(loss) for loss in found_losses(on_two)[1]]
    assert two == pytest.approx([float(x) for x in as_printed(metrics[0])], abs=2e-4)
    assert re.search(r"\nPeak memory of the process: [\d,.]+ MiB\.\n$", first)
    ranks = r"\nPeak memory of the process: rank 0 [\d,.]+ MiB, rank 1 [\d,.]+ MiB\.\n$"
    assert re.search(ranks, on_two)
    assert "4 micro-batches on each rank" in first and "2 micro-batches on each rank" in on_two

    before = tree(folder)
    done = tiny.train("tried", *words, "--dry-run").stdout
    assert done.endswith(f"{PASSED}\nIts next step was not tried: all 5 steps are done.\n")
    back = ("--resume", folder / "checkpoints" / "step_00000003")
    again = tiny.train("tried", *words, *back, "--dry-run").stdout
    assert found_losses(again) == (4, as_printed(metrics[3]))
    assert tree(folder) == before, "a dry run changes nothing"


def test_deepspeed(tiny) -> None:
    words = ("engine.name=deepspeed", "engine.zero_stage=1", "training.steps=3")
    text = tiny.train("tried-ds", *words, "--dry-run", processes=2).stdout
    step, losses = found_losses(text)
    assert step == 1 and all(math.isfinite(float(loss)) for loss in losses)
    assert not (tiny.folder / "tried-ds").exists()


def run_here(tiny, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    run_dir = f"logging.run_dir={tiny.folder / 'here'}"
    main(["train", str(tiny.config), run_dir, "--dry-run", *words])
    assert not (tiny.folder / "here").exists()
    return capsys.readouterr().out


def test_a_step_that_would_take_too_long(
    tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "CPU_FLOPS", 1e3)
    text = run_here(tiny, capsys)
    assert re.search(
        r"\nIts next step was not tried: it would take about \S+ or more on the CPUs of this "
        r"machine; the same command where the run is to train tries it\.\n$",
        text,
    )


def test_what_does_not_fit_is_said_and_not_tried(
    tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a config for a cluster on a laptop."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the step was tried")

    monkeypatch.setattr(dry_run, "build_engine", fail)
    huge = ("model.num_layers=2000", "model.hidden_size=65536", "model.ffn_hidden_size=131072")
    text = run_here(tiny, capsys, *huge)
    assert PASSED in text and "But this machine cannot run it: model." in text.splitlines()[-1]
    assert run_here(tiny, capsys, "--no-step").endswith(f"{PASSED}\n")


def test_a_loss_that_is_not_finite(
    tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = MegatronEngine.train_step

    def broken(*args: object, **options: object) -> dict:
        return {**train_step(*args, **options), "loss": math.nan}  # type: ignore[arg-type]

    monkeypatch.setattr(MegatronEngine, "train_step", broken)
    page = tiny.folder / "failed.html"
    with pytest.raises(SystemExit) as end:
        run_here(tiny, capsys, "--html", str(page))
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert PASSED in printed.out
    assert '<li class="bad">step 1: loss is nan in the dry run.' in page.read_text()
    assert printed.err.splitlines()[-1] == (
        "error: step 1: loss is nan in the dry run. Check the weights that the run starts from, "
        "optimizer.lr and the data."
    )


@pytest.mark.parametrize("name", ["command.txt", "checkpoints", "run.lock", "events.jsonl"])
def test_a_run_folder_that_cannot_be_written(
    name: str, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(tmp_path / "nowhere" / "file")
    if name == "checkpoints":
        (run / name).unlink()
        run.rmdir()
        run.touch()
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["train", str(tiny.config), f"logging.run_dir={run}", "--dry-run"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: logging.run_dir: ")
    assert tree(tmp_path) == before


def test_no_step_needs_a_dry_run(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", str(tiny.config), "--no-step"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: --no-step: it goes with --dry-run only. Add --dry-run, or remove it.\n"
    )
