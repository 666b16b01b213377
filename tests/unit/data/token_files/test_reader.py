"""Token files: megatron-core reads what we write, and each kind of damage has its own message."""

import dataclasses
import gc
import json
import os
import struct

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_chameleon.data.token_files.reader import (
    Origin,
    TokenFileWriter,
    open_token_file,
    token_dtype,
)
from megatron_chameleon.errors import DataError


@pytest.fixture
def written(token_file, numbered):
    documents = numbered([5, 2, 9])
    return token_file(documents), documents


def test_megatron_core_reads_back_the_same_tokens(written):
    token_file, documents = written
    dataset = IndexedDataset(token_file.prefix)
    assert len(dataset) == len(token_file) == 3
    assert dataset.index.dtype == np.uint16
    for position, document in enumerate(documents):
        np.testing.assert_array_equal(dataset[position], document)
        np.testing.assert_array_equal(token_file.read(position), document)
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert token_file.lengths.tolist() == [5, 2, 9] and token_file.lengths.dtype == np.int32


@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_files_are_what_megatron_core_s_builder_writes(tmp_path, tokenizer, numbered, vocab_size):
    size = dataclasses.replace(tokenizer.vocabulary, tokens=("x",) * vocab_size)
    wide = dataclasses.replace(tokenizer, vocabulary=size)
    builder = IndexedDatasetBuilder(str(tmp_path / "peer.bin"), dtype=token_dtype(vocab_size))
    with TokenFileWriter(tmp_path / "tokens", wide) as writer:
        for document in numbered([5, 2, 900, 3, 77]):
            writer.add(document, 0)
            builder.add_document(document, [len(document)])
        writer.commit()
    builder.finalize(str(tmp_path / "peer.idx"))
    for suffix in (".bin", ".idx"):
        ours, theirs = tmp_path / f"tokens{suffix}", tmp_path / f"peer{suffix}"
        assert ours.read_bytes() == theirs.read_bytes()


def test_what_was_read_outlives_its_file(written):
    token_file, documents = written
    file = open_token_file(token_file.prefix, None)
    tokens, lengths, offsets = file.read(2), file.lengths, file.offsets
    del file
    gc.collect()  # megatron-core would unmap the files now, and the next line would crash
    np.testing.assert_array_equal(tokens, documents[2])
    assert lengths.tolist() == [5, 2, 9] and offsets.tolist() == [0, 10, 14]


def test_reading_a_part(written):
    token_file, documents = written
    np.testing.assert_array_equal(token_file.read(2, 3, 4), documents[2][3:7])
    np.testing.assert_array_equal(token_file.read(2, 8), documents[2][8:])
    with pytest.raises(AssertionError):  # megatron-core would read on into the next document
        token_file.read(0, 3, 3)


def test_sidecar_counts(tmp_path, tokenizer, token_file):
    vocabulary = tokenizer.vocabulary
    image = [vocabulary.begin_image, *vocabulary.code_token_ids[:16], vocabulary.end_image]
    info = token_file([np.array([vocabulary.bos, *image, vocabulary.eos])]).info
    assert (info.documents, info.tokens, info.image_tokens, info.images) == (1, 20, 18, 1)
    assert info.bin_bytes == (tmp_path / "tokens.bin").stat().st_size == 40
    record = json.loads((tmp_path / "tokens.json").read_text())
    assert record["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert record["format"] == "megatron_chameleon.tokens/2" and record["dropped"] == {}


def test_dtype_is_uint16_up_to_the_paper_s_vocabulary():
    assert token_dtype(65_536) is np.uint16  # megatron-core's optimal_dtype says int32 here
    assert token_dtype(65_537) is np.int32


def test_uncommitted_writer_leaves_the_old_files(written, tokenizer, numbered, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), TokenFileWriter(tmp_path / "tokens", tokenizer) as writer:
        writer.add(numbered([3])[0], 0)
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_sidecar_is_gone_before_anything_is_replaced(
    written, tokenizer, numbered, tmp_path, monkeypatch
):
    """A crash in between must not leave a mix of old and new files that looks complete."""
    real_replace = type(tmp_path).replace

    def replace(self, target):
        if self.name.endswith(".idx"):
            raise OSError(28, "No space left on device")
        return real_replace(self, target)

    monkeypatch.setattr(type(tmp_path), "replace", replace)
    with (
        pytest.raises(DataError, match=r"cannot write the token file \(No space left on device\)"),
        TokenFileWriter(tmp_path / "tokens", tokenizer) as writer,
    ):
        writer.add(numbered([3])[0], 0)
        writer.commit()
    assert not (tmp_path / "tokens.json").exists()
    with pytest.raises(
        DataError, match=r"incomplete: its \.json, which is written last, is missing"
    ):
        open_token_file(tmp_path / "tokens", tokenizer)


def test_unwritable_output(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match=r"tokens.partial: cannot be written \((File e|Not a dir)"),
        TokenFileWriter(tmp_path / "file" / "tokens", tokenizer),
    ):
        pass


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".documents", ".images"])
def test_missing_file(written, tmp_path, suffix):
    (tmp_path / f"tokens{suffix}").unlink()
    with pytest.raises(DataError, match=rf"tokens: .*\{suffix} is missing\. Write"):
        open_token_file(tmp_path / "tokens", None)


