"""When held-out loss rises while training loss falls, one line says so, once per turn."""

import math

import pytest

from megatron_chameleon.training.metrics.overfitting import HeldOutTurn, OverfittingAlarm


def turns(training, held_out, every=10, kind=""):
    """The turns of a run: training loss of each step, held-out loss after every ``every`` steps."""
    alarm, found, key = OverfittingAlarm(), [], f"loss_{kind}" if kind else "loss"
    for step, loss in enumerate(training, start=1):
        metrics = {"step": step, key: loss}
        if step % every == 0:
            metrics[f"validation/{key}"] = held_out[step // every - 1]
        if (turn := alarm.observe(metrics)) is not None:
            found.append(turn)
    return found


FALLING = [4.0 / (1 + step / 50) for step in range(200)]


def test_the_turn_names_the_lowest_step():
    held_out = [3.5, 3.0, 2.8, 2.6, 2.5, 2.52, 2.55, 2.7, 2.9, 3.1] + [3.2] * 10
    (turn,) = turns(FALLING, held_out)
    assert (turn.step, turn.lowest_step, turn.lowest_held_out_loss) == (70, 50, 2.5)
    assert turn.held_out_loss == 2.55
    assert turn.lowest_loss == pytest.approx(sum(FALLING[40:50]) / 10)
    assert turn.loss == pytest.approx(sum(FALLING[60:70]) / 10)
    words = "step 70: held-out loss has risen from 2.5000 at step 50, its lowest, to 2.5500, while "
    assert str(turn).startswith(words + "training loss fell from 2.1184 to 1.7478")


@pytest.mark.parametrize(
    ("held_out", "why"),
    [
        ([3 - n / 50 for n in range(20)], "it falls"),
        ([3.0, 2.5] + [2.52] * 18, "it rises by less than a hundredth"),
        ([3.0, 2.5, 2.6] * 6 + [2.4, 2.3], "one measurement above the lowest is no rise yet"),
        ([2.5] * 20, "it stands still"),
        ([3.0, 2.5] + [None, math.nan] * 9, "it is not known"),
    ],
)
def test_no_turn(held_out, why):
    if why.startswith("one"):
        held_out = [2.5, 2.6, 2.49, 2.6] * 5
        held_out = [loss - n * 0.02 for n, loss in enumerate(held_out)]
    assert turns(FALLING, held_out) == [], why


def test_no_turn_while_training_loss_rises_too():
    """A run that diverges does not memorize."""
    assert turns([2.0 + step / 100 for step in range(200)], [2 + n / 10 for n in range(20)]) == []


def test_a_second_turn_needs_a_new_lowest():
    held_out = [3.0, 2.5, 2.6, 2.7, 2.8, 2.9, 2.4, 2.5, 2.6, 2.7] + [2.8] * 10
    assert [(turn.step, turn.lowest_step) for turn in turns(FALLING, held_out)] == [
        (40, 20),
        (90, 70),
    ]


def test_a_modality_may_turn_alone():
    held_out = [3.0, 2.5, 2.6, 2.7] + [2.8] * 16
    (turn,) = turns(FALLING, held_out, kind="text")
    assert turn.kind == "text" and "held-out text loss has risen" in str(turn)


def test_a_modality_is_no_news_once_all_have_turned():
    alarm, found = OverfittingAlarm(), []
    held_out = [3.0, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 3.1]
    for n, loss in enumerate(held_out):
        later = 3.0 - n / 10 if n < 3 else 2.7 + n / 10  # turns two measurements later
        metrics = {"step": n + 1, "loss": 2 - n / 10, "loss_text": 2 - n / 10}
        metrics |= {"validation/loss": loss, "validation/loss_text": later}
        found.append(alarm.observe(metrics))
    assert [turn.kind for turn in found if isinstance(turn, HeldOutTurn)] == [""]
