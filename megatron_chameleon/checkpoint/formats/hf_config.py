"""Hugging Face's ``config.json``, made from our config and turned back into it."""

from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.checkpoint.formats.base import read_values
from megatron_chameleon.checkpoint.names.architecture import ARCHITECTURE, bounds, check_model
from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.errors import ChameleonError, CheckpointError
from megatron_chameleon.tokenizer.common.vocabulary import IMAGE_PLACEHOLDER, Vocabulary
from megatron_chameleon.tokenizer.image.facts import TRANSFORMERS_NAMES, transformers_vqgan
from megatron_chameleon.tokenizer.image.shape import VqganConfig
from megatron_chameleon.values import Values, describe

CONFIG_FILE = "config.json"
KNOWN = (*ARCHITECTURE, "seq_length", "init_method_std")
"""Fields of our model config that Hugging Face's config has too."""
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""Settings for which our model has one value only. It is Hugging Face's default except for tied
embeddings."""


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
    values = {hf: getattr(vqgan, ours) for hf, ours in TRANSFORMERS_NAMES.items()}
    return {**values, "channel_multiplier": list(vqgan.ch_mult)}


def read_config(folder: Path) -> Values:
    """Read ``config.json`` of a Chameleon model.

    Raises:
        CheckpointError: The file cannot be read, or it is of another architecture.
    """
    values = read_values(folder / CONFIG_FILE, "Give a Hugging Face folder of a Chameleon model")
    if (found := values.content.get("model_type")) != "chameleon":
        raise values.error(f"model_type is {describe(found)}, not 'chameleon'")
    return values


def model_of_config(config: Values) -> tuple[ModelConfig, int]:
    """Our model config, and the vocabulary's size.

    Args:
        config: What ``config.json`` says.

    Raises:
        CheckpointError: A value is missing or cannot be, or our model does not support it.
    """
    for key, only in _FIXED.items():
        if (found := config.content.get(key, only)) != only:
            raise _unsupported(config, f"{key} is {describe(found)}, and only {only!r} is")
    rope = config.section("rope_parameters", config.section("rope_scaling", {}).content)
    rope_type = rope.content.get("rope_type", rope.content.get("type", "default"))
    if rope_type != "default":
        raise _unsupported(config, f"the RoPE type is {describe(rope_type)}, and only 'default' is")
    heads = config.whole("num_attention_heads", *bounds("num_attention_heads"))
    base = bounds("rotary_base")
    theta = rope.number("rope_theta", *base, config.number("rope_theta", *base, 10000.0))
    model = ModelConfig(
        num_layers=config.whole("num_hidden_layers", *bounds("num_layers")),
        hidden_size=config.whole("hidden_size", *bounds("hidden_size")),
        ffn_hidden_size=config.whole("intermediate_size", *bounds("ffn_hidden_size")),
        num_attention_heads=heads,
        num_query_groups=config.whole("num_key_value_heads", 1, heads, heads),
        seq_length=config.whole("max_position_embeddings", *bounds("seq_length"), 4096),
        norm_order="swin" if config.flag("swin_norm", False) else "pre",
        layernorm_epsilon=config.number("rms_norm_eps", *bounds("layernorm_epsilon"), 1e-5),
        rotary_base=whole_rotary_base(theta, config.where),
        init_method_std=config.number("initializer_range", *bounds("init_method_std"), 0.02),
    )
    check_model(model, config.where)
    return model, config.whole("vocab_size", low=1)


def _unsupported(config: Values, what: str) -> ChameleonError:
    return CheckpointError(config.where, f"{what} supported", "Convert another checkpoint")


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


def token_ids_of_config(config: Values) -> dict[str, int]:
    """The ids of the tokens that ``vocabulary_map`` names, except for the image placeholder.

    Hugging Face calls that one by a name of its own. A value that is no id is left out.
    """
    names = config.section("vocabulary_map", {}).content
    return {n: i for n, i in names.items() if type(i) is int and n != IMAGE_PLACEHOLDER}


def vqgan_of_config(config: Values) -> VqganConfig:
    """The image tokenizer's shape.

    Args:
        config: What ``config.json`` says.

    Raises:
        CheckpointError: A value cannot be, or it has attention in other places or two values per
            latent.
    """
    values = config.section("vq_config", {})
    if values.content.get("double_latent") or values.content.get("attn_resolutions"):
        raise CheckpointError(
            values.where,
            "double_latent or attn_resolutions is set, which the image tokenizer does not have",
            "Convert another checkpoint",
        )
    return transformers_vqgan(
        Values(values.content, values.where, "Use the config.json of the checkpoint")
    )
