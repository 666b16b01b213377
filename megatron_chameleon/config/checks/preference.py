"""Check that the settings of preference tuning fit the rest of the config."""

from collections.abc import Iterator

from megatron_chameleon.config.finetuning import DpoConfig
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError


def check_preference(config: Config) -> Iterator[ConfigError]:
    """Everything about ``training.objective: dpo`` that cannot work with the rest of the config."""
    if config.training.objective != "dpo":
        for key, default in vars(DpoConfig()).items():
            value = getattr(config.dpo, key)
            if value != default:
                what = f"{value:g} is set, but training.objective is {config.training.objective}"
                yield ConfigError(f"dpo.{key}", what, "Set training.objective=dpo, or remove it")
        return
    if config.data.reset_attention is False:
        what = "false lets one answer of a pair see the other"
        yield ConfigError("data.reset_attention", what, "Set it to true for training.objective=dpo")
    if config.data.loss_on == "all":
        what = "all includes the prompts, but training.objective=dpo compares answers"
        yield ConfigError("data.loss_on", what, "Use auto or answers")
    size = config.parallel.context_parallel_size
    if size > 1:
        what = f"{size} splits answers over ranks, which training.objective=dpo does not support"
        remedy = "Set it to 1; tensor and pipeline parallelism work"
        yield ConfigError("parallel.context_parallel_size", what, remedy)
