"""Metrics of resumed and crashed runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.curves import (
    draw_curves,
    read_whole_metrics,
    series,
    smooth,
)
from megatron_chameleon.runs.metrics import metrics_of


def write(file: Path, *records: dict | str, end: str = "\n") -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    file.write_text("\n".join(lines) + end)
    return file


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    file = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 5.0}, '{"step": 2, "lo', end="")
    assert read_whole_metrics(file).steps.tolist() == [1]
    assert read_whole_metrics(tmp_path).steps.tolist() == [1]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"step": 2, "lo', "is not valid JSON"),
        *(
            (text, "is not the record of a step")
            for text in ('{"loss": 1}', "[]", '{"step": null}')
        ),
        *((f'{{"step": {step}}}', "is not the record") for step in ("true", "1e400", '"1"', "1.5")),
        ("[" * 9999 + "]" * 9999, "has JSON values nested deeper than 64 levels"),
    ],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: str, message: str) -> None:
    file = write(tmp_path / "m.jsonl", {"step": 1}, broken, {"step": 3})
    with pytest.raises(DataError, match=rf"m\.jsonl:2: {message}.* Fix or remove the line"):
        read_whole_metrics(file)


def test_a_file_that_is_no_list_of_steps_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "m.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"m\.jsonl:1: has 4194304 bytes or more"):
        read_whole_metrics(tmp_path / "m.jsonl")


def test_a_broken_last_line_that_was_finished_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "m.jsonl", {"step": 1}, "{}")
    with pytest.raises(DataError, match=r"m\.jsonl:2: is not the record of a step"):
        read_whole_metrics(file)


def test_no_file_and_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        read_whole_metrics(tmp_path)
    with pytest.raises(DataError, match="has no records yet"):
        read_whole_metrics(write(tmp_path / "m.jsonl", end=""))


def test_a_series_has_no_nulls() -> None:
    metrics = metrics_of(
        [{"step": 1, "x": 2.0}, {"step": 2, "x": None}, {"step": 4}, {"step": 5, "x": 3.0}]
    )
    steps, values = series(metrics, "x")
    assert (steps.tolist(), values.tolist()) == ([1, 5], [2.0, 3.0])


def test_smoothing_is_the_mean_over_the_last_values() -> None:
    values = np.array([1.0, 3.0, 5.0, 7.0])
    assert smooth(values, 1).tolist() == values.tolist()
    assert smooth(values, 2).tolist() == [1, 2, 4, 6]
    assert smooth(values, 100).tolist() == [1, 2, 3, 4]


def test_smoothing_leaves_out_what_is_no_number() -> None:
    values = np.array([np.nan, 2.0, np.nan, 4.0, 8.0])
    assert smooth(values, 2).tolist()[1:] == [2, 2, 4, 6]
    assert np.isnan(smooth(values, 2)[0])


def test_one_panel_per_key_and_one_line_per_run() -> None:
    runs = {
        "a": metrics_of({"step": i, "loss": float(i), "grad_norm": 1.0} for i in range(5)),
        "b": metrics_of({"step": i, "loss": 2.0 * i, "grad_norm": None} for i in range(5)),
    }
    figure = draw_curves(runs, ["loss", "grad_norm", "loss"])
    panels = [axes for axes in figure.axes if axes.lines]
    assert [len(axes.lines) for axes in panels] == [2, 1, 2]
    assert panels[0].lines[1].get_ydata().tolist() == [0, 2, 4, 6, 8]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_an_unknown_key_names_what_there_is() -> None:
    with pytest.raises(
        DataError, match=r"--keys los: no run has a value for it\. Use one of: loss, step"
    ):
        draw_curves({"a": metrics_of([{"step": 1, "loss": 1.0}])}, ["los"])


@pytest.mark.parametrize("value", ["high", [1], {}, True])
def test_a_value_that_is_no_number_is_named(value: object) -> None:
    with pytest.raises(DataError, match=r"--keys x: is .* at step 2, which is not a number"):
        series(metrics_of([{"step": 1, "x": 1.0}, {"step": 2, "x": value}]), "x")


def test_numbers_of_any_size_become_points_that_can_be_drawn() -> None:
    steps, values = series(metrics_of([{"step": 1, "x": 10**400}, {"step": 10**15, "x": 1}]), "x")
    assert steps.tolist() == [1, 10**15] and np.isnan(values).tolist() == [True, False]


def test_a_held_out_loss_is_drawn_with_the_training_loss() -> None:
    records = [{"step": step, "loss": 3.0 / step, "loss_text": 1.0} for step in range(1, 31)]
    for step in (10, 20, 30):
        records[step - 1]["validation/loss"] = 2.0 + 1 / step
    figure = draw_curves({"run": metrics_of(records)}, ["loss", "loss_text", "validation/loss"], 5)
    both, text, held_out = figure.axes[:3]
    assert both.lines[-1].get_xydata().tolist() == [[10, 2.1], [20, 2.05], [30, 2 + 1 / 30]]
    legend = both.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["held-out"]
    assert text.get_legend() is None and len(text.lines) == 2
    assert len(held_out.lines) == 1  # not smoothed: it has no noise
    assert held_out.lines[0].get_ydata().tolist() == [2.1, 2.05, 2 + 1 / 30]