def test_nothing_there(tmp_path):
    with pytest.raises(
        DataError, match=r"no token file here: \.bin and \.idx and \.json are missing"
    ):
        open_token_file(tmp_path / "tokens", None)


def patch(path, offset, content):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


def test_truncated_bin_says_bytes_found_and_expected(written, tmp_path):
    os.truncate(tmp_path / "tokens.bin", 20)
    with pytest.raises(
        DataError, match=r"tokens\.bin: has 20 bytes; its \.json names 16 tokens, which take 32\."
    ):
        open_token_file(tmp_path / "tokens", None)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (20, r"has 20 bytes, fewer than its header of 34"),
        (60, r"has 60 bytes; its header names 3 documents, which take 102\."),
    ],
)
def test_truncated_idx(written, tmp_path, size, message):
    os.truncate(tmp_path / "tokens.idx", size)
    with pytest.raises(DataError, match=r"tokens\.idx: " + message):
        open_token_file(tmp_path / "tokens", None)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"TNTIDX", r"starts with b'TNTIDX.*, not with the header of a Megatron \.idx"),
        (9, struct.pack("<Q", 2), r"not with the header of a Megatron \.idx of version 1"),
        (17, b"\x04", r"holds int32 tokens, but its \.json says uint16"),
        (17, b"\x63", r"holds unknown code 99 tokens, but its \.json says uint16"),
    ],
)
def test_header_of_another_kind(written, tmp_path, offset, content, message):
    patch(tmp_path / "tokens.idx", offset, content)
    with pytest.raises(DataError, match=message):
        open_token_file(tmp_path / "tokens", None)


def edit_sidecar(tmp_path, **changes):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": 4}, r"holds 3 documents, but its \.json says 4"),
        ({"format": "tokens/9"}, r"tokens\.json: the format is 'tokens/9', but this version reads"),
        ({"vocab_size": 300}, r"written for a vocabulary of 300 ids, .* has 340\. Name the tok"),
        (
            {"tokenizer_fingerprint": "f" * 64},
            r"a tokenizer of fingerprint ffffffffffff, but that of .* is [0-9a-f]{12}\.",
        ),
    ],
)
def test_sidecar_that_does_not_fit(written, tokenizer, tmp_path, changes, message):
    edit_sidecar(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        open_token_file(tmp_path / "tokens", tokenizer)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"format": "megatron_chameleon.tokens/2"}'])
def test_sidecar_that_is_none(written, tmp_path, content):
    (tmp_path / "tokens.json").write_text(content)
    message = r"tokens\.json: (not the sidecar of a token file|is not valid JSON).* Write the files"
    with pytest.raises(DataError, match=message):
        open_token_file(tmp_path / "tokens", None)


def test_no_documents(tmp_path, tokenizer):
    with TokenFileWriter(tmp_path / "tokens", tokenizer) as writer:
        writer.commit()
    with pytest.raises(DataError, match=r"tokens\.idx: holds 0 documents"):
        open_token_file(tmp_path / "tokens", tokenizer)


def test_other_tokenizer_of_the_same_size(written, tokenizer, tmp_path):
    other = dataclasses.replace(tokenizer, fingerprint="0" * 64)
    with pytest.raises(DataError, match=r"is 000000000000\. Name the tokenizer"):
        open_token_file(tmp_path / "tokens", other)


