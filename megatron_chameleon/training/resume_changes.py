"""What a resumed run does otherwise than the run that wrote its checkpoint, in numbers.

The settings so far are those of the checkpoint's config. The history in its ``state.json`` says
which steps had which mixture and batch size. Learning rates are those of ``run_learning_rate``,
which the engines use.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_chameleon.checkpoint.state.folders import load_checkpoint_config, load_state
from megatron_chameleon.checkpoint.state.resume import changed_settings
from megatron_chameleon.config.differences import ABSENT
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.mixture.mixture_history import (
    MixtureHistory,
    count_stage2_steps,
    stage2_begin,
)
from megatron_chameleon.data.mixture.phases import MixtureWeights
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.schedules.learning_rate import LearningRate
from megatron_chameleon.training.learning_rate import run_learning_rate
from megatron_chameleon.training.run.inputs import RunInputs
from megatron_chameleon.wording import counted

_LISTED = ("training.steps", "training.global_batch_size")
"""Settings whose change has a line with its effect, apart from those of the learning rate."""


@dataclass(frozen=True)
class _Plan:
    """What a run does by a config and a history."""

    config: Config
    history: MixtureHistory
    rate: LearningRate | None
    """None if the learning rate of the settings so far cannot be computed any more."""

    @property
    def steps(self) -> int:
        return self.config.training.steps

    def tokens_between(self, first: int, last: int) -> int:
        """Tokens that are read in the steps after ``first`` up to ``last``."""
        samples = self.history.first_sample(last) - self.history.first_sample(first)
        return samples * self.config.model.seq_length

    def batch_size(self, steps_done: int) -> int:
        """Sequences of the step after ``steps_done``."""
        return self.history.batch_size(steps_done)


def resume_lines(inputs: RunInputs) -> list[str]:
    """What to say at the start of a resumed run: where it is, and what changes from here on.

    Args:
        inputs: From ``prepare_run``.

    Returns:
        One line for what is left, and one for each change with the values before and after. Empty
        for a run that begins, also from bare weights or from the checkpoint of another program.
    """
    if inputs.checkpoint is None:
        return []
    state = load_state(inputs.checkpoint)
    is_same_run = state.get("optimizer") is not False and state.get("training_config") is not False
    if not is_same_run or state.get("data") is None:
        return []
    config, history, done = inputs.config, inputs.reader.history, int(state["step"])
    old_config = load_checkpoint_config(inputs.checkpoint)
    old_history = MixtureHistory.from_json(state["data"])
    old = _Plan(old_config, old_history, _rate(old_config, old_history))
    new = _Plan(config, history, _rate(config, history))
    changes = [
        *_steps(old, new, done),
        *_learning_rate(old, new, done),
        *_stages(old, new),
        *_batch_size(old, new, done),
        *_mixture(old, new),
        *_settings(inputs.checkpoint, config),
    ]
    left = new.steps - done
    head = (
        f"resumes after step {done:,} of {new.steps:,}: {counted(left, 'step')} and "
        f"{counted(new.tokens_between(done, new.steps), 'token')} left"
    )
    if not changes:
        return [f"{head}; no setting has changed"]
    return [f"{head}; from step {done + 1:,} on it changes:", *(f"  {line}" for line in changes)]


def _rate(config: Config, history: MixtureHistory) -> LearningRate | None:
    try:
        return run_learning_rate(config, history)
    except ChameleonError:
        return None


def _steps(old: _Plan, new: _Plan, done: int) -> Iterator[str]:
    if old.steps != new.steps:
        before = max(old.steps - done, 0)
        yield (
            f"training.steps: {old.steps:,} -> {new.steps:,}; left were {counted(before, 'step')} "
            f"and {counted(old.tokens_between(done, done + before), 'token')}"
        )


def _learning_rate(old: _Plan, new: _Plan, done: int) -> Iterator[str]:
    """The learning rate of the last step and of the next, if the next or the last one differ."""
    if old.rate is None or new.rate is None:
        return
    following, ends = done + 1, done >= old.steps
    if new.steps <= done:
        return
    planned = None if ends else old.rate.at(following)
    last = (old.rate.at(old.steps), new.rate.at(new.steps))
    if planned == new.rate.at(following) and last[0] == last[1]:
        return
    line = f"learning rate: {old.rate.at(done):.3g} at step {done:,} -> "
    line += f"{new.rate.at(following):.3g} at step {following:,}"
    if ends:
        line += f" (the run so far ended at step {old.steps:,})"
    elif planned != new.rate.at(following):
        line += f" (it would have been {planned:.3g})"
    yield f"{line}; {last[1]:.3g} at the last step {new.steps:,}" + (
        f" ({last[0]:.3g} at step {old.steps:,} so far)" if last[0] != last[1] else ""
    )


def _stages(old: _Plan, new: _Plan) -> Iterator[str]:
    texts = [
        _stage2(stage2_begin(plan.history, plan.steps), plan, count)
        for plan in (old, new)
        for count in [count_stage2_steps(plan.history, plan.steps)]
    ]
    if texts[0] != texts[1]:
        yield f"stage 2: {texts[0]} -> {texts[1]}"


def _stage2(begin: int | None, plan: _Plan, count: int) -> str:
    if not count:
        return "no steps"
    if begin is not None and plan.steps - begin == count:
        return f"{counted(count, 'step')} ({begin + 1:,} to {plan.steps:,})"
    return counted(count, "step")


def _batch_size(old: _Plan, new: _Plan, done: int) -> Iterator[str]:
    before, after = old.batch_size(done), new.batch_size(done)
    last = (old.batch_size(old.steps - 1), new.batch_size(new.steps - 1))
    if before == after and last[0] == last[1]:
        return
    length = new.config.model.seq_length
    line = (
        f"{before:,} -> {after:,} sequences ({before * length:,} -> {after * length:,} tokens per "
    )
    line = f"{line}step)" if before != after else f"{after:,} sequences as before"
    if (before, after) != last:  # it still grows
        line += "; at the last step " + (f"{last[0]:,} -> " if last[0] != last[1] else "")
        line += f"{last[1]:,}"
    yield f"global batch size: {line}"


def _mixture(old: _Plan, new: _Plan) -> Iterator[str]:
    """The shares of the sources by stage, where they differ."""
    weights = [plan.history.entries[-1].weights for plan in (old, new)]
    for stage in (1, 2):
        if stage == 2 and not any(w.stage2 for w in weights):
            continue
        before, after = (_shares(w, stage) for w in weights)
        if before != after:
            names = dict.fromkeys([*before, *after])
            parts = [_share_text(name, before.get(name), after.get(name)) for name in names]
            yield f"mixture of stage {stage}: {', '.join(part for part in parts if part)}"


def _shares(weights: MixtureWeights, stage: int) -> Mapping[str, float]:
    """The share of the tokens that each source has in a stage, by its key."""
    found = weights.of_stage(stage if weights.stage2 else 1)
    sources = weights.stage1 if stage == 1 else (*weights.stage1, *weights.stage2)
    return {s.key: found[s.key][0] if s.key in found else 0.0 for s in sources}


def _share_text(name: str, before: float | None, after: float | None) -> str:
    if before == after:
        return f"{name} {100 * (after or 0):.1f}%"
    if before is None:
        return f"{name} is new with {100 * (after or 0):.1f}%"
    if after is None:
        return f"{name} is removed (it had {100 * before:.1f}%)"
    return f"{name} {100 * before:.1f}% -> {100 * after:.1f}%"


def _settings(checkpoint: Path, config: Config) -> Iterator[str]:
    """The other settings that differ, in one line."""
    found = [
        f"{key} {old} -> {new}"
        for key, (old, new) in changed_settings(checkpoint, config).items()
        if key not in _LISTED and not _is_of_a_source(key, ABSENT in (old, new))
    ]
    if found:
        yield f"settings: {', '.join(found)}"


def _is_of_a_source(key: str, is_new: bool) -> bool:
    """Whether the line of the mixture has it: the prefix, name or weight of a source.

    So are all values of a source that was added or removed.
    """
    names = (".prefix", ".name", ".weight")
    return key.startswith(("data.stage1[", "data.stage2[")) and (is_new or key.endswith(names))
