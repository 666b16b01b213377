"""Comparisons of runs."""

from pathlib import Path

import numpy as np
import pytest

from megatron_chameleon.reports.comparison import (
    along,
    comparison_page,
    comparison_text,
    config_differences,
    environment_differences,
    missing_axis,
    run_names,
)
from megatron_chameleon.runs.metrics import metrics_of
from megatron_chameleon.runs.run import read_run
from page_origin import ORIGIN
from synthetic_run import write_run


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / "a", steps=200)), read_run(write_run(tmp_path / "b/a"))]
    (runs[1].path / "environment.json").write_text(
        '{"git_commit": "bbb", "packages": {"torch": "2"}}'
    )
    runs[1] = read_run(runs[1].path)
    names = run_names(runs)
    assert names == [str(tmp_path / "a"), str(tmp_path / "b/a")]
    text = comparison_text(runs)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines["steps"].split()[-2:] == ["200", "400"]
    assert "at 160, risen since" in lines["held-out loss, lowest"]
    assert "a" * 40 in lines["git_commit"] and lines["git_commit"].endswith("bbb")
    assert "config: no differences" in text
    page = comparison_page(runs, "step", ORIGIN)
    assert page.count("<figure") > 10 and "<script" not in page


def test_differences_compare_a_missing_key_with_its_default(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, steps=1) for name in "abc"]
    text = (paths[0] / "config.yaml").read_text()
    (paths[1] / "config.yaml").write_text(text + "optimizer: {lr: 0.0001, adam_beta1: 0.5}\n")
    (paths[2] / "config.yaml").write_text(
        text.replace("  stage2:", "  - {prefix: more, weight: 1.0}\n  stage2:")
        + "logging: {run_dir: elsewhere}\n"
    )
    found = {d.key: d.values for d in config_differences([read_run(path) for path in paths])}
    assert found == {
        "optimizer.adam_beta1": ["0.9", "0.5", "0.9"],
        "data.stage1[2].prefix": ["–", "–", "more"],
    }
    assert environment_differences([read_run(path) for path in paths]) == []


def test_runs_of_different_batch_sizes_meet_at_the_same_tokens() -> None:
    small = [{"step": i, "loss": 100.0 / i, "consumed_tokens": 10 * i} for i in range(1, 21)]
    large = [{"step": i, "loss": 50.0 / i, "consumed_tokens": 20 * i} for i in range(1, 11)]
    curves = [along(metrics_of(records), "loss", "tokens") for records in (small, large)]
    assert curves[0][0].tolist() == list(range(10, 201, 10))
    at_100 = [values[places == 100].tolist() for places, values in curves]
    assert at_100 == [[10.0], [10.0]]
    assert along(metrics_of(small), "loss", "step")[0].tolist() == list(range(1, 21))


def test_a_place_that_is_not_known_is_left_out_and_a_missing_axis_named(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": 1}, {"step": 2, "loss": 2, "trained_tokens": 5}]
    places, values = along(metrics_of(records), "loss", "trained_tokens")
    assert (places.tolist(), values.tolist()) == ([5.0], [2.0])
    run = read_run(write_run(tmp_path / "run", steps=2))
    assert missing_axis([run], "trained_tokens") is None
    (run.path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    problem = missing_axis([read_run(run.path)], "trained_tokens")
    assert problem is not None
    assert str(problem).endswith("its metrics have no trained_tokens. Use --x step or tokens.")


@pytest.mark.parametrize("content", ["", '{"step": 1, "loss": NaN}\n', "\0"])
def test_odd_runs_can_be_compared(tmp_path: Path, content: str) -> None:
    runs = [read_run(write_run(tmp_path / "a", steps=30))]
    (tmp_path / "odd <b>").mkdir()
    (tmp_path / "odd <b>" / "metrics.jsonl").write_text(content)
    runs.append(read_run(tmp_path / "odd <b>"))
    for axis in ("step", "tokens"):
        page = comparison_page(runs, axis, ORIGIN)
        assert "odd <b>" not in page and "odd &lt;b&gt;" in page
    assert "odd <b>" in comparison_text(runs)
    assert np.isfinite(runs[0].metrics.last("loss"))
