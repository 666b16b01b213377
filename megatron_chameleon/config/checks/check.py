"""Find config values that cannot work together, before any process group or model exists.

Every rule adds a ``ConfigError`` with the numbers and the remedy; all of them are raised together.
"""

import math
from collections.abc import Iterator

from megatron_chameleon.config.checks.engines import check_engine
from megatron_chameleon.config.checks.fp8 import check_fp8
from megatron_chameleon.config.checks.fusion import check_fusions
from megatron_chameleon.config.checks.layouts import check_layout
from megatron_chameleon.config.checks.reporting import check_reporting
from megatron_chameleon.config.schema import Config, ParallelConfig
from megatron_chameleon.errors import ConfigError, ConfigErrors

CHOICES = {
    "model.norm_order": ("pre", "swin"),
    "optimizer.lr_decay_style": ("exponential", "cosine", "constant"),
    "training.dtype": ("fp32", "bf16"),
    "data.loss_on": ("auto", "answers", "all"),
    "training.nonfinite": ("stop", "skip", "rollback"),
    "parallel.recompute_granularity": (None, "selective", "full"),
    "fp8.format": (None, "hybrid", "e4m3"),
    "fp8.recipe": ("delayed", "tensorwise"),
    "fp8.amax_compute_algo": ("max", "most_recent"),
    "engine.name": ("megatron", "deepspeed"),
}
POSITIVE = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.seq_length",
    "model.rotary_base",
    "model.init_method_std",
    "model.layernorm_epsilon",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.recompute_num_layers",
    "optimizer.lr",
    "optimizer.adam_eps",
    "training.steps",
    "training.micro_batch_size",
    "training.global_batch_size",
    "fp8.amax_history_len",
    "checkpoint.keep_last",
    "logging.every_steps",
)
NOT_NEGATIVE = (
    "optimizer.min_lr",
    "optimizer.lr_warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "training.seed",
    "training.z_loss",
    "training.nonfinite_limit",
    "training.hang_seconds",
    "fp8.margin",
    "fp8.num_layers_at_start_in_bf16",
    "fp8.num_layers_at_end_in_bf16",
    "checkpoint.every_steps",
    "checkpoint.keep_every",
    "logging.sample_every_steps",
)
SHARES = ("model.hidden_dropout", "data.stage1_fraction", "data.stage2_share")


def check_config(config: Config, world_size: int) -> None:
    """Raise for everything in ``config`` that cannot work on ``world_size`` processes.

    Raises:
        ConfigErrors: One entry for each problem.
    """
    problems = list(_check_values(config))
    if not problems:  # the rest divides by these values
        problems = [*_check_model(config), *_check_parallel(config), *check_engine(config)]
        problems += check_fusions(config)
        problems = problems or [*check_layout(config, world_size), *check_fp8(config)]
        problems += [*_check_schedule(config), *_check_data(config), *check_reporting(config)]
    if problems:
        raise ConfigErrors(problems)


def smallest_world_size(parallel: ParallelConfig) -> int:
    """Processes of one copy of the model, for a check before any were started."""
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    return math.prod(max(1, size) for size in sizes)


