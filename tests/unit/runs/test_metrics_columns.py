"""The columns of ``metrics.jsonl``: of long, resumed, damaged and growing files."""

import json
import random
import resource
from pathlib import Path

import numpy as np
import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.runs.lines import LONGEST_LINE_BYTES, read_backwards
from megatron_chameleon.runs.metrics import MOST_KEYS, read_metrics


def write(folder: Path, *lines: dict | str | bytes, end: bytes = b"\n") -> Path:
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    content = b"\n".join(t if isinstance(t, bytes) else t.encode() for t in texts) + end
    (folder / "metrics.jsonl").write_bytes(content)
    return folder


@pytest.mark.parametrize("seed", range(4))
def test_columns_are_those_of_a_dictionary_by_step(tmp_path: Path, seed: int) -> None:
    """Steps in any order and several times, keys that come and go: the last record counts."""
    random.seed(seed)
    records = []
    for _ in range(300):
        keys = random.sample(["loss", "validation/loss", "é", "x"], random.randint(0, 4))
        values = {key: random.choice([None, 1, 0.5, random.random()]) for key in keys}
        records.append({"step": random.randint(0, 120), **values})
    expected = {record["step"]: record for record in records}
    metrics = read_metrics(write(tmp_path, *records))
    assert metrics.steps.tolist() == sorted(expected)
    for key in ("loss", "validation/loss", "é", "x"):
        pairs = [
            (s, expected[s][key]) for s in sorted(expected) if expected[s].get(key) is not None
        ]
        steps, values = metrics.series(key)
        assert list(zip(steps.tolist(), values.tolist(), strict=True)) == pairs
        wanted = np.array([0, 7, 121, 5])
        found = metrics.at(key, wanted).tolist()
        known = dict(pairs)
        assert [v if v == v else None for v in found] == [known.get(s) for s in wanted.tolist()]


def test_broken_foreign_and_cut_lines_are_counted_and_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        b"\xef\xbb\xbf" + b'{"step": 1, "loss": 3}',
        '{"step": 2, "lo',
        "",
        "[1, 2]",
        '{"loss": 5}',
        '{"step": true, "loss": 5}',
        '{"step": 3, "loss": 2.5}\r',
        b"\x00" * 5000,
        '{"step": 1e400}',
        "[" * 9999,
        '{"step": -1}',
        b'{"step": 4, "loss": 2, "name": "\xff"}',
        '{"step": 5, "lo',
        end=b"",
    )
    metrics = read_metrics(tmp_path)
    assert metrics.steps.tolist() == [1, 3, 4]
    assert metrics.broken.is_cut
    assert metrics.broken.count == 8
    assert str(metrics.broken).startswith(
        "8 lines of metrics.jsonl were left out; the first is line 2, which is not valid JSON"
    )
    named = [str(error).partition("metrics.jsonl:")[2] for error in metrics.broken.first]
    assert [text.partition(":")[0] for text in named] == ["2", "4", "5", "6", "8"]


def test_values_that_are_no_numbers_do_not_become_points(tmp_path: Path) -> None:
    texts = ['"high"', "[1, 2]", "true", "null", "NaN", "-Infinity", "1e400", "1" + "0" * 400, "7"]
    write(tmp_path, *(f'{{"step": {i}, "x": {text}}}' for i, text in enumerate(texts)))
    metrics = read_metrics(tmp_path)
    steps, values = metrics.finite("x")
    assert (steps.tolist(), values.tolist()) == ([8], [7.0])
    assert metrics.series("x")[0].tolist() == [4, 5, 6, 7, 8]
    assert metrics.not_numbers == {"x": (0, "'high'")}
    assert metrics.last("x") == 7.0 and metrics.last("y") is None


def test_a_key_can_be_left_out_and_keys_are_bounded(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1, "a": 1, "b": 2}, *({"step": i, f"k{i}": 1} for i in range(2, 9000)))
    assert read_metrics(tmp_path, {"a"}.__contains__).keys == ["step", "a"]
    assert len(read_metrics(tmp_path).keys) == MOST_KEYS


def test_a_line_without_end_is_passed_over_or_ends_the_reading(tmp_path: Path) -> None:
    long = b'{"step": 2, "x": "' + b"y" * LONGEST_LINE_BYTES + b'"}'
    metrics = read_metrics(write(tmp_path, {"step": 1}, long, {"step": 3}))
    assert metrics.steps.tolist() == [1, 3] and metrics.broken.count == 1
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.truncate(1 << 40)
    metrics = read_metrics(tmp_path)
    assert metrics.steps.tolist() == [1, 3] and metrics.broken.is_given_up
    assert "the rest of the file was not read" in str(metrics.broken)


def test_a_long_run_needs_little_memory(tmp_path: Path) -> None:
    """12 bytes per number: a list of the records would need 400 bytes per step more."""
    line = ', "loss": 1.5, "grad_norm": 0.5, "names": ["a", "b"]}\n'
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step}{line}' for step in range(1, 200_001))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics = read_metrics(tmp_path)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(metrics) == 200_000 and metrics.last("loss") == 1.5
    assert grown_kib < 24_000


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path)


def test_a_file_is_read_from_its_end(tmp_path: Path) -> None:
    records = [{"step": step, "x": "y" * (step % 5000)} for step in range(2000)]  # many blocks
    file = write(tmp_path, *records, "broken", '{"step": 9', end=b"") / "metrics.jsonl"
    assert list(read_backwards(file)) == records[::-1]
    assert next(read_backwards(file)) == records[-1]
    assert list(read_backwards(tmp_path / "none")) == []
    file.write_bytes(b"\xef\xbb\xbf" + b'{"step": 1}')
    assert list(read_backwards(file)) == [{"step": 1}]
