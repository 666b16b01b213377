"""Folders of image tokenizers as other libraries save them, tiny and with random weights."""

from pathlib import Path
from typing import Any

import torch

CODES = 64
EMU3 = {
    **{"codebook_size": CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32},
    **{"channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [2]},
    **{"hidden_size": 32, "temporal_downsample_factor": 4},
}
JANUS = {
    **{"num_embeddings": CODES, "embed_dim": 8, "latent_channels": 32, "base_channels": 32},
    **{"channel_multiplier": [1, 1, 2], "num_res_blocks": 1, "num_patches": 4},
}
CHAMELEON = {
    **{"num_embeddings": CODES, "embed_dim": 8, "latent_channels": 32, "base_channels": 32},
    **{"channel_multiplier": [1, 1, 2], "num_res_blocks": 1, "resolution": 16},
}
VQMODEL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    **{"block_out_channels": (32, 32, 64), "latent_channels": 4, "vq_embed_dim": 4},
    **{"num_vq_embeddings": CODES, "sample_size": 16},
}


def make(name: str) -> Any:
    """A network of its library: emu3, janus, chameleon, vqmodel or movqgan."""
    from transformers import (
        ChameleonVQVAE,
        ChameleonVQVAEConfig,
        Emu3VQVAE,
        Emu3VQVAEConfig,
        JanusVQVAE,
        JanusVQVAEConfig,
    )

    torch.manual_seed(0)
    if name in ("vqmodel", "movqgan"):
        from diffusers import VQModel

        norm = {"norm_type": "spatial"} if name == "movqgan" else {}
        model = VQModel(**VQMODEL, **norm)
        # the initial codebook is nearly one point, so that all images have the same code
        torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
        return model.eval()
    classes: dict[str, Any] = {
        "emu3": (Emu3VQVAE, Emu3VQVAEConfig, EMU3),
        "janus": (JanusVQVAE, JanusVQVAEConfig, JANUS),
        "chameleon": (ChameleonVQVAE, ChameleonVQVAEConfig, CHAMELEON),
    }
    network, config, values = classes[name]
    return network(config(**values)).eval()


def save(name: str, folder: Path) -> Path:
    """The folder of ``make``'s network, as its ``save_pretrained`` writes it."""
    make(name).save_pretrained(folder)
    return folder
