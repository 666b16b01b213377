"""The options of vLLM that a server may set, ``--engine-option NAME=VALUE``."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import ConfigError, one_line
from megatron_chameleon.files import read_json_object

OPTION = "--engine-option"
PROCESSOR = "megatron_chameleon.inference.vllm.plugins.processor:ChameleonProcessor"

FIXED: dict[str, Any] = {
    "skip_tokenizer_init": True,  # the server has our tokenizers
    "logits_processors": [PROCESSOR],
    "generation_config": "vllm",  # each request says how to draw
    "disable_log_stats": True,
    "enable_batch_sharded_sampling": False,  # all passes of an image must be on one rank
    "enable_log_requests": False,
}
"""What the rules depend on, and what belongs to the server."""

REFUSED = (
    "model",
    "model_weights",
    "served_model_name",
    "tokenizer",
    "tokenizer_mode",
    "tokenizer_revision",
    "runner",
    "convert",
    "model_impl",
    "model_class_overrides",
    "hf_overrides",
    "enable_chunked_prefill",
    "async_scheduling",
    "scheduler_cls",
    "speculative_config",
    "spec_method",
    "spec_model",
    "spec_tokens",
    "diffusion_config",
    "watermark_config",
    "enable_prompt_embeds",
    "enable_lora",
    "enable_trace_replay",
    "override_generation_config",
    "logging_config",
    "log_level",
    "log_config_file",
    "trust_remote_code",
)
CPU_CACHE_BYTES = 4 * 2**30
"""vLLM takes nearly all memory of a machine without a GPU, beside what other programs have."""


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` texts, with values in YAML; names may have ``-`` for ``_``.

    Raises:
        ConfigError: A text has no value, or two have the same name.
    """
    import yaml

    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name or not value.strip():
            remedy = f"Write {OPTION} NAME=VALUE, such as {OPTION} max_num_seqs=64"
            raise ConfigError(OPTION, f"{text!r} is not NAME=VALUE", remedy)
        if name in options:
            raise ConfigError(OPTION, f"{name} is given twice", "Give each option once")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            what = f"the value of {name} is not YAML: {one_line(error)}"
            raise ConfigError(OPTION, what, "Quote it") from error
    return options


def engine_arguments(folder: Path, options: dict[str, Any]) -> Any:
    """vLLM's ``AsyncEngineArgs``.

    Raises:
        ConfigError: vLLM does not have an option, or it is not the user's to set.
    """
    import vllm.envs
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    known = {field.name for field in fields(AsyncEngineArgs)}
    for name in options:
        if name not in known:
            remedy = "See the engine arguments in vLLM's documentation"
            raise ConfigError(OPTION, f"vLLM has no option {name!r}", remedy)
        if name in REFUSED or name in FIXED or name.startswith(("_", "data_parallel")):
            what = f"{name} cannot be set, because the rules of images and text depend on it"
            raise ConfigError(OPTION, what, "Leave it out")
    # its own default, "auto", rounds fp32 weights to 16 bits
    given = {"dtype": _stored_dtype(folder), **options}
    if current_platform.is_cpu():
        given.setdefault("enforce_eager", True)  # compiling needs minutes and a C++ compiler
        sizes = {"kv_cache_memory_bytes", "gpu_memory_utilization"} & given.keys()
        if not sizes and not vllm.envs.VLLM_CPU_KVCACHE_SPACE:
            given["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    return AsyncEngineArgs(model=str(folder), **FIXED, **given)


def _stored_dtype(folder: Path) -> str:
    config = read_json_object(folder / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return dtype if isinstance(dtype, str) else "auto"
