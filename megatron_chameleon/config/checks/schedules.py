"""Check that the schedules of a run, and the steps that its config names, fit into the run.

What depends on the history of the run is checked where the history is known
(``training/learning_rate.py``).
"""

from collections.abc import Iterator

from megatron_chameleon.config.checks.epochs import known_steps
from megatron_chameleon.config.schema import Config, OptimizerConfig
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.wording import shown

MOST_INCREMENTS = 1000
"""Of a batch-size warm-up; the history in each checkpoint lists its sizes."""
WSD_PLACES = ("lr_wsd_decay_steps", "lr_wsd_decay_tokens", "lr_wsd_decay_on")


def check_schedules(config: Config) -> Iterator[ConfigError]:
    """Problems of the learning rate's schedule and of lists of steps."""
    warmup, steps = config.optimizer.lr_warmup_steps, known_steps(config)
    if warmup >= steps:
        what = f"{warmup} is not below training.steps {steps}"
        yield ConfigError("optimizer.lr_warmup_steps", what, f"Use at most {steps - 1}")
    if config.optimizer.min_lr > config.optimizer.lr:
        what = f"{config.optimizer.min_lr} is above lr {config.optimizer.lr}"
        yield ConfigError("optimizer.min_lr", what, f"Use at most {config.optimizer.lr}")
    if config.optimizer.lr_decay_style == "wsd":
        yield from _check_wsd(config)
    else:
        yield from _check_unused(config.optimizer)
    for step in config.training.skip_steps:
        if not 1 <= step <= steps:
            what = f"{step} is not one of the {steps} steps"
            yield ConfigError("training.skip_steps", what, f"Give steps from 1 to {steps}")


def _check_wsd(config: Config) -> Iterator[ConfigError]:
    values, steps = config.optimizer, known_steps(config)
    given = [f"optimizer.{name}" for name in WSD_PLACES if getattr(values, name) is not None]
    if not given:
        what = "wsd does not say where the decay begins"
        fifth = max(2, (config.training.steps or 100) // 5)
        remedy = f"Set optimizer.lr_wsd_decay_steps, such as {fifth} for the last fifth of the run"
        remedy += ", optimizer.lr_wsd_decay_tokens or optimizer.lr_wsd_decay_on"
        yield ConfigError("optimizer.lr_decay_style", what, remedy)
    if len(given) > 1:
        what = f"{', '.join(given[1:])} {'is' if len(given) == 2 else 'are'} set too, and each of "
        what += "them says where the decay of wsd begins"
        yield ConfigError(given[0], what, "Keep one of them, and set the others to null")
    decay, warmup = values.lr_wsd_decay_steps, values.lr_warmup_steps
    if decay is not None and warmup < steps < decay + warmup:
        what = f"{decay} steps of decay and {warmup} of warm-up do not fit into training.steps "
        what += str(steps)
        longest = steps - warmup
        remedy = f"Use at most {longest}" if longest >= 2 else "Use more steps or a shorter warm-up"
        yield ConfigError("optimizer.lr_wsd_decay_steps", what, remedy)
    if values.lr_wsd_decay_on == "stage2" and not config.data.stage2:
        what = "stage2 needs data.stage2, which has no sources"
        remedy = "List its sources, or place the decay by optimizer.lr_wsd_decay_steps"
        yield ConfigError("optimizer.lr_wsd_decay_on", what, remedy)


def _check_unused(values: OptimizerConfig) -> Iterator[ConfigError]:
    """Refuse values that only wsd reads: whoever sets them expects another schedule."""
    defaults = OptimizerConfig()
    for name in ("lr_wsd_decay_style", *WSD_PLACES):
        value, default = getattr(values, name), getattr(defaults, name)
        if value != default:
            what = f"{value} has no effect with lr_decay_style {values.lr_decay_style}"
            back = "null" if default is None else default
            remedy = f"Set optimizer.lr_decay_style to wsd, or this to {back}"
            yield ConfigError(f"optimizer.{name}", what, remedy)


def check_ramp(config: Config) -> Iterator[ConfigError]:
    """Problems of the batch-size warm-up that do not depend on the layout."""
    training, key = config.training, "training.rampup_batch_size"
    ramp, size = training.rampup_batch_size, training.global_batch_size
    if not ramp:
        return
    if len(ramp) != 3:
        what = f"{shown(ramp)} is not [start, increment, samples]"
        yield ConfigError(key, what, "Write three numbers, or [] for no batch-size warm-up")
        return
    start, increment, _ = ramp
    if start >= size:
        what = f"its start {start} is not below global_batch_size {size}"
        yield ConfigError(key, what, "Use a smaller start, or [] for no batch-size warm-up")
    elif (size - start) % increment:
        what = f"increments of {increment} lead from {start} to {size - (size - start) % increment}"
        what += f", not to global_batch_size {size}"
        yield ConfigError(key, what, f"Use an increment that divides {size - start}")
    elif (size - start) // increment > MOST_INCREMENTS:
        what = f"{(size - start) // increment:,} increments of {increment} are more than "
        what += f"{MOST_INCREMENTS:,}"
        least = -(-(size - start) // MOST_INCREMENTS)
        yield ConfigError(key, what, f"Use an increment of at least {least}")
