"""What a run has read of each source, compared with a count of all its samples."""

from collections import Counter

import pytest

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.mixture import mixture_history
from megatron_chameleon.data.views.source_shares import tokens_seen


@pytest.fixture
def config(tmp_path, token_file, numbered):
    """A small and a large source, and one that joins in stage 2."""
    for name, lengths in (
        ("small", [5, 9, 7]),
        ("large", [30, 9, 14, 70] * 9),
        ("late", [11] * 40),
    ):
        token_file(numbered(lengths), name)
    config = Config()
    config.model.seq_length = 50
    config.data.stage1 = [
        SourceConfig(str(tmp_path / "small"), weight=1, name="small"),
        SourceConfig(str(tmp_path / "large"), weight=3, name="large"),
    ]
    config.data.stage2 = [SourceConfig(str(tmp_path / "late"), name="late")]
    config.data.stage1_fraction = 0.6
    config.training.steps, config.training.global_batch_size = 60, 4
    return config


@pytest.mark.parametrize("steps", [1, 20, 36, 37, 60])
def test_it_is_what_the_samples_hold(config, tokenizer, monkeypatch, steps):
    monkeypatch.setattr(mixture_history, "BLOCK_SEQUENCES", 16)
    reader = BatchReader(config, tokenizer)
    counted: Counter = Counter()
    for index in range(4 * steps):
        sample = reader.sample(index)
        for number, part in enumerate(sample.packed.source.tolist()):
            counted[sample.source_names[part]] += int((sample.part == number).sum())
    seen = tokens_seen(reader, steps)
    assert set(counted) <= set(seen)
    block = 16 * 50  # a block in part counts in proportion, so it is off by a part of a block
    for name, (tokens, times) in seen.items():
        assert tokens == pytest.approx(counted[name], abs=0.15 * block)
        corpus = reader.mixture(0).cursors[name].stream.corpus
        assert times == tokens / corpus.tokens
    if steps == 36:  # nine whole blocks: exact
        assert {name: round(tokens) for name, (tokens, _) in seen.items() if tokens} == counted


def test_a_mixture_that_is_edited_within_a_block_leaves_nothing_out(config, tokenizer, monkeypatch):
    """What a block had taken and not used comes first afterwards, and counts once."""
    monkeypatch.setattr(mixture_history, "BLOCK_SEQUENCES", 16)
    before = BatchReader(config, tokenizer)
    config.data.stage1[0].weight = 9
    reader = BatchReader(config, tokenizer, before.state(), 10)  # 2.5 blocks
    place = reader.mixture(40).locate(40)
    assert any(cursor.backlog_tokens for cursor in place.phase.cursors.values())
    counted: Counter = Counter()
    for index in range(4 * 26):  # four blocks after the edit
        sample = reader.sample(index)
        for number, part in enumerate(sample.packed.source.tolist()):
            counted[sample.source_names[part]] += int((sample.part == number).sum())
    seen = {name: round(tokens) for name, (tokens, _) in tokens_seen(reader, 26).items() if tokens}
    assert seen == counted
