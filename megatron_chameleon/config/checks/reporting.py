"""Check what the trace, the events and the samples of a run need of the rest of its config."""

from collections.abc import Iterator

from megatron_chameleon.config.checks.epochs import known_steps
from megatron_chameleon.config.checks.on_event import check_on_event
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError


def check_reporting(config: Config) -> Iterator[ConfigError]:
    """Everything in ``logging`` and ``training.profile_steps`` that cannot work with the rest."""
    yield from _check_profile(config)
    yield from check_on_event(config.logging)
    if config.logging.sample_every_steps:
        yield from _check_samples(config)


def _check_profile(config: Config) -> Iterator[ConfigError]:
    steps, last = config.training.profile_steps, known_steps(config)
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= last):
        what = f"{steps} is not a first and last step between 1 and training.steps {last}"
        yield ConfigError(
            "training.profile_steps", what, "Write, for example, [10, 12], or [] for no trace"
        )


def _check_samples(config: Config) -> Iterator[ConfigError]:
    logging, pp = config.logging, config.parallel.pipeline_model_parallel_size
    key = "logging.sample_every_steps"
    every = logging.sample_every_steps
    later = "Set it to 0, and use `chameleon generate` on a checkpoint"
    if not logging.sample_prompts:
        what = f"{every}, but logging.sample_prompts is empty"
        yield ConfigError(
            key, what, "List a prompt, such as {text: a cat, force: image}, or set it to 0"
        )
    if pp > 1:
        what = (
            f"{every} needs the whole model in one stage, but pipeline_model_parallel_size is {pp}"
        )
        yield ConfigError(key, what, later)
    if config.engine.name == "deepspeed" and config.engine.zero_stage == 3:
        yield ConfigError(key, f"{every} needs whole weights, but ZeRO 3 splits them", later)
