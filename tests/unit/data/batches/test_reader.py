"""Batches: the shift of labels, the masks, dealing to ranks, and faults of the config."""

import json
import shutil

import numpy as np
import pytest
import torch

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader, read_ahead
from megatron_chameleon.data.token_files.format import REQUIRED_SUFFIXES
from megatron_chameleon.errors import ConfigError, ConfigErrors


@pytest.fixture
def config(tmp_path, token_file, numbered):
    token_file(numbered([7, 20, 12, 9, 3, 40]), "a")
    token_file(numbered([30, 15, 8]), "b")
    config = Config()
    config.model.seq_length = 16
    config.data.stage1 = [SourceConfig(str(tmp_path / "a"), weight=3.0)]
    config.data.stage2 = [SourceConfig(str(tmp_path / "b"), weight=1.0)]
    config.training.steps, config.training.global_batch_size = 10, 8
    return config


@pytest.fixture
def images(config, token_file, tokenizer):
    """A document of an image, text and a ``<pad>``; the config's only source has ten of them."""
    v = tokenizer.vocabulary
    image = [v.begin_image, *v.code_token_ids[:4], v.end_image]
    document = np.array([v.bos, *image, 300, v.pad, v.eos])
    token_file([document] * 10, "one")
    config.data.stage1[0].prefix = config.data.stage1[0].prefix[:-1] + "one"
    config.data.stage2 = []
    return document


def same_batches(left, right):
    return all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip(vars(left).values(), vars(right).values(), strict=True)
    )


@pytest.mark.parametrize("isolated", [False, True])
def test_labels_follow_their_tokens(config, tokenizer, isolated):
    """Within each part. At its end comes the next token of the document, or ``<pad>``."""
    config.data.reset_attention = isolated
    reader = BatchReader(config, tokenizer)
    corpora = [cursor.stream.corpus for cursor in reader.mixture(0).cursors.values()]
    pad = tokenizer.vocabulary.pad
    for index in range(40):
        sample = reader.sample(index)
        parts, place = sample.packed.parts, 0
        for i, source in enumerate(sample.packed.source):
            start, stop, length = (int(parts.start[i]), int(parts.stop[i]), int(parts.length[i]))
            whole = [*corpora[source].read(int(parts.document[i]), 0, length), pad]
            rows = slice(place, place + stop - start)
            assert sample.tokens[rows].tolist() == whole[start:stop]
            assert sample.labels[rows].tolist() == whole[start + 1 : stop + 1]
            assert (sample.part[rows] == i).all()
            place = rows.stop
        assert (sample.tokens[place:] == pad).all() and (sample.labels[place:] == pad).all()


def test_types_and_shapes(config, tokenizer):
    batch = BatchReader(config, tokenizer).batch([5, 0])
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (2, 16)
    assert torch.equal(batch.position_ids, torch.arange(16).repeat(2, 1))
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32 and batch.image_mask.dtype == torch.bool


def test_masks(config, tokenizer, images):
    config.model.seq_length = len(images) + 3
    batch = BatchReader(config, tokenizer).batch([0])
    pad = tokenizer.vocabulary.pad
    # The labels: begin, 4 codes, end, text, <pad>, </s>, none; then the padding.
    assert batch.tokens[0].tolist() == [*images, pad, pad, pad]
    assert batch.labels[0].tolist() == [*images[1:], pad, pad, pad, pad]
    assert batch.loss_mask[0].tolist() == [1] * 7 + [0, 1, 0, 0, 0, 0]
    assert batch.image_mask[0].tolist() == [False] + [True] * 4 + [False] * 8


def test_every_label_counts_once(config, tokenizer):
    """Every token of text that flows, apart from ``<s>``, wherever documents are cut."""
    config.data.stage2 = []
    reader = BatchReader(config, tokenizer)
    corpus = next(iter(reader.mixture(0).cursors.values())).stream.corpus
    samples = 16 * 40  # ten blocks, each of as many epochs as its tokens fill
    batch = reader.batch(range(samples))
    counted = batch.labels[batch.loss_mask > 0]
    whole = np.concatenate([corpus.read(n, 0, int(corpus.token_file.lengths[n])) for n in range(6)])
    expected = np.bincount(whole[whole != tokenizer.vocabulary.bos], minlength=340)
    shares = torch.bincount(counted, minlength=340).numpy() / (samples * 16 / len(whole))
    np.testing.assert_allclose(shares, expected, atol=0.2)


def test_stages_follow_the_steps(config, tokenizer):
    """8 of 10 steps of 8 samples belong to stage 1."""
    for tokens, border in ((None, 64), (16 * 20, 20), (16 * 20 + 1, 21)):
        config.data.stage1_tokens = tokens
        reader = BatchReader(config, tokenizer)
        names = [{int(n) for n in reader.sample(i).packed.source} for i in range(80)]
        assert set().union(*names[:border]) == {0}
        assert set().union(*names[border:]) == {0, 1}


def test_sample_is_pure(config, tokenizer):
    reader = BatchReader(config, tokenizer)
    forwards = [reader.batch([i]) for i in range(80)]
    for index in [79, 3, 64, 0, 65, 3]:
        assert same_batches(BatchReader(config, tokenizer).batch([index]), forwards[index])


