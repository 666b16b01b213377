"""A disk that fills up between saves: one line, and nothing is lost or doubled."""

import pytest

# There is no save before the last step, and a line of the metrics has about 1,100 bytes.
SETTINGS = ("training.steps=12", "model.num_layers=2")
LIMIT = 8_000


@pytest.mark.parametrize("processes", [1, 2])
def test_the_metrics_do_not_fit(tiny, processes: int) -> None:
    name = f"metrics-on-{processes}"
    result = tiny.train(name, *SETTINGS, processes=processes, succeeds=False, file_bytes=LIMIT)
    assert result.returncode == (2 if processes == 1 else 1)  # torchrun's own
    assert "Traceback" not in result.stderr
    # A slow machine also says what it waits for.
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {tiny.folder / name}/metrics.jsonl: cannot be written (File too large). Raise the "
        "limit of a file's size (ulimit -f), or choose another disk."
    ]
    written = tiny.metrics(name)
    assert 0 < len(written) < 12
    tiny.train(name, *SETTINGS, processes=processes)
    assert [line["step"] for line in tiny.metrics(name)] == list(range(1, 13))
    again = [line["loss"] for line in tiny.metrics(name)[: len(written)]]
    assert again == [line["loss"] for line in written]
