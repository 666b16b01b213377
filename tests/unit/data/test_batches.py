"""Batches: the shift, the masks, the deal to ranks, and the config's faults."""

import numpy as np
import pytest
import torch

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches import BatchReader
from megatron_chameleon.errors import ConfigError, ConfigErrors


@pytest.fixture
def config(tmp_path, token_file, numbered):
    token_file(numbered([7, 20, 12, 9]), "a")
    token_file(numbered([30, 15, 8]), "b")
    config = Config()
    config.model.seq_length = 16
    config.data.stage1 = [SourceConfig(str(tmp_path / "a"), 3.0)]
    config.data.stage2 = [SourceConfig(str(tmp_path / "b"), 1.0)]
    config.training.steps, config.training.global_batch_size = 10, 8
    return config


def test_labels_follow_their_tokens(config, tokenizer):
    reader = BatchReader(config, tokenizer)
    batch = reader.batch([5, 0])
    for row, index in enumerate([5, 0]):
        window = torch.tensor(reader.sample(index))
        assert torch.equal(batch.tokens[row], window[:-1])
        assert torch.equal(batch.labels[row], window[1:])
    assert torch.equal(batch.position_ids, torch.arange(16).repeat(2, 1))
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32 and batch.image_mask.dtype == torch.bool


def test_masks(config, tokenizer, token_file):
    v = tokenizer.vocabulary
    image = [v.begin_image, *v.code_token_ids[:4], v.end_image]
    document = np.array([v.bos, *image, 300, v.pad, v.eos])
    token_file([document, document], "one")
    config.data.stage1[0].prefix = config.data.stage1[0].prefix[:-1] + "one"
    config.data.stage2 = []
    config.model.seq_length = len(document)  # the window ends with the next document's <s>
    batch = BatchReader(config, tokenizer).batch([0])
    assert batch.labels[0].tolist() == [*document[1:], v.bos]
    # the labels are: begin, 4 codes, end, text, <pad>, </s>, <s>
    assert batch.loss_mask[0].tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 1, 0]
    assert batch.image_mask[0].tolist() == [False] + [True] * 4 + [False] * 5


def test_stages_follow_the_steps(config, tokenizer):
    """8 of 10 steps of 8 samples are stage 1; then half of the samples are the new source's."""
    mixture = BatchReader(config, tokenizer).mixture
    assert mixture.counts(64) == [64, 0]
    assert mixture.counts(80) == [72, 8]


def test_sample_is_pure(config, tokenizer):
    forwards = [BatchReader(config, tokenizer).sample(i) for i in range(80)]
    other = BatchReader(config, tokenizer)
    for index in [79, 3, 64, 0, 65, 3]:
        np.testing.assert_array_equal(other.sample(index), forwards[index])


@pytest.mark.parametrize(("micro", "size"), [(1, 1), (8, 1), (2, 2), (1, 8), (4, 1), (1, 2)])
def test_every_layout_deals_out_the_same_samples(config, tokenizer, micro, size):
    config.training.micro_batch_size = micro
    reader = BatchReader(config, tokenizer)
    dealt = []
    for rank in range(size):
        batches = reader.indices_for(3, rank, size)
        assert [len(batch) for batch in batches] == [micro] * (8 // micro // size)
        dealt += [index for batch in batches for index in batch]
    assert sorted(dealt) == list(range(24, 32))


def test_global_batch_that_cannot_be_dealt_out(config, tokenizer):
    config.training.micro_batch_size = 3
    reader = BatchReader(config, tokenizer)
    message = r"global_batch_size: 8 is no multiple of 6 \(micro_batch_size 3 x 2 data-parallel"
    with pytest.raises(ConfigError, match=message):
        reader.indices_for(0, 0, 2)


def lines_of(config, tokenizer):
    with pytest.raises(ConfigErrors) as caught:
        BatchReader(config, tokenizer)
    return caught.value.lines()


def test_every_missing_file_at_once(config, tokenizer, tmp_path):
    config.data.stage1[0].prefix = str(tmp_path / "nothing")
    config.data.stage2[0].prefix = str(tmp_path / "none")
    assert [line.split(". ")[0] for line in lines_of(config, tokenizer)] == [
        f"data.stage1[0].prefix: {tmp_path}/nothing: no token file here, .bin and .idx and .json "
        "missing",
        f"data.stage2[0].prefix: {tmp_path}/none: no token file here, .bin and .idx and .json "
        "missing",
    ]


def test_attention_is_plain_causal_unless_it_is_reset(config, tokenizer):
    assert BatchReader(config, tokenizer).batch([0]).attention_mask is None


def test_reset_attention_closes_at_each_document(config, tokenizer):
    config.data.reset_attention = True
    batch = BatchReader(config, tokenizer).batch([3, 4])
    assert batch.attention_mask.shape == (2, 1, 16, 16)
    for tokens, hidden in zip(
        batch.tokens.tolist(), batch.attention_mask[:, 0].tolist(), strict=True
    ):
        for i in range(16):
            starts = [k for k in range(i + 1) if tokens[k] == tokenizer.vocabulary.bos]
            first = starts[-1] if starts else 0
            assert hidden[i] == [not first <= j <= i for j in range(16)]


def test_sequence_longer_than_the_data(config, tokenizer, tmp_path):
    config.model.seq_length = 48
    (line,) = lines_of(config, tokenizer)
    assert line == (
        f"data.stage1[0].prefix: {tmp_path}/a has 48 tokens, model.seq_length 48 needs 49. "
        "Add data or choose a smaller model.seq_length."
    )
