"""Held-out documents: each token once, however they are packed and dealt out; warnings."""

import itertools
import shutil

import numpy as np
import pytest
import torch

from megatron_chameleon.config.schema import Config, SourceConfig, ValidationSourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.data.validation.reader import HeldOutReader
from megatron_chameleon.errors import ConfigErrors

LENGTHS = [7, 20, 12, 9, 3, 40, 16, 15, 2, 33, 5]


@pytest.fixture
def config(tmp_path, token_file, numbered, with_image):
    token_file(numbered(LENGTHS), "texts")
    token_file([with_image(n) for n in (1, 4, 9, 2, 30, 6)] + numbered([21, 5]), "pairs")
    config = Config()
    config.model.seq_length = 16
    config.training.micro_batch_size = 2
    config.data.validation.sources = [
        ValidationSourceConfig(str(tmp_path / "texts")),
        ValidationSourceConfig(str(tmp_path / "pairs"), name="captioned"),
    ]
    return config


@pytest.fixture
def with_image(tokenizer):
    """Makes a document of text and an image of four codes."""
    v = tokenizer.vocabulary

    def make(words):
        text = v.image_placeholder + 1 + np.arange(words)
        return np.array([v.bos, *text, v.begin_image, *v.code_token_ids[:4], v.end_image, v.eos])

    return make


def chunks(reader, rank=0, size=1, multiple=1):
    with reader.read_ahead(rank, size, multiple) as found:
        return list(found)


def counted(reader, source, sizes=(1,)):
    """How often each token counts in the loss of a source, over all ranks."""
    total = torch.zeros(340, dtype=torch.int64)
    for size in sizes:
        for rank in range(size):
            for number, batch in itertools.chain.from_iterable(chunks(reader, rank, size)):
                if number == source:
                    labels = batch.labels[batch.loss_mask > 0]
                    total += torch.bincount(labels, minlength=340)
    return total


def expected(reader, source, bos):
    """How often each token occurs in the documents, without the tokens ``<s>``."""
    file = reader.sources[source].source.corpus.token_file
    whole = np.concatenate([file.read(document) for document in range(len(file))])
    return torch.bincount(torch.from_numpy(whole[whole != bos].astype(np.int64)), minlength=340)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_token_counts_once(config, tokenizer, isolated, size):
    """At every number of ranks; texts and images that are longer than a sequence too."""
    config.data.reset_attention = isolated
    config.training.micro_batch_size = 3
    reader = HeldOutReader(config, tokenizer)
    for source in (0, 1):
        wanted = expected(reader, source, tokenizer.vocabulary.bos)
        assert torch.equal(counted(reader, source, [size]), wanted)


@pytest.mark.parametrize("isolated", [False, True])
def test_images_are_never_cut_and_isolated_texts_only_if_they_are_too_long(
    config, tokenizer, isolated
):
    config.data.reset_attention = isolated
    reader = HeldOutReader(config, tokenizer)
    v = tokenizer.vocabulary
    for source in reader.sources:
        for packed in source.sequences():
            parts = packed.parts
            for i in range(len(parts)):
                ids = source.stream.documents.read(
                    0, *(int(getattr(parts, n)[i]) for n in ("document", "start", "stop", "length"))
                )
                assert (ids == v.begin_image).sum() == (ids == v.end_image).sum()
                if isolated and parts.length[i] <= 16:
                    assert parts.tokens[i] == parts.length[i]
            assert parts.tokens.sum() <= 16
    if not isolated:  # text that flows leaves no room but at the end
        fills = [int(packed.parts.tokens.sum()) for packed in reader.sources[0].sequences()]
        assert set(fills[:-1]) == {16} and sum(fills) == sum(LENGTHS)


def test_the_same_each_time_and_as_many_for_every_rank(config, tokenizer):
    reader = HeldOutReader(config, tokenizer)
    alone = list(itertools.chain.from_iterable(chunks(reader)))
    again = list(itertools.chain.from_iterable(chunks(HeldOutReader(config, tokenizer))))
    assert len(alone) == len(again) > 8
    for (number, batch), (other, repeated) in zip(alone, again, strict=True):
        assert number == other and torch.equal(batch.tokens, repeated.tokens)
    for size, multiple in ((2, 1), (3, 1), (3, 4), (5, 3)):
        dealt = [chunks(reader, rank, size, multiple) for rank in range(size)]
        assert len({tuple(map(len, found)) for found in dealt}) == 1
        assert all(len(chunk) % multiple == 0 for found in dealt for chunk in found)
        # the first of each rank, then the second ones: as one rank has them, then padding
        lists = [list(itertools.chain.from_iterable(found)) for found in dealt]
        together = [entry for entries in zip(*lists, strict=True) for entry in entries]
        used = [batch for _, batch in together if batch.loss_mask.any()]
        for batch, (_, wanted) in zip(used, alone, strict=True):
            assert torch.equal(batch.tokens, wanted.tokens)