def image_document(vocabulary, before, images, after):
    image = [vocabulary.begin_image, *vocabulary.code_token_ids[:4], vocabulary.end_image]
    return np.array([vocabulary.bos, *[300] * before, *image * images, *[301] * after, 2])


@pytest.fixture
def with_images(tmp_path, tokenizer):
    """Documents with 2, 0, 1 and 3 images, from two corpora, from line 5 of an input on."""
    with TokenFileWriter(tmp_path / "tokens", tokenizer, inputs=["a.jsonl"]) as writer:
        for line, (images, source) in enumerate(((2, "x"), (0, "y"), (1, "x"), (3, "x")), start=5):
            writer.add(image_document(tokenizer.vocabulary, line, images, 2), images, source, line)
        writer.commit()
    return open_token_file(tmp_path / "tokens", tokenizer)


def test_side_files_say_where_images_and_documents_come_from(with_images, tokenizer):
    spans = [with_images.image_spans(document).tolist() for document in range(4)]
    assert spans == [[(6, 6), (12, 6)], [], [(8, 6)], [(9, 6), (15, 6), (21, 6)]]
    for document in range(4):
        for start, length in spans[document]:
            block = with_images.read(document, start, length)
            assert (block[0], block[-1]) == (
                tokenizer.vocabulary.begin_image,
                tokenizer.vocabulary.end_image,
            )
    assert [with_images.origin(d) for d in (0, 1, 3)] == [
        Origin("x", "a.jsonl", 5),
        Origin("y", "a.jsonl", 6),
        Origin("x", "a.jsonl", 8),
    ]
    totals = with_images.info.sources
    conversations = ("conversations", "conversation_tokens", "conversation_image_tokens")
    conversations += ("answers", "answer_tokens", "answer_images", "answer_image_tokens", "pairs")
    assert list(totals) == ["x", "y"]
    assert dataclasses.asdict(totals["x"]) == {
        "documents": 3,
        "tokens": int(with_images.lengths[[0, 2, 3]].sum()),
        "images": 6,
        "image_tokens": 36,
        **dict.fromkeys(conversations, 0),
    }
    with_images.verify()


@pytest.mark.parametrize(
    ("suffix", "offset", "content", "message"),
    [
        (".idx", 34, struct.pack("<i", 10**9), r"document 0 has 1000000000 tokens from byte 0"),
        (".idx", 34, struct.pack("<i", -1), r"document 0 has -1 tokens"),
        (".idx", 34 + 16, struct.pack("<q", 10**15), r"document 0 has \d+ tokens from byte 1000"),
        (".documents", 24, struct.pack("<Q", 99), r"document 0 has the images 0 to 99 of 6"),
        (
            ".documents",
            20,
            struct.pack("<I", 9),
            r"document 0 names source 9 and input 0, but the \.json",
        ),
        (
            ".documents",
            16,
            struct.pack("<I", 9),
            r"document 0 names source 0 and input 9, but the \.json",
        ),
    ],
)
def test_damaged_number_shows_when_its_document_is_read(
    with_images, tmp_path, suffix, offset, content, message
):
    patch(tmp_path / f"tokens{suffix}", offset, content)
    file = open_token_file(tmp_path / "tokens", None)
    with pytest.raises(DataError, match=rf"tokens\{suffix}: .*{message}"):
        file.read(0), file.image_spans(0), file.origin(0)
    with pytest.raises(DataError, match=rf"tokens\{suffix}: document [01] has "):
        file.verify()


def test_opening_reads_nothing_but_the_ends(with_images, monkeypatch):
    """A billion documents must open as fast as four, so no array is read on the way."""
    monkeypatch.setattr(np, "fromfile", None)
    file = open_token_file(with_images.prefix, None)
    maps = (file.documents, file.images, file.lengths, file.offsets)
    assert all(not array.flags.owndata and not array.flags.writeable for array in maps)


def test_sources_past_the_limit_are_counted_together(tmp_path, tokenizer, numbered, monkeypatch):
    monkeypatch.setattr("megatron_chameleon.data.token_files.writer.MOST_CORPORA", 3)
    with TokenFileWriter(tmp_path / "tokens", tokenizer) as writer:
        for name, document in zip("abcdab", numbered([2] * 6), strict=True):
            writer.add(document, 0, corpus_name=name)
        info = writer.commit()
    counts = {name: totals.documents for name, totals in info.sources.items()}
    assert counts == {"a": 2, "b": 2, "(other sources)": 2}
