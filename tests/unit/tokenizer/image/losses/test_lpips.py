from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.image.losses.lpips import CHANNELS, Lpips, read_backbone


@pytest.fixture(scope="module")
def backbone() -> dict[str, torch.Tensor]:
    """Random weights under the names of torchvision's vgg16."""
    rng = np.random.default_rng(0)
    weights: dict[str, torch.Tensor] = {}
    before, index = 3, 0
    for stage in CHANNELS:
        for width in stage:
            values = rng.standard_normal((width, before, 3, 3), dtype=np.float32)
            values *= np.float32((2 / (9 * before)) ** 0.5)
            bias = rng.standard_normal(width, dtype=np.float32) * np.float32(0.1)
            weights[f"features.{index}.weight"] = torch.from_numpy(values)
            weights[f"features.{index}.bias"] = torch.from_numpy(bias)
            before, index = width, index + 2
        index += 1
    return weights


@pytest.fixture(scope="module")
def file(backbone: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**backbone, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


def test_the_distance_is_that_of_the_published_package(file: Path) -> None:
    """The numbers are what ``lpips.LPIPS(net="vgg")`` of lpips 0.1.4 gives with these weights.

    They came out equal to the last bit on one machine; another one may add in another order, which
    changes the seventh digit.
    """
    rng = np.random.default_rng(1)
    images = [torch.from_numpy(rng.uniform(-1, 1, (2, 3, 32, 48)).astype("f")) for _ in range(2)]
    images[0].requires_grad_()
    distance = Lpips(file)(*images)
    distance.backward()
    assert distance.item() == pytest.approx(0.10893595218658447, rel=2e-6)
    gradient = images[0].grad
    assert gradient is not None
    assert gradient.double().norm().item() == pytest.approx(0.0022921419065863487, rel=1e-5)
    assert gradient[0, 0, 0, :3].tolist() == pytest.approx(
        [1.087506279873196e-05, 2.400432640570216e-05, -7.126475793484133e-06], rel=1e-4
    )


def test_positions_without_any_feature_have_a_gradient(file: Path) -> None:
    loss = Lpips(file)
    loss.features[0].bias -= 100
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    loss(image, torch.ones(1, 3, 16, 16)).backward()
    assert image.grad is not None and bool(torch.isfinite(image.grad).all())


def test_safetensors_and_half_precision_are_read_too(
    backbone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    first = backbone["features.0.weight"]
    path = tmp_path / "vgg16.safetensors"
    save_file({**backbone, "features.0.weight": first.half()}, path)
    found = read_backbone(path)
    assert found["0.weight"].dtype == torch.float32
    torch.testing.assert_close(found["0.weight"], first, rtol=1e-3, atol=1e-5)
    assert torch.equal(found["28.weight"], backbone["features.28.weight"]) and len(found) == 26


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("features.28.bias"), r"features\.28\.bias is missing, not \(512,\)"),
        (
            lambda w: w.update({"features.0.weight": torch.zeros(64, 1, 3, 3)}),
            r"features\.0\.weight is \(64, 1, 3, 3\), not \(64, 3, 3, 3\)",
        ),
        (
            lambda w: w.update({"features.0.bias": torch.full((64,), float("nan"))}),
            r"features\.0\.bias has values that are not finite",
        ),
        (lambda w: w.update({"features.0.bias": [1, 2]}), r"features\.0\.bias is missing"),
        (
            lambda w: [w.update({f"module.{k}": w.pop(k)}) for k in list(w)],
            r"features\.0\.weight is missing, .*its first tensor is module\.features\.0\.bias",
        ),
    ],
)
def test_a_file_of_another_network_is_refused(
    backbone: dict[str, torch.Tensor], tmp_path: Path, change, message: str
) -> None:
    weights = dict(backbone)
    change(weights)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(DataError, match=message) as refused:
        read_backbone(tmp_path / "other.pth")
    assert "training.perceptual=wavelet" in refused.value.remedy


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>404</html>", None])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None, suffix: str) -> None:
    path = tmp_path / f"vgg16{suffix}"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match="vgg16"):
        read_backbone(path)
