"""Hugging Face's ``config.json``, made from our config and turned back into it."""

from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.checkpoint.formats.base import read_json_object
from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.image.vqgan import VqganConfig

CONFIG_FILE = "config.json"
KNOWN = {
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "seq_length",
    "norm_order",
    "layernorm_epsilon",
    "rotary_base",
    "init_method_std",
}
"""Fields of our model config that Hugging Face's config has too."""
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""Settings for which our model has one value only. It is Hugging Face's default except for tied
embeddings."""
_VQ_NAMES = {
    "embed_dim": "embed_dim",
    "num_embeddings": "codebook_size",
    "latent_channels": "z_channels",
    "resolution": "resolution",
    "in_channels": "in_channels",
    "base_channels": "base_channels",
    "channel_multiplier": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "dropout": "dropout",
}


def build_config(
    model: ModelConfig, vocabulary: Vocabulary, vqgan: VqganConfig | None, dtype: torch.dtype
) -> Any:
    """Build HF's ``ChameleonConfig`` for our model.

    Args:
        model: Our model config.
        vocabulary: The vocabulary, for HF's ``vocabulary_map``.
        vqgan: The image tokenizer's shape; None leaves HF's default.
        dtype: The dtype of the tensors in the files.
    """
    from transformers import ChameleonConfig

    return ChameleonConfig(
        vocab_size=vocabulary.size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups or model.num_attention_heads,
        max_position_embeddings=model.seq_length,
        initializer_range=model.init_method_std,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
        swin_norm=model.norm_order == "swin",
        bos_token_id=vocabulary.bos,
        pad_token_id=vocabulary.pad,
        eos_token_id=vocabulary.eos,
        tie_word_embeddings=False,
        vocabulary_map=vocabulary_map(vocabulary),
        vq_config=None if vqgan is None else vq_config(vqgan),
        dtype=dtype,
        architectures=["ChameleonForConditionalGeneration"],
    )


def vocabulary_map(vocabulary: Vocabulary) -> dict[str, int]:
    """Token names and their ids as HF expects them, with ``<image>`` for the image placeholder.

    HF takes every name that begins with IMGIMG for an image code, so a learned text piece with such
    a name is left out.
    """
    codes = set(vocabulary.code_token_ids.tolist())
    names = {
        name: token_id
        for token_id, name in enumerate(vocabulary.tokens)
        if token_id in codes or not name.startswith("IMGIMG")
    }
    del names[vocabulary.tokens[vocabulary.image_placeholder]]
    return {**names, "<image>": vocabulary.image_placeholder}


def vq_config(vqgan: VqganConfig) -> dict[str, Any]:
    """The image tokenizer's shape under HF's names; both have attention in the mid block only."""
    values = {hf: getattr(vqgan, ours) for hf, ours in _VQ_NAMES.items()}
    return {**values, "channel_multiplier": list(vqgan.ch_mult)}


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a Chameleon model.

    Raises:
        CheckpointError: The file cannot be read, or it is of another architecture.
    """
    file = folder / CONFIG_FILE
    content = read_json_object(file, "Give a Hugging Face folder of a Chameleon model")
    if content.get("model_type") != "chameleon":
        raise CheckpointError(
            str(file),
            f"is the config of a {content.get('model_type')!r} model, not of 'chameleon'",
            "Give the folder of a Chameleon model",
        )
    return content


def model_of_config(content: dict[str, Any], where: str) -> tuple[ModelConfig, int]:
    """Our model config, and the vocabulary's size.

    Args:
        content: The content of ``config.json``.
        where: The path of ``config.json``, for errors.

    Raises:
        CheckpointError: A value is missing, or our model does not support it.
    """
    for key, only in _FIXED.items():
        if content.get(key, only) != only:
            what = f"{key} is {content[key]!r}, and only {only!r} is supported"
            raise CheckpointError(where, what, "Convert another checkpoint")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        what = f"the RoPE type is {rope_type!r}, and only 'default' is supported"
        raise CheckpointError(where, what, "Convert another checkpoint")
    try:
        heads = int(content["num_attention_heads"])
        theta = float(rope.get("rope_theta", content.get("rope_theta", 10000.0)))
        model = ModelConfig(
            num_layers=int(content["num_hidden_layers"]),
            hidden_size=int(content["hidden_size"]),
            ffn_hidden_size=int(content["intermediate_size"]),
            num_attention_heads=heads,
            num_query_groups=int(content.get("num_key_value_heads") or heads),
            seq_length=int(content.get("max_position_embeddings", 4096)),
            norm_order="swin" if content.get("swin_norm") else "pre",
            layernorm_epsilon=float(content.get("rms_norm_eps", 1e-5)),
            rotary_base=whole_rotary_base(theta, where),
            init_method_std=float(content.get("initializer_range", 0.02)),
        )
        return model, int(content["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        what = f"a value is missing or is not a number ({error!r})"
        raise CheckpointError(where, what, "Use a complete config.json") from error


def whole_rotary_base(theta: float, where: str) -> int:
    """RoPE's base as an integer, which megatron-core requires.

    Raises:
        CheckpointError: It is not a whole number.
    """
    if theta != int(theta):
        raise CheckpointError(
            where, f"rope_theta {theta} is not a whole number", "Convert another checkpoint"
        )
    return int(theta)


def vqgan_of_config(content: dict[str, Any], where: str) -> VqganConfig:
    """The image tokenizer's shape.

    Args:
        content: The content of ``config.json``.
        where: The path of ``config.json``, for errors.

    Raises:
        CheckpointError: It has attention in other places, or two values per latent.
    """
    values = content.get("vq_config") or {}
    if values.get("double_latent") or values.get("attn_resolutions"):
        raise CheckpointError(
            f"{where}: vq_config",
            "double_latent or attn_resolutions is set, which the image tokenizer does not have",
            "Convert another checkpoint",
        )
    return VqganConfig(**{ours: values[hf] for hf, ours in _VQ_NAMES.items() if hf in values})
