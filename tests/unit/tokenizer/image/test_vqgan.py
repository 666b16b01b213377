import pytest
import torch
from torch.nn import functional

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.tokenizer.image.config import load_image_config
from megatron_chameleon.tokenizer.image.quantizers import codebook
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig


def small_config(**changes: object) -> VqganConfig:
    values = {
        "resolution": 16,
        "base_channels": 32,
        "ch_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "z_channels": 12,
        "embed_dim": 8,
        "codebook_size": 24,
    }
    return VqganConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def model() -> Vqgan:
    torch.manual_seed(0)
    model = Vqgan(small_config())
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes(model: Vqgan, pixels: torch.Tensor) -> None:
    codes = model.encode(pixels)
    assert codes.shape == (3, 16) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 24
    assert model.latents(pixels).shape == (3, 8, 4, 4)
    assert model.decode(codes).shape == (3, 3, 16, 16)


def test_codes_are_row_major(model: Vqgan, pixels: torch.Tensor) -> None:
    latents = model.latents(pixels)
    distance = (latents[:, :, 1, 2, None] - model.quantize.embedding.weight.T).square().sum(1)
    torch.testing.assert_close(model.encode(pixels)[:, 1 * 4 + 2], distance.argmin(1))
    grid = model.quantize.lookup(torch.arange(16)[None], (4, 4))
    torch.testing.assert_close(grid[0, :, 1, 2], model.quantize.embedding.weight[6])


def test_the_decoder_sees_codebook_vectors_only(model: Vqgan, pixels: torch.Tensor) -> None:
    """What training reconstructs is what decoding the codes gives, to float32's rounding."""
    output = model(pixels)
    torch.testing.assert_close(
        output.reconstruction_BCHW, model.decode(output.codes_BN), rtol=1e-4, atol=1e-5
    )


def test_the_gradient_goes_straight_through_to_the_encoder(
    model: Vqgan, pixels: torch.Tensor
) -> None:
    before = pixels.clone()
    functional.l1_loss(model(pixels).reconstruction_BCHW, pixels).backward()
    assert model.encoder.conv_in.weight.grad is not None
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantize.embedding.weight.grad is None
    torch.testing.assert_close(pixels, before, rtol=0, atol=0)


def test_each_of_the_two_losses_moves_its_own_side(model: Vqgan, pixels: torch.Tensor) -> None:
    output = model(pixels)
    output.codebook_loss.backward(retain_graph=True)
    assert model.quantize.embedding.weight.grad is not None
    assert model.encoder.conv_in.weight.grad is None
    model.zero_grad()
    output.commitment_loss.backward()
    assert model.quantize.embedding.weight.grad is None
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_the_paper_preset_has_the_released_shape() -> None:
    config = load_image_config("chameleon_512").model
    assert (config.codes_per_image, config.downsampling) == (1024, 16)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Vqgan(config).state_dict().items()}
    assert shapes["quantize.embedding.weight"] == (8192, 256)
    assert shapes["encoder.down.3.downsample.conv.weight"] == (256, 256, 3, 3)
    assert shapes["encoder.down.4.block.0.nin_shortcut.weight"] == (512, 256, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.conv_in.weight"] == (512, 256, 3, 3)
    assert shapes["decoder.up.4.block.2.conv2.weight"] == (512, 512, 3, 3)
    assert shapes["decoder.up.1.upsample.conv.weight"] == (128, 128, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert "decoder.up.0.block.3.conv1.weight" not in shapes
    assert shapes["decoder.conv_out.weight"] == (3, 128, 3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_channels": 40}, "model.base_channels: 40 is not a multiple of 32.* Use 64"),
        ({"resolution": 18}, "model.resolution: 18 is not a multiple of 4.*Use 20,"),
        ({"ch_mult": []}, "model.ch_mult"),
        ({"ch_mult": [1, 0]}, "model.ch_mult"),
        ({"codebook_size": 1}, "model.codebook_size: 1 is not between 2"),
        ({"embed_dim": 0}, "model.embed_dim: 0 is not between 1"),
    ],
)
def test_a_shape_that_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**changes).check("small.yaml")


@torch.inference_mode()
def test_the_search_in_steps_gives_the_same_codes(
    model: Vqgan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties included: of equal codebook vectors the first is chosen."""
    weight = model.quantize.embedding.weight
    weight[12:] = weight[:12]
    latents = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(2))
    flat = latents.movedim(1, 3).flatten(0, 2)
    distances = flat.square().sum(1, keepdim=True) + weight.square().sum(1) - 2 * flat @ weight.T
    monkeypatch.setattr(codebook, "SEARCH_ROWS", 32)
    found = model.quantize.nearest(latents)
    assert torch.equal(found.flatten(), distances.argmin(1))
    assert found.shape == (5, 16) and found.max() < 12


@torch.inference_mode()
def test_bf16_with_channels_last_gives_nearly_the_same(model: Vqgan, pixels: torch.Tensor) -> None:
    latents, codes = model.latents(pixels), model.encode(pixels)
    decoded = model.decode(codes)
    model.convolve_in(torch.bfloat16, torch.channels_last)
    assert model.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.quantize.embedding.weight.dtype == torch.float32
    other = model.latents(pixels.to(memory_format=torch.channels_last))
    assert other.dtype == torch.bfloat16
    assert (other - latents).norm() < 0.03 * latents.norm()
    assert (model.encode(pixels) == codes).float().mean() > 0.9
    assert (model.decode(codes) - decoded).norm() < 0.05 * decoded.norm()


@torch.inference_mode()
def test_the_networks_can_be_compiled(model: Vqgan, pixels: torch.Tensor) -> None:
    """Each as one graph, which is traced and functionalised here but not translated."""
    codes, names = model.encode(pixels), set(model.state_dict())
    decoded = model.decode(codes)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_networks("aot_eager")
    assert torch.equal(model.encode(pixels), codes)
    torch.testing.assert_close(model.decode(codes), decoded)
    assert set(model.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
