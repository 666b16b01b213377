"""What the training of an image tokenizer writes down: metrics, measurements and the page."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from megatron_chameleon.cli.main import main
from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.tokenizer_corpus.images import ImageEntry, find_images
from megatron_chameleon.tokenizer import fingerprint
from megatron_chameleon.tokenizer.image.config import load_image_config
from megatron_chameleon.tokenizer.image.training.holdout import hold_out
from megatron_chameleon.tokenizer.image.training.records.similarity import psnr, ssim
from megatron_chameleon.tokenizer.image.training.train import train_image_tokenizer
from megatron_chameleon.tokenizer.image.training.trainer import Trainer

SMALL = ["model.resolution=8", "model.ch_mult=[1,1]", "model.codebook_size=16"]
SMALL += ["model.z_channels=8", "model.embed_dim=8", "training.batch_size=4", "training.steps=9"]
SMALL += ["training.log_every_steps=2", "training.measure_every_steps=3", "training.holdout=0.4"]


class Killed(BaseException):
    """Ends a training as nothing that the library handles."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Must not be changed."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(12):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an unbroken run leaves. Must not be changed."""
    folder = tmp_path_factory.mktemp("whole")
    train(photos, folder)
    return folder


def train(photos: Path, output: Path, *words: str) -> None:
    config = load_image_config("digits", [*SMALL, *words])
    images = find_images([photos])
    train_image_tokenizer(images, config, output, report=lambda _: None, run=output / "image.run")


def metrics(output: Path) -> list[dict[str, float]]:
    lines = (output / "image.run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("shape", [(16, 16), (40, 23), (11, 11)])
def test_ssim_is_that_of_scikit_image(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    noise = rng.normal(0, 30, first.shape)
    second = (first.astype(float) + noise).clip(0, 255).astype(np.uint8)
    pairs = [torch.tensor(x)[None].permute(0, 3, 1, 2) / 255 for x in (first, second)]
    found = ssim(*pairs).item()
    expected = structural_similarity(
        first,
        second,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert found == pytest.approx(expected, abs=1e-6)
    assert ssim(pairs[0], pairs[0]).item() == pytest.approx(1)
    small = [pixels[:, :, :1, :5] for pixels in pairs]  # which scikit-image refuses
    assert -1 < ssim(*small).item() < 1 and ssim(small[0], small[0]).item() == pytest.approx(1)


def test_psnr_of_a_known_error() -> None:
    assert psnr(0.01) == pytest.approx(20) and psnr(0) == 120


def test_which_images_are_held_out_depends_on_their_names_alone() -> None:
    names = [f"{index}.png" for index in range(1000)]
    entries = [ImageEntry(ImagePart(name), name) for name in names]
    kept, held_out = hold_out(entries, 0.1)
    # 0.1 of 1000 with a standard deviation of 9.5: five of them
    assert 52 < len(held_out) < 148 and len(kept) + len(held_out) == 1000
    _, fewer = hold_out(entries[::-2], 0.1)
    assert fewer == [entry for entry in entries[::-2] if entry in held_out]
    moved = [ImageEntry(ImagePart(name), f"/elsewhere/photos/{name}") for name in names]
    places = [entry.where.rpartition("/")[2] for entry in hold_out(moved, 0.1)[1]]
    assert places == [entry.where for entry in held_out]
    assert hold_out(entries, 0) == (entries, [])
    assert hold_out(held_out[:1], 0.1) == (held_out[:1], [])  # something must be trained on


def test_a_run_leaves_metrics_and_a_page(photos: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(photos, tmp_path / "photos")
    (photos / "03.png").write_bytes(b"no image")
    train(photos, tmp_path / "out")
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6, 8, 9, 9]
    logged = next(line for line in lines if "l1" in line)
    assert {"l1", "codebook", "commit", "lr", "images_per_second", "codes_used"} <= logged.keys()
    measured = [line for line in lines if "psnr" in line]
    assert all(0 < line["psnr"] < 60 and -1 <= line["ssim"] <= 1 for line in measured)
    assert all(0 < line["codebook_use"] <= 1 for line in measured)
    page = (tmp_path / "out" / "image.run" / "report.html").read_text()
    for words in ("Image tokenizer, step 9 of 9", "Spectrum of the codes", "PSNR", "Learning rate"):
        assert words in page
    held_out = re.search(r"Measured on (\d+) pictures that are not among the (\d+)", page)
    assert held_out and sum(map(int, held_out.groups())) in (12, 13)
    assert page.count("data:image/png") == int(held_out.group(1)) and "03.png" in page


def test_nothing_held_out_is_said(photos: Path, tmp_path: Path) -> None:
    train(photos, tmp_path / "out", "training.holdout=0")
    page = (tmp_path / "out" / "image.run" / "report.html").read_text()
    assert "Nothing is held out: measured on 12 pictures of those that are trained on." in page
    with_records = (tmp_path / "out" / "image.safetensors").read_bytes()
    config = load_image_config("digits", [*SMALL, "training.holdout=0"])
    train_image_tokenizer(find_images([photos]), config, tmp_path / "bare", report=lambda _: None)
    assert (tmp_path / "bare" / "image.safetensors").read_bytes() == with_records
    assert not (tmp_path / "bare" / "image.run").exists()
    assert fingerprint(tmp_path / "bare") == fingerprint(tmp_path / "out")


@pytest.mark.parametrize("at", ["step", "page", "metrics"])
def test_a_kill_leaves_the_metrics_of_an_unbroken_run(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    saving = "training.save_minutes=1e-9" if at != "metrics" else "training.save_minutes=0"
    with monkeypatch.context() as patch:
        honest = Trainer.step
        if at == "step":
            patch.setattr(Trainer, "step", lambda t, x, n: die() if n == 7 else honest(t, x, n))
        elif at == "page":
            patch.setattr(
                "megatron_chameleon.tokenizer.image.training.records.folder.report_page", die
            )
        else:
            patch.setattr(Trainer, "step", lambda t, x, n: die() if n == 5 else honest(t, x, n))
        with pytest.raises(Killed):
            train(photos, tmp_path / "out", saving)
    if at == "metrics":  # as cut by the kill
        path = tmp_path / "out" / "image.run" / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-9])
    train(photos, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "image.safetensors").read_bytes() == (whole / "image.safetensors").read_bytes()
    timed = {"seconds", "images_per_second"}
    without = [
        [{k: v for k, v in line.items() if k not in timed} for line in metrics(output)]
        for output in (whole, out)
    ]
    assert without[0] == without[1]


def test_a_disk_that_takes_no_page_does_not_end_the_training(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out" / "image.run" / "report.html").mkdir(parents=True)
    train(photos, tmp_path / "out")
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == 1 and "report.html: " in messages[0]
    assert messages[0].endswith("; the training continues without it")
    assert (tmp_path / "out" / "image.json").exists()


def test_the_command_names_the_cost_first_and_takes_a_run_folder(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [photos, "--output", tmp_path / "out", "--run", tmp_path / "run", "--config", "digits"]
    main(["tokenizer", "image", *map(str, words), *SMALL])
    cost = next(line for line in capsys.readouterr().out.splitlines() if " parameters" in line)
    assert re.match(r"220k parameters, fp32, about \S+ MiB of memory; \d+ pictures, \d+ held", cost)
    assert cost.endswith("epochs; the time is known after 3 steps")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "metrics.jsonl",
        "report.html",
    ]
    assert not (tmp_path / "out" / "image.run").exists()


def test_bf16_trains_where_the_machine_can_and_is_refused_elsewhere(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    can: Callable[[], bool] = torch.ops.mkldnn._is_mkldnn_bf16_supported
    words = ["training.dtype=bf16", "training.discriminator_weight=0.5"]
    words += ["training.discriminator_layers=1", "training.reseed_every_steps=3"]
    if can():
        train(photos, tmp_path / "bf16", *words)
        train(photos, tmp_path / "fp32", *words, "training.dtype=fp32")
        pairs = zip(metrics(tmp_path / "bf16"), metrics(tmp_path / "fp32"), strict=True)
        losses = [(x["l1"], y["l1"]) for x, y in pairs if "l1" in x]
        # bf16 has 8 bits: a relative error of 0.4%, over nine steps
        assert losses[0][0] != losses[0][1] and losses[0][0] == pytest.approx(
            losses[0][1], rel=0.02
        )
        details = json.loads((tmp_path / "bf16" / "image.json").read_text())
        assert details["training"]["dtype"] == "bf16"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(Exception, match=r"training\.dtype: this CPU cannot compute in bf16\. Use"):
        train(photos, tmp_path / "no", *words)