def get_value(config: Config, key: str) -> object:
    """The value of ``section.key``."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _check_values(config: Config) -> Iterator[ConfigError]:
    for key, choices in CHOICES.items():
        if (value := get_value(config, key)) not in choices:
            names = ", ".join("null" if c is None else str(c) for c in choices)
            yield ConfigError(key, f"{value!r} is not one of {names}", "Choose one of them")
    for keys, low, words in ((POSITIVE, 0, "above 0"), (NOT_NEGATIVE, -1, "0 or more")):
        for key in keys:
            value = get_value(config, key)
            assert isinstance(value, int | float)
            if not (value > 0 if low == 0 else value >= 0):
                yield ConfigError(key, f"{value} is not {words}", f"Give a number {words}")
    for key in SHARES:
        value = get_value(config, key)
        assert isinstance(value, float)
        if not 0 <= value <= 1:
            yield ConfigError(key, f"{value} is not between 0 and 1", "Give a share")


def _check_model(config: Config) -> Iterator[ConfigError]:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    groups = heads if groups is None else groups
    if model.hidden_size % heads:
        what = f"{model.hidden_size} does not divide by num_attention_heads {heads}"
        yield ConfigError("model.hidden_size", what, f"Use a multiple of {heads}")
    elif (model.hidden_size // heads) % 2:
        what = f"{model.hidden_size} / {heads} heads gives an odd head size"
        yield ConfigError("model.hidden_size", what, "RoPE needs an even one: change either")
    if groups < 1 or heads % groups:
        what = f"{groups} does not divide num_attention_heads {heads}"
        yield ConfigError("model.num_query_groups", what, _divisors(heads))
        return
    norm_groups = model.qk_norm_groups
    if norm_groups and (heads % norm_groups or norm_groups < 0):
        what = f"{norm_groups} does not divide num_attention_heads {heads}"
        yield ConfigError("model.qk_norm_groups", what, _divisors(heads))
    elif norm_groups and groups % min(norm_groups, groups):
        what = f"{norm_groups} does not divide num_query_groups {groups}"
        yield ConfigError("model.qk_norm_groups", what, _divisors(groups))


def _check_parallel(config: Config) -> Iterator[ConfigError]:
    """Settings that do not depend on the number of processes."""
    parallel = config.parallel
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        what = "true gathers the weights of the distributed optimizer, which is off"
        remedy = "Set parallel.use_distributed_optimizer=true or this to false"
        yield ConfigError("parallel.overlap_param_gather", what, remedy)
    elif parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        what = "true needs overlap_grad_reduce, which is off"
        yield ConfigError("parallel.overlap_param_gather", what, "Set both to true")
    if parallel.recompute_num_layers > 1 and parallel.recompute_granularity != "full":
        what = f"{parallel.recompute_num_layers} belongs to recompute_granularity full"
        yield ConfigError("parallel.recompute_num_layers", what, "Set it to 1, or recompute fully")
    if parallel.context_parallel_size > 1 and config.data.reset_attention:
        what = "true does not work with context_parallel_size above 1"
        remedy = "Set it to false, or parallel.context_parallel_size to 1"
        yield ConfigError("data.reset_attention", what, remedy)


def _check_schedule(config: Config) -> Iterator[ConfigError]:
    warmup, steps = config.optimizer.lr_warmup_steps, config.training.steps
    if warmup >= steps:
        what = f"{warmup} is not below training.steps {steps}"
        yield ConfigError("optimizer.lr_warmup_steps", what, f"Use at most {steps - 1}")
    if config.optimizer.min_lr > config.optimizer.lr:
        what = f"{config.optimizer.min_lr} is above lr {config.optimizer.lr}"
        yield ConfigError("optimizer.min_lr", what, "Use a smaller one")
    for step in config.training.skip_steps:
        if not 1 <= step <= steps:
            what = f"{step} is no step of the {steps}"
            yield ConfigError("training.skip_steps", what, f"Give steps from 1 to {steps}")


def _check_data(config: Config) -> Iterator[ConfigError]:
    if not config.tokenizer.path:
        yield ConfigError("tokenizer.path", "not set", "Give a folder of `chameleon tokenizer`")
    if not config.data.stage1:
        yield ConfigError("data.stage1", "no sources", "List at least one with prefix and weight")
    tokens = config.data.stage1_tokens
    if tokens is not None and tokens < 1:
        yield ConfigError("data.stage1_tokens", f"{tokens} is not above 0", "Give tokens, or null")
    if not 0 <= config.data.packing_reserve <= 0.5:
        what = f"{config.data.packing_reserve} is not between 0 and 0.5"
        yield ConfigError("data.packing_reserve", what, "Give a small share, such as 0.002")
    named: dict[str, str] = {}
    for stage in ("stage1", "stage2"):
        for i, source in enumerate(getattr(config.data, stage)):
            key = f"data.{stage}[{i}]"
            if source.name and source.name in named:
                what = f"{source.name!r} is the name of {named[source.name]} too"
                yield ConfigError(f"{key}.name", what, "Give each source a name of its own")
            named[source.name] = key
            if not source.prefix:
                yield ConfigError(f"{key}.prefix", "not set", "Give the path without .bin")
            if not 0 < source.weight < float("inf"):
                what = f"{source.weight} is no number above 0"
                yield ConfigError(
                    f"{key}.weight", what, "Give a weight above 0, or drop the source"
                )
            if source.repeat is not False and source.repeat < 1:
                what = f"{source.repeat} is no number of epochs"
                yield ConfigError(f"{key}.repeat", what, "Give true, false or a number from 1")
            if source.image_first is not None and not 0 <= source.image_first <= 1:
                what = f"{source.image_first} is not between 0 and 1"
                yield ConfigError(f"{key}.image_first", what, "Give a share, or null")


def _divisors(number: int) -> str:
    divisors = [str(d) for d in range(1, number + 1) if number % d == 0]
    return f"Use one of {', '.join(divisors)}"
