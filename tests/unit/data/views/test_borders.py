"""``find_borders``: every block end, stage and exhausted source, with what the steps hold there."""

import json

import numpy as np
import pytest

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.views import borders as view
from megatron_chameleon.data.views.borders import find_borders, format_borders


@pytest.fixture
def config(tmp_path, token_file, numbered):
    draw = np.random.default_rng(1)
    for name in ("a", "b", "c"):
        token_file(numbered(draw.integers(3, 9, 30).tolist()), name)
    config = Config()
    config.model.seq_length = 32
    config.data.reset_attention = True
    config.data.stage1 = [
        SourceConfig(str(tmp_path / "a"), name="a"),
        SourceConfig(str(tmp_path / "b"), name="b", repeat=40),
    ]
    config.data.stage2 = [SourceConfig(str(tmp_path / "c"), name="c")]
    config.data.stage1_tokens = 900 * 32
    config.training.steps, config.training.global_batch_size = 250, 8
    return config


def padding_of(reader, step):
    first = reader.history.first_sample(step - 1)
    samples = [reader.sample(n) for n in range(first, first + reader.history.batch_size(step - 1))]
    return np.mean([sample.part == len(sample.packed.source) for sample in samples])


def test_every_border_with_the_padding_of_the_steps(config, tokenizer):
    reader = BatchReader(config, tokenizer)
    found = find_borders(reader)
    phases = reader.mixture(0).phases(2000)
    exhausted = next(p.end_sample for p in phases if "b" not in phases[phases.index(p) + 1].rates)
    whats = {border.sample: (border.step, border.what) for border in found.borders}
    assert whats[exhausted] == (-(-exhausted // 8), "b is exhausted; a block ends")
    assert whats[900] == (113, "stage 2 begins")  # in the middle of a block, and of a step
    assert whats[2000] == (250, "the run ends")
    blocks = [
        phase.first_sample + n * phase.sequences
        for phase in phases
        for n in range(1, ((phase.end_sample or 2000) - phase.first_sample) // phase.sequences + 1)
    ]
    assert {s for s, (_, what) in whats.items() if "a block ends" in what} == set(blocks)
    assert found.block_ends == found.listed_block_ends == len(blocks)
    assert sorted(found.padding) == list(range(1, 251))
    for step in (1, 113, 114, 250):
        assert found.padding[step] == pytest.approx(padding_of(reader, step))
    assert max(found.padding.values()) <= 0.25


def test_the_table_compares_each_step_with_its_neighbours(config, tokenizer):
    found = find_borders(BatchReader(config, tokenizer))
    norms = dict.fromkeys(range(1, 251), 0.5) | {113: 0.8, 114: 9.0}
    lines = format_borders(found, 250, norms).splitlines()
    assert lines[0].startswith("250 steps with ") and "ends of packing blocks" in lines[0]
    row = next(line for line in lines if line.endswith("sample 900: stage 2 begins")).split()
    around = [found.padding[n] for n in [*range(105, 113), *range(114, 122)]]
    shares = [found.padding[113], found.padding[114], np.median(around), max(around)]
    assert row[1:5] == [f"{100 * share:.1f}%" for share in shares]
    assert row[5:8] == ["0.800", "0.500", "1.60"]
    most = max(found.padding, key=lambda step: found.padding[step])
    assert f"at most {100 * found.padding[most]:.1f}% (step {most})" in lines[-2]
    assert lines[-1] == (
        "gradient norm at the borders: at most 1.60 of the median beside it (step 113)"
    )
    without = format_borders(found, 250, {}).splitlines()
    assert without[-1] == lines[-2]
    assert next(line for line in without if "stage 2" in line).split()[5:8] == ["-", "-", "-"]


def test_the_order_of_version_1_shows_its_empty_steps(config, tokenizer):
    """Also of a run whose mixture changed; its first mixture keeps the old order."""
    state = json.loads(json.dumps(BatchReader(config, tokenizer).state()))
    del state["entries"][0]["order_version"]
    found = find_borders(BatchReader(config, tokenizer, state, 5))
    assert max(found.padding.values()) > 0.25
    config.data.stage1[0].weight = 3.0
    reader = BatchReader(config, tokenizer, state, 5)
    found = find_borders(reader)
    assert (5, 40, "another mixture begins") in [
        (border.step, border.sample, border.what) for border in found.borders
    ]
    assert max(found.padding[step] for step in range(6, 251)) <= 0.25


def test_what_cannot_be_opened_any_more_is_named(config, tokenizer, tmp_path):
    reader = BatchReader(config, tokenizer)
    config.data.stage1 = config.data.stage1[1:]
    config.data.stage1[0].repeat = True
    reader = BatchReader(config, tokenizer, reader.state(), 5)
    (tmp_path / "a.json").unlink()
    reader = BatchReader(config, tokenizer, reader.state(), 6)
    found = find_borders(reader)
    assert sorted(found.padding) == list(range(6, 251))
    lines = format_borders(found, 250, {}).splitlines()
    assert lines[1].startswith("samples 0 to 39: not known (the run has read a, which the config")
    assert "padding of 245 steps: " in lines[-1]


def test_a_long_run_is_measured_at_its_borders(config, tokenizer, monkeypatch):
    monkeypatch.setattr(view, "MOST_BLOCK_ENDS", 3)
    monkeypatch.setattr(view, "MOST_SAMPLES", 100)
    found = find_borders(BatchReader(config, tokenizer))
    assert 0 < found.listed_block_ends <= 3 < found.block_ends
    assert 113 in found.padding and 105 in found.padding and len(found.padding) < 200
    assert format_borders(found, 250, {}).splitlines()[-1] == (
        f"{found.listed_block_ends} of the {found.block_ends} ends of blocks are listed"
    )


def test_a_step_that_holds_several_blocks(config, tokenizer):
    config.training.steps, config.training.global_batch_size = 2, 1000
    found = find_borders(BatchReader(config, tokenizer))
    assert [border.step for border in found.borders] == [1, 2]
    assert "stage 2 begins" in found.borders[0].what and " blocks end" in found.borders[1].what