def test_max_tokens_spreads_over_the_file(config, tokenizer, token_file, numbered, tmp_path):
    token_file(numbered([10] * 1000), "many")
    validation = config.data.validation
    validation.sources, validation.max_tokens = (
        [ValidationSourceConfig(str(tmp_path / "many"))],
        100,
    )
    (source,) = HeldOutReader(config, tokenizer).sources
    parts = [packed.parts for packed in source.sequences()]
    documents = sorted({int(d) for part in parts for d in part.document})
    assert documents == [99 + 100 * n for n in range(10)]
    validation.max_tokens = 1
    (source,) = HeldOutReader(config, tokenizer).sources
    assert sum(int(packed.parts.tokens.sum()) for packed in source.sequences()) == 10
    validation.max_tokens = 10_001
    assert HeldOutReader(config, tokenizer).sources[0].documents == 1000


def test_conversations_stay_whole_and_only_their_answers_count(config, tokenizer, tmp_path):
    v = tokenizer.vocabulary
    words = v.image_placeholder + 1 + np.arange(12)
    with TokenFileWriter(tmp_path / "chats", tokenizer) as writer:
        for length in (12, 6, 12, 20, 8):
            tokens = np.array([v.bos, *np.resize(words, length - 2), v.eos])
            writer.add(tokens, 0, answers=[(length - 3, 3)])
        writer.commit()
    config.data.validation.sources = [ValidationSourceConfig(str(tmp_path / "chats"))]
    reader = HeldOutReader(config, tokenizer)
    assert int(counted(reader, 0).sum()) == 4 * 3  # the one of 20 tokens is left out
    (warning,) = reader.warnings([])
    assert "data.validation.sources[0]: 1 of 5 conversations (20 tokens" in warning
    config.data.loss_on = "all"
    reader = HeldOutReader(config, tokenizer)
    assert int(counted(reader, 0).sum()) == 12 + 6 + 12 + 8 - 4
    config.data.loss_on = "answers"
    config.data.validation.sources.append(ValidationSourceConfig(str(tmp_path / "texts")))
    with pytest.raises(ConfigErrors, match=r"data.validation.sources\[1\].prefix: 11 of the 11"):
        HeldOutReader(config, tokenizer)


def test_pairs_keep_their_order_between_measurements(config, tokenizer):
    config.data.validation.sources = config.data.validation.sources[1:]
    config.data.validation.sources[0].image_first = 0.5
    first, second = (chunks(HeldOutReader(config, tokenizer)) for _ in range(2))
    for (_, a), (_, b) in zip(*map(itertools.chain.from_iterable, (first, second)), strict=True):
        assert torch.equal(a.tokens, b.tokens)
    config.data.validation.sources[0].image_first = None
    as_written = chunks(HeldOutReader(config, tokenizer))
    assert not torch.equal(first[0][0][1].tokens, as_written[0][0][1].tokens)


def test_names(config, tokenizer, tmp_path):
    sources = config.data.validation.sources
    shutil.copytree(tmp_path, tmp_path / "other")
    sources.append(ValidationSourceConfig(str(tmp_path / "other" / "texts")))
    assert HeldOutReader(config, tokenizer).names == ["texts", "captioned", "texts#2"]


@pytest.mark.parametrize("how", ["prefix", "link", "copy"])
def test_documents_that_are_trained_are_named(config, tokenizer, tmp_path, how):
    folder = tmp_path / "elsewhere"
    config.data.stage2 = [SourceConfig(str(tmp_path / "texts"))]
    config.data.stage1 = [SourceConfig(str(tmp_path / "pairs"))]
    if how != "prefix":
        folder.mkdir()
        for file in tmp_path.glob("texts*"):
            if how == "link":
                (folder / file.name).symlink_to(file)
            else:
                shutil.copy(file, folder)
        config.data.stage2[0].prefix = str(folder / "texts")
    config.data.validation.sources.pop()
    trained = BatchReader(config, tokenizer).sources
    (warning,) = HeldOutReader(config, tokenizer).warnings(trained)
    words = "holds the same documents as" if how == "copy" else "is also"
    assert f"data.validation.sources[0]: {tmp_path / 'texts'} {words} data.stage2[0]" in warning


def test_other_documents_of_the_same_size_are_not_named(config, tokenizer, token_file, tmp_path):
    file = HeldOutReader(config, tokenizer).sources[0].source.corpus.token_file
    documents = [file.read(document).copy() for document in range(len(file))]
    documents[5][7] += 1
    token_file(documents, "nearly")
    config.data.stage1 = [SourceConfig(str(tmp_path / "nearly"))]
    assert HeldOutReader(config, tokenizer).warnings(BatchReader(config, tokenizer).sources) == []


def test_missing_files_are_named_together(config, tokenizer):
    for source in config.data.validation.sources:
        source.prefix += "-gone"
    with pytest.raises(ConfigErrors) as caught:
        HeldOutReader(config, tokenizer)
    assert "data.validation.sources[0].prefix" in str(caught.value)
    assert "data.validation.sources[1].prefix" in str(caught.value)
