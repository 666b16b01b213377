"""Find config values that cannot work together, before any process group or model exists.

Every rule yields a ``ConfigError`` with the numbers and the remedy. All are raised together.
"""

import math
from collections.abc import Iterator

from megatron_chameleon.config.checks.adapters import check_adapter
from megatron_chameleon.config.checks.engines import check_engine
from megatron_chameleon.config.checks.epochs import check_epochs
from megatron_chameleon.config.checks.fp8 import check_fp8
from megatron_chameleon.config.checks.fusion import check_fusions
from megatron_chameleon.config.checks.layouts import check_layout, list_divisors
from megatron_chameleon.config.checks.preference import check_preference
from megatron_chameleon.config.checks.reporting import check_reporting
from megatron_chameleon.config.checks.schedules import check_ramp, check_schedules
from megatron_chameleon.config.constraints import find_violations
from megatron_chameleon.config.schema import (
    Config,
    ParallelConfig,
    SourceConfig,
    ValidationConfig,
    ValidationSourceConfig,
)
from megatron_chameleon.errors import ConfigError, ConfigErrors


def check_config(config: Config, world_size: int) -> None:
    """Refuse a config that cannot work on ``world_size`` processes.

    Raises:
        ConfigErrors: One entry per problem.
    """
    problems = [*find_violations(config), *check_epochs(config)]
    # Other checks divide by these values or compare them, so they must be valid before those run.
    if problems := problems or _check_combinations(config, world_size):
        raise ConfigErrors(problems)


def check_model(config: Config, world_size: int) -> None:
    """Refuse a model or a layout that cannot work, of a config that nothing is trained with.

    Raises:
        ConfigErrors: One entry per problem.
    """
    problems = list(find_violations(config))
    if not problems:
        problems = [*_check_model(config), *_check_parallel(config), *check_fusions(config)]
    if problems := problems or list(check_layout(config, world_size)):
        raise ConfigErrors(problems)


def _check_combinations(config: Config, world_size: int) -> list[ConfigError]:
    """Problems of values that are valid on their own but do not fit each other."""
    problems = [*_check_model(config), *_check_parallel(config), *check_engine(config)]
    problems += [*check_adapter(config), *check_preference(config)]
    problems += [*check_fusions(config), *check_ramp(config)]
    if not problems:  # suggesting a layout only makes sense for a model that can exist
        problems = [*check_layout(config, world_size), *check_fp8(config)]
    return [*problems, *check_schedules(config), *_check_data(config), *check_reporting(config)]


def smallest_world_size(parallel: ParallelConfig) -> int:
    """The number of processes of one copy of the model, for checks before any have started."""
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


