import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.tokenizer_corpus.images import ImageEntry, find_images
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.tokenizer.image.config import (
    ImageTokenizerConfig,
    ImageTrainingConfig,
    load_image_config,
)
from megatron_chameleon.tokenizer.image.losses.discriminator import PatchDiscriminator
from megatron_chameleon.tokenizer.image.shape import smallest_resolution
from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer, to_pixels
from megatron_chameleon.tokenizer.image.training import progress
from megatron_chameleon.tokenizer.image.training.batches import ImageSet, augment, training_batch
from megatron_chameleon.tokenizer.image.training.train import train_image_tokenizer
from megatron_chameleon.tokenizer.image.training.trainer import Trainer, learning_rate_share

Noise = Callable[..., Image.Image]


def tiny_config(*words: str) -> ImageTokenizerConfig:
    small = ["model.resolution=8", "model.ch_mult=[1,1]", "model.codebook_size=16"]
    small += ["model.z_channels=8", "model.embed_dim=8", "training.batch_size=8"]
    small += ["training.steps=12", "training.lr_warmup_steps=0", "training.log_every_steps=4"]
    return load_image_config("digits", [*small, "training.reseed_every_steps=4", *words])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve two-coloured squares."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        image = Image.new("RGB", (8, 8), tuple(rng.integers(0, 256, 3).tolist()))
        image.paste(tuple(rng.integers(0, 256, 3).tolist()), (0, 0, 4 + index % 4, 8))
        image.save(folder / f"{index:02d}.png")
    return folder


def train(photos: Path, output: Path, *words: str, seed: int = 1) -> list[str]:
    lines: list[str] = []
    config = tiny_config(*words)
    train_image_tokenizer(find_images([photos]), config, output, seed=seed, report=lines.append)
    return lines


def loss_of(line: str) -> float:
    words = line.split()
    return float(words[words.index("l1") + 1])


def test_training_learns_and_writes_a_tokenizer(photos: Path, tmp_path: Path) -> None:
    lines = train(photos, tmp_path / "out", "training.steps=80")
    assert len(lines) == 20 and lines[-1].startswith("step 80/80 l1 ")
    assert all(word in lines[0] for word in ("codebook", "commit", "codes", "images/s", "ETA"))
    # Random weights are off by about 0.5 of a range of 2; 80 steps on 12 images easily halve that.
    assert loss_of(lines[-1]) < 0.6 * loss_of(lines[0])
    tokenizer = ImageTokenizer.load(tmp_path / "out")
    images = [entry.open() for entry in find_images([photos])]
    missed = np.asarray(tokenizer.decode(tokenizer.encode(images))[0]).astype(float)
    missed -= np.asarray(images[0])
    details = json.loads((tmp_path / "out" / "image.json").read_text())
    assert details["seed"] == 1 and details["result"]["images"] == 12
    assert details["result"]["psnr"] > 10 and np.abs(missed).mean() < 80
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "image.json",
        "image.safetensors",
    ]


