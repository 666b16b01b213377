"""Our VQGAN encoder compared with ``ChameleonVQVAE`` of transformers."""

import pytest
import torch

from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig

LATENT_TOLERANCE = 1e-5
"""fp32 rounding through about thirty layers, outputs of order 1, and another attention kernel."""


def reference(config: VqganConfig) -> torch.nn.Module:
    from transformers.models.chameleon.modeling_chameleon import (
        ChameleonVQVAE,
        ChameleonVQVAEConfig,
    )

    return ChameleonVQVAE(
        ChameleonVQVAEConfig(
            embed_dim=config.embed_dim,
            num_embeddings=config.codebook_size,
            latent_channels=config.z_channels,
            resolution=config.resolution,
            base_channels=config.base_channels,
            channel_multiplier=config.ch_mult,
            num_res_blocks=config.num_res_blocks,
        )
    ).eval()


@pytest.mark.parametrize(
    "config",
    [
        VqganConfig(16, 3, 32, [1, 2, 2], 1, 32, 32, 128),
        VqganConfig(32, 3, 64, [1, 1, 2, 2, 4], 2, 24, 16, 512),
    ],
)
def test_latents_and_codes_are_those_of_transformers(config: VqganConfig) -> None:
    torch.manual_seed(0)
    ours = Vqgan(config).eval()
    pixels = torch.rand(5, 3, config.resolution, config.resolution) * 2 - 1
    with torch.no_grad():  # spread the codebook like the latents, so that many codes are used
        latents_MD = ours.latents(pixels).movedim(1, 3).flatten(0, 2)
        spread_KD = torch.randn(config.codebook_size, config.embed_dim) * latents_MD.std(dim=0)
        ours.quantize.embedding.weight.copy_(latents_MD.mean(dim=0) + spread_KD)
    weights = {k: v for k, v in ours.state_dict().items() if not k.startswith("decoder.")}
    theirs = reference(config)
    theirs.load_state_dict(weights)  # strict: the names must be the same
    with torch.inference_mode():
        expected = theirs.encode(pixels.clone())
        expected_latents = theirs.quant_conv(expected.last_hidden_state)
        latents, codes = ours.latents(pixels), ours.encode(pixels)
    assert expected_latents.std() > 0.05  # large enough for the tolerance to mean something
    torch.testing.assert_close(latents, expected_latents, rtol=0, atol=LATENT_TOLERANCE)
    assert codes.unique().numel() > codes.numel() / 2
    assert codes.flatten().tolist() == expected.image_tokens.flatten().tolist()