def _check_model(config: Config) -> Iterator[ConfigError]:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    groups = heads if groups is None else groups
    if model.hidden_size % heads:
        what = f"{model.hidden_size} is not divisible by num_attention_heads {heads}"
        yield ConfigError("model.hidden_size", what, f"Use a multiple of {heads}")
    elif (model.hidden_size // heads) % 2:
        what = f"{model.hidden_size} / {heads} heads gives an odd head size"
        yield ConfigError("model.hidden_size", what, "Change either: RoPE needs an even size")
    if groups < 1 or heads % groups:
        what = f"{groups} does not divide num_attention_heads {heads}"
        yield ConfigError("model.num_query_groups", what, f"Use one of {list_divisors(heads)}")
        return
    norm_groups = model.qk_norm_groups
    if norm_groups and (heads % norm_groups or norm_groups < 0):
        what = f"{norm_groups} does not divide num_attention_heads {heads}"
        yield ConfigError("model.qk_norm_groups", what, f"Use one of {list_divisors(heads)}")
    elif norm_groups and groups % min(norm_groups, groups):
        what = f"{norm_groups} does not divide num_query_groups {groups}"
        yield ConfigError("model.qk_norm_groups", what, f"Use one of {list_divisors(groups)}")


def _check_parallel(config: Config) -> Iterator[ConfigError]:
    """Check the settings that do not depend on the number of processes."""
    parallel = config.parallel
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        what = "true gathers the weights of the distributed optimizer, which is off"
        remedy = "Set parallel.use_distributed_optimizer=true, or this to false"
        yield ConfigError("parallel.overlap_param_gather", what, remedy)
    elif parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        what = "true needs overlap_grad_reduce, which is off"
        yield ConfigError("parallel.overlap_param_gather", what, "Set both to true")
    if parallel.recompute_num_layers > 1 and parallel.recompute_granularity != "full":
        what = f"{parallel.recompute_num_layers} works only with recompute_granularity full"
        yield ConfigError(
            "parallel.recompute_num_layers", what, "Set it to 1, or recompute_granularity to full"
        )
    yield from _check_context_attention(config)


def _check_context_attention(config: Config) -> Iterator[ConfigError]:
    """Settings for which Transformer Engine has no attention under context parallelism.

    Torch's attention sees only a rank's own part of a sequence.
    """
    size = config.parallel.context_parallel_size
    if size == 1:
        return
    if config.data.reset_attention and config.training.dtype != "bf16":
        what = f"true with context_parallel_size {size} needs bf16, and training.dtype is fp32"
        remedy = "Set training.dtype=bf16, this to false, or parallel.context_parallel_size to 1"
        yield ConfigError("data.reset_attention", what, remedy)
    if config.fp8.format is not None and config.fp8.emulate:
        what = f"true excludes Transformer Engine, which context_parallel_size {size} needs"
        yield ConfigError("fp8.emulate", what, "Set parallel.context_parallel_size to 1")


def _check_data(config: Config) -> Iterator[ConfigError]:
    if not config.tokenizer.path:
        remedy = (
            "Give the folder that `chameleon tokenizer` wrote, or --start-from with weights to "
        )
        remedy += "inherit it from"
        yield ConfigError("tokenizer.path", "not set", remedy)
    if not config.data.stage1:
        remedy = "List at least one, with prefix and weight"
        yield ConfigError("data.stage1", "no sources", remedy)
    named: dict[str, str] = {}
    for stage in ("stage1", "stage2"):
        for i, source in enumerate(getattr(config.data, stage)):
            key = f"data.{stage}[{i}]"
            if source.name and source.name in named:
                what = f"{source.name!r} is also the name of {named[source.name]}"
                yield ConfigError(f"{key}.name", what, "Give each source a name of its own")
            named[source.name] = key
            yield from _check_source(source, key)

    yield from _check_validation(config.data.validation)
    if config.checkpoint.keep_best and not config.data.validation.sources:
        what = "true needs a held-out loss, but data.validation.sources lists no source"
        yield ConfigError("checkpoint.keep_best", what, "List at least one, or set it to false")


def _check_validation(validation: ValidationConfig) -> Iterator[ConfigError]:
    named: dict[str, str] = {}
    for i, source in enumerate(validation.sources):
        key = f"data.validation.sources[{i}]"
        if source.name and source.name in named:
            what = f"{source.name!r} is also the name of {named[source.name]}"
            yield ConfigError(f"{key}.name", what, "Give each source a name of its own")
        named[source.name] = key
        yield from _check_source(source, key)
    if validation.sources:
        return
    for name, value in (
        ("every_steps", validation.every_steps),
        ("max_tokens", validation.max_tokens),
    ):
        if value:
            what = f"{value:,} is set, but data.validation.sources lists no source"
            remedy = "List at least one, with its prefix, or remove it"
            yield ConfigError(f"data.validation.{name}", what, remedy)


def _check_source(source: SourceConfig | ValidationSourceConfig, key: str) -> Iterator[ConfigError]:
    if not source.prefix:
        remedy = "Give the path of the token files without .bin"
        yield ConfigError(f"{key}.prefix", "not set", remedy)