def test_order_does_not_depend_on_where_the_files_lie(config, tokenizer, tmp_path):
    forwards = [BatchReader(config, tokenizer).batch([i]) for i in range(70)]
    (tmp_path / "moved").mkdir()
    for source in (*config.data.stage1, *config.data.stage2):
        for suffix in (*REQUIRED_SUFFIXES, ".json"):
            shutil.move(source.prefix + suffix, tmp_path / "moved")
        source.prefix = source.prefix.replace(str(tmp_path), str(tmp_path / "moved"))
    reader = BatchReader(config, tokenizer)
    assert all(same_batches(reader.batch([i]), forwards[i]) for i in range(70))


@pytest.mark.parametrize(("micro", "size"), [(1, 1), (8, 1), (2, 2), (1, 8), (4, 1), (1, 2)])
def test_every_layout_deals_out_the_same_samples(config, tokenizer, micro, size):
    config.training.micro_batch_size = micro
    reader = BatchReader(config, tokenizer)
    dealt = []
    for rank in range(size):
        batches = reader.indices_for(4, rank, size)
        assert [len(batch) for batch in batches] == [micro] * (8 // micro // size)
        dealt += [index for batch in batches for index in batch]
    assert sorted(dealt) == list(range(24, 32))


def test_global_batch_that_cannot_be_dealt_out(config, tokenizer):
    config.training.micro_batch_size = 3
    reader = BatchReader(config, tokenizer)
    message = r"global_batch_size: 8 is not a multiple of 6 \(micro_batch_size 3 x 2 data-parallel"
    with pytest.raises(ConfigError, match=message):
        reader.indices_for(1, 0, 2)


def test_reading_ahead_changes_nothing(config, tokenizer):
    config.training.micro_batch_size = 2
    reader = BatchReader(config, tokenizer)
    expected = [reader.batches_for(step, 1, 2) for step in range(4, 11)]
    with read_ahead(BatchReader(config, tokenizer), 3, 1, 2) as batches:
        found = list(batches)
    assert len(found) == 7
    for left, right in zip(found, expected, strict=True):
        assert all(same_batches(a, b) for a, b in zip(left, right, strict=True))


def test_reading_ahead_passes_errors_on(config, tokenizer):
    config.training.micro_batch_size = 3
    reader = BatchReader(config, tokenizer)
    with (
        read_ahead(reader, 0, 0, 2) as batches,
        pytest.raises(ConfigError, match="global_batch_size"),
    ):
        next(batches)


def lines_of(config, tokenizer, *state):
    with pytest.raises(ConfigErrors) as caught:
        BatchReader(config, tokenizer, *state)
    return caught.value.lines()


def test_every_missing_file_at_once(config, tokenizer, tmp_path):
    config.data.stage1[0].prefix = str(tmp_path / "nothing")
    config.data.stage2[0].prefix = str(tmp_path / "none")
    assert [line.split(". ")[0] for line in lines_of(config, tokenizer)] == [
        f"data.stage1[0].prefix: {tmp_path}/nothing: no token file here: .bin and .idx and .json "
        "are missing",
        f"data.stage2[0].prefix: {tmp_path}/none: no token file here: .bin and .idx and .json "
        "are missing",
    ]


def test_tokens_of_another_tokenizer(config, tokenizer, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_fingerprint": "0" * 64}))
    (line,) = lines_of(config, tokenizer)
    assert line.startswith(
        f"data.stage1[0].prefix: {tmp_path}/a: written with a tokenizer of fingerprint 000000000000"
    )


def test_sequence_too_short_for_an_image(config, tokenizer, images, tmp_path):
    config.model.seq_length = 5
    assert lines_of(config, tokenizer) == [
        f"data.stage1[0].prefix: an image of {tmp_path}/one has 6 tokens, more than "
        "model.seq_length 5. Choose a model.seq_length of at least 6."
    ]


def test_sources_that_do_not_last(config, tokenizer):
    config.data.stage1[0].repeat = 4  # 4 x 91 tokens: 23 sequences
    assert lines_of(config, tokenizer) == [
        "data: all sources are exhausted after step 2 of 10. Let one of them repeat, or set "
        "training.steps to at most 2."
    ]
    config.data.stage1[0].repeat = 15
    config.data.stage2 = []
    config.training.steps = 10
    assert BatchReader(config, tokenizer).sample(79).tokens.shape == (16,)


def test_attention_is_plain_causal_unless_it_is_reset(config, tokenizer):
    assert BatchReader(config, tokenizer).batch([0]).cu_seqlens is None


def test_reset_attention_closes_at_each_document(config, tokenizer):
    config.data.reset_attention = True
    reader, inside = BatchReader(config, tokenizer), 0
    for first in range(0, 80, 4):
        batch = reader.batch(range(first, first + 4))
        parts = [(row, part) for row in range(4) for part in reader.sample(first + row).part]
        begins = [i for i in range(64) if i == 0 or parts[i] != parts[i - 1]]
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.tolist() == [*begins, 64]
        inside += len(begins) - 4
        positions = [i - max(begin for begin in begins if begin <= i) for i in range(64)]
        assert batch.position_ids.flatten().tolist() == positions
    assert inside > 20  # documents and padding begin inside sequences