def test_the_same_seed_gives_the_same_weights(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(photos, tmp_path / name, "training.steps=6", seed=seed)
    weights = [(tmp_path / name / "image.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(torch.rand(1), expected_draw)  # the caller's generator is unchanged


def test_a_discriminator_joins_at_its_step(photos: Path, tmp_path: Path) -> None:
    words = ["training.discriminator_weight=0.5", "training.discriminator_layers=1"]
    lines = train(photos, tmp_path / "gan", *words, "training.discriminator_start=6")
    assert ["gan" in line and "disc" in line for line in lines] == [False, True, True]
    train(photos, tmp_path / "without")
    gan, without = ((tmp_path / n / "image.safetensors").read_bytes() for n in ("gan", "without"))
    assert gan != without


def test_the_discriminator_learns_to_tell(noise: Noise) -> None:
    config = tiny_config("training.discriminator_weight=1", "training.discriminator_layers=1")
    trainer = Trainer(config, seed=0, device=torch.device("cpu"))
    real = to_pixels(np.stack([np.asarray(noise(seed, (8, 8))) for seed in range(8)]))
    losses = [trainer.discriminator_step(real, torch.zeros_like(real)).item() for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("layers", [1, 3])
def test_the_smallest_resolution_leaves_a_patch(layers: int) -> None:
    smallest = smallest_resolution(layers)
    discriminator = PatchDiscriminator(3, 8, layers)
    assert discriminator(torch.zeros(2, 3, smallest, smallest)).shape == (2, 1, 1, 1)


def test_codes_that_nothing_chose_are_moved_to_latents() -> None:
    trainer = Trainer(tiny_config(), seed=0, device=torch.device("cpu"))
    pixels = torch.rand(8, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        trainer.model.quantize.embedding.weight[3:] = 100.0  # out of reach
    _, output = trainer.step(pixels, 0)
    trainer.uses_K += output.codes_BN.flatten().bincount(minlength=16)
    before = trainer.model.quantize.embedding.weight.detach().clone()
    trainer.reseed(output.latents_BDhw.detach(), 0)
    after = trainer.model.quantize.embedding.weight.detach()
    used = torch.zeros(16, dtype=torch.bool)
    used[output.codes_BN.unique()] = True
    assert torch.equal(after[used], before[used]) and not used[3:].any()
    rows = output.latents_BDhw.detach().permute(0, 2, 3, 1).reshape(-1, 8)
    assert (torch.cdist(after[~used], rows).min(dim=1).values < 1e-3).all()
    assert trainer.uses_K.sum() == 0


def test_a_moved_code_leaves_its_momentum_behind() -> None:
    trainer = Trainer(tiny_config(), seed=0, device=torch.device("cpu"))
    _, output = trainer.step(torch.rand(8, 3, 8, 8) * 2 - 1, 0)
    momentum = trainer.optimizer.state[trainer.model.quantize.embedding.weight]["exp_avg"]
    assert momentum.any()
    trainer.reseed(output.latents_BDhw.detach(), 0)  # as if none had been chosen since
    assert not momentum.any()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.quantizer=lfq", "model.embed_dim=4"], {"quantizer": "lfq"}),
        (["model.quantizer=ibq"], {"quantizer": "ibq"}),
        (["training.codebook=ema", "training.codebook_weight=0"], {}),
    ],
)
def test_other_quantizers_learn_and_are_read_again(
    photos: Path, tmp_path: Path, words: list[str], named: dict[str, str]
) -> None:
    lines = train(photos, tmp_path / "out", "training.steps=24", *words)
    assert loss_of(lines[-1]) < loss_of(lines[0])
    assert ("entropy" in lines[-1]) == bool(named)
    tokenizer = ImageTokenizer.load(tmp_path / "out")
    images = [entry.open() for entry in find_images([photos])]
    codes = tokenizer.encode(images)
    details = json.loads((tmp_path / "out" / "image.json").read_text())
    assert details["model"].get("quantizer") == named.get("quantizer")
    missed = np.stack([np.asarray(image) for image in tokenizer.decode(codes)]).astype(float)
    missed -= np.stack([np.asarray(image) for image in images])
    assert 10 * np.log10(255**2 / np.square(missed).mean()) == pytest.approx(
        details["result"]["psnr"],
        abs=0.1,  # pixels are rounded
    )
    assert (tokenizer.vqgan is None) == bool(named)  # no part of Meta's or Hugging Face's files


def test_unused_codes_are_moved_with_averages_too(photos: Path, tmp_path: Path) -> None:
    """Three in four codes begin out of reach; without moving them, they would stay there."""
    images = ImageSet(find_images([photos]), 8, 10**6)
    used = []
    for every in (0, 2):
        config = tiny_config("training.codebook=ema", f"training.reseed_every_steps={every}")
        torch.manual_seed(0)
        trainer = Trainer(config, seed=0, device=torch.device("cpu"))
        with torch.no_grad():
            trainer.model.quantize.embedding.weight[4:] = 100.0
        assert trainer.averages is not None
        trainer.averages.restart()
        for step in range(8):
            _, output = trainer.step(training_batch(images, config.training, 1, step), step)
            trainer.uses_K += output.codes_BN.flatten().bincount(minlength=16)
            if every and step % every == 0:
                trainer.reseed(output.latents_BDhw.detach(), step)
        used.append(trainer.model.encode(to_pixels(images.first(12))).unique().numel())
    assert used[0] <= 4 < used[1]


def test_a_step_sees_the_same_whenever_it_is_asked(photos: Path) -> None:
    images = ImageSet(find_images([photos]), 8, cache_bytes=10**6)
    uncached = ImageSet(find_images([photos]), 8, cache_bytes=0)
    config = tiny_config().training
    first = training_batch(images, config, seed=3, step=5)
    training_batch(images, config, seed=3, step=6)
    torch.testing.assert_close(training_batch(uncached, config, 3, 5), first, rtol=0, atol=0)
    assert not torch.equal(training_batch(images, config, seed=4, step=5), first)
    assert first.shape == (8, 3, 8, 8) and first.min() >= -1 and first.max() <= 1


def test_images_are_drawn_by_weight(photos: Path) -> None:
    paths = sorted(photos.iterdir())[:3]
    entries = [
        ImageEntry(ImagePart(str(path)), str(path), weight)
        for path, weight in zip(paths, (2, 1, 0), strict=True)
    ]
    images = ImageSet(entries, 8, cache_bytes=10**6)
    drawn = Counter(image.tobytes() for image in images.draw(3000, np.random.default_rng(0)))
    shares = [drawn[image.tobytes()] / 3000 for image in images.first(3)]
    # The share's standard deviation is 0.0086: four of them.
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0], atol=0.035)


def test_no_augmentation_moves_nothing_and_a_shift_moves_that_far() -> None:
    pixels = torch.rand(4, 3, 8, 8)
    still = augment(pixels, ImageTrainingConfig(), np.random.default_rng(0))
    torch.testing.assert_close(still, pixels, rtol=0, atol=1e-5)

    class Largest(np.random.Generator):
        def uniform(self, low: float, high: float, size: object = None) -> np.ndarray:  # type: ignore[override]
            return np.full(size, high)  # type: ignore[call-overload]

    rng = Largest(np.random.PCG64())
    shifted = augment(pixels, ImageTrainingConfig(shift=0.25), rng)
    torch.testing.assert_close(shifted[:, :, :6, :6], pixels[:, :, 2:, 2:], rtol=0, atol=1e-5)
    turned = augment(pixels, ImageTrainingConfig(rotate_degrees=90), rng)
    torch.testing.assert_close(turned.rot90(-1, (2, 3)), pixels, rtol=0, atol=1e-5)
    larger = augment(pixels, ImageTrainingConfig(scale=0.5), rng)
    assert (larger - pixels).abs().max() > 0.1


def test_corrupt_images_are_counted_listed_and_skipped(photos: Path, tmp_path: Path) -> None:
    (photos / "05.png").write_bytes(b"")
    (photos / "07.png").write_bytes((photos / "07.png").read_bytes()[:60])
    lines = train(photos, tmp_path / "out", "training.steps=4")
    assert lines[0].endswith("dropped 2")
    dropped = (tmp_path / "out" / "image.dropped.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["image"]).name for line in dropped] == ["05.png", "07.png"]
    reasons = [json.loads(line)["reason"] for line in dropped]
    assert reasons[0] == "the image has 0 bytes"
    assert reasons[1].startswith("the image of 60 bytes cannot be decoded (")
    assert str(photos) not in "".join(reasons)  # each line names the image once
    result = json.loads((tmp_path / "out" / "image.json").read_text())["result"]
    assert (result["images"], result["dropped"]) == (10, 2)
    for name in ("05.png", "07.png"):
        (photos / name).unlink()
    train(photos, tmp_path / "out", "training.steps=4")
    assert not (tmp_path / "out" / "image.dropped.jsonl").exists()


def test_a_corrupt_image_beyond_the_cache_is_dropped_when_drawn(photos: Path) -> None:
    (photos / "05.png").write_bytes(b"no image")
    images = ImageSet(find_images([photos]), 8, cache_bytes=0)
    assert not images.dropped
    assert images.draw(200, np.random.default_rng(0)).shape == (200, 8, 8, 3)
    assert list(images.dropped) == [5]


def test_a_reason_names_the_option_that_would_keep_the_image(photos: Path) -> None:
    Image.new("RGB", (20, 20)).save(photos / "05.png")
    images = ImageSet(find_images([photos], ImageOptions(max_pixels=399)), 8, cache_bytes=10**6)
    what = "the image is too large (400 pixels, the limit is 399). Make it smaller, or raise "
    assert images.dropped == {5: what + "--max-image-pixels"}


def test_nothing_but_corrupt_images_is_refused(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a.png: .* none of the 2 images can be used") as caught:
        train(tmp_path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "image.json").exists()


def test_a_codebook_that_does_not_fit_the_vocabulary_is_refused_before_training(
    photos: Path, new_tokenizer_folder: Path
) -> None:
    before = (new_tokenizer_folder / "image.json").read_bytes()
    with pytest.raises(
        ConfigError, match=r"model.codebook_size: 16 codes, but .*vocabulary.json has 32. Use"
    ):
        train(photos, new_tokenizer_folder, "training.steps=1000000")
    assert (new_tokenizer_folder / "image.json").read_bytes() == before


def test_the_learning_rate_rises_and_falls() -> None:
    config = ImageTrainingConfig(steps=110, lr_warmup_steps=9, lr_final=0.1)
    shares = [learning_rate_share(config, step) for step in range(110)]
    assert shares[0] == 0.1 and shares[9] == 1.0 == max(shares)
    assert shares[-1] == pytest.approx(0.1, abs=1e-3)
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert learning_rate_share(ImageTrainingConfig(steps=10), 9) == 1.0


def test_a_training_of_days_says_so_after_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines_of(**values: float) -> list[str]:
        clock = iter(range(0, 10_000, 10))
        monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
        lines: list[str] = []
        config = ImageTrainingConfig(**{"steps": 500_000, **values})  # type: ignore[arg-type]
        shown = progress.Progress(config, lines.append, progress.TrainingClock(config))
        for step in range(4):
            shown.step(step, {}, torch.zeros(1, 1, dtype=torch.int64), 0)
        return lines

    (line,) = lines_of()
    assert line.startswith("499,997 steps will take about 57d") and "training.steps=N" in line
    assert "it saves every 5m00s, and after a kill the same command continues" in line
    assert lines_of(steps=100) == ["97 steps will take about 16m10s here"]
    assert lines_of(steps=8) == []
    (line,) = lines_of(max_minutes=10)
    assert line.startswith("about 58 of 500,000 steps fit into training.max_minutes=10; with")
    (line,) = lines_of(max_minutes=10, log_every_steps=4)[1:]
    assert line.startswith("step 4/500000 ") and line.endswith(" ETA 8m50s")
