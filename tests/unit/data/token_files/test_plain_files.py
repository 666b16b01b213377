"""Token files of megatron-core and datatrove, without the files that ``preprocess`` writes."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.token_files import plain_files
from megatron_chameleon.data.token_files.reader import open_token_file
from megatron_chameleon.errors import ChameleonError, ConfigErrors, DataError
from megatron_chameleon.tokenizer.folder import Tokenizer

CODES = 16


@pytest.fixture
def documents(tokenizer: Tokenizer) -> list[list[int]]:
    """Texts that end with ``</s>`` and begin with nothing, as Megatron's; some have images."""
    v, draw = tokenizer.vocabulary, np.random.default_rng(2)
    found = []
    for number in range(30):
        text = draw.integers(v.image_placeholder + 1, v.size, draw.integers(1, 20)).tolist()
        for _ in range(number % 3 // 2 * (1 + number % 2)):
            codes = draw.choice(v.code_token_ids, CODES).tolist()
            text += [v.begin_image, *codes, v.end_image, *text[:2]]
        found.append([*text, v.eos])
    return found


def write_megatron(
    prefix: Path, documents: list[list[int]], dtype: type = np.int32, sentences: int = 1
) -> None:
    """As Megatron's tools/preprocess_data.py does, each document in so many sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        parts = [part for part in np.array_split(document, sentences) if len(part)]
        for part in parts:
            builder.add_item(torch.tensor(part.tolist(), dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def write_datatrove(prefix: Path, documents: list[list[int]], letter: str = "H") -> None:
    """As datatrove's DocumentTokenizer: .ds and .ds.index."""
    ids = [token for document in documents for token in document]
    Path(f"{prefix}.ds").write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    ends = np.cumsum([len(document) for document in documents]).tolist()
    Path(f"{prefix}.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))


def opened(prefix: Path | str, tokenizer: Tokenizer) -> list[tuple[list[int], list[list[int]]]]:
    file = open_token_file(prefix, tokenizer)
    file.verify()
    spans = [
        [[int(s["start"]), int(s["length"])] for s in file.image_spans(d)] for d in range(len(file))
    ]
    return [(file.read(d).tolist(), spans[d]) for d in range(len(file))]


def expected_of(documents: list[list[int]], tokenizer: Tokenizer) -> list:
    begin = tokenizer.vocabulary.begin_image
    return [(d, [[i, CODES + 2] for i, token in enumerate(d) if token == begin]) for d in documents]


@pytest.mark.parametrize("chunk", [1 << 22, 40])
def test_all_kinds_of_files_hold_the_same(documents, tokenizer, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(plain_files, "CHUNK_TOKENS", chunk)
    expected = expected_of(documents, tokenizer)
    assert sum(len(spans) for _, spans in expected) == 15
    for dtype in (np.int32, np.uint16, np.int64):
        write_megatron(tmp_path / "m", documents, dtype)
        assert opened(tmp_path / "m", tokenizer) == expected
    write_megatron(tmp_path / "m", documents, sentences=3)
    assert opened(tmp_path / "m", tokenizer) == expected
    for letter in ("H", "I"):
        write_datatrove(tmp_path / "d", documents, letter)
        assert opened(tmp_path / "d", tokenizer) == expected
        assert opened(f"{tmp_path}/d.ds", tokenizer) == expected
    with_empty = [[], *documents[:4], [], *documents[4:], []]
    write_datatrove(tmp_path / "e", with_empty)
    assert opened(tmp_path / "e", tokenizer) == expected


def config_of(prefix: Path, **data: object) -> Config:
    config = Config()
    config.model.seq_length = 64
    config.data.stage1 = [SourceConfig(str(prefix))]
    for name, value in data.items():
        setattr(config.data, name, value)
    config.training.steps, config.training.epochs = 0, 2
    config.training.global_batch_size = 4
    return config


def test_it_is_trained_on_all_its_tokens_and_no_image_is_cut(documents, tokenizer, tmp_path):
    write_megatron(tmp_path / "m", documents, sentences=2)
    reader = BatchReader(config_of(tmp_path / "m"), tokenizer)
    trained, images, v = 0, 0, tokenizer.vocabulary
    for index in range(reader.samples):
        sample = reader.sample(index)
        trained += int(sample.in_loss.sum())
        begins = np.flatnonzero(sample.tokens == v.begin_image)
        images += len(begins)
        assert (sample.tokens[begins + CODES + 1] == v.end_image).all()
    tokens = sum(map(len, documents))
    assert images == 2 * 15 and trained == 2 * (tokens - len(documents))
    (note,) = [line for line in reader.warnings() if "was not written by" in line]
    assert "data.stage1[0]: " in note and "where its documents came from is not known" in note
    assert "0 of its 30 documents begin with <s>, and 30 end with </s>" in note


def test_only_conversations_have_answers(documents, tokenizer, tmp_path):
    write_megatron(tmp_path / "m", documents)
    with pytest.raises(ConfigErrors, match=r"30 of the 30 documents of .* are not conversations"):
        BatchReader(config_of(tmp_path / "m", loss_on="answers"), tokenizer)


def damaged(v, documents):
    begin, code, end = v.begin_image, int(v.code_token_ids[3]), v.end_image
    image = [begin, *[code] * CODES, end]
    whole = "images that are not whole"
    return [
        ([begin, *[code] * (CODES - 1), end], whole),
        ([begin, *[code] * (CODES + 1), end], whole),
        ([begin, *[code] * CODES], whole),
        ([begin, begin, *[code] * (CODES - 1), end], whole),
        ([*[code] * CODES, end], whole),
        ([*image, code], whole),
        ([end, *image], whole),
        ([begin], whole),
        ([begin, *[code] * 8, 300, *[code] * 7, end], whole),
        ([300, v.size], "token ids outside the vocabulary"),
    ]


@pytest.mark.parametrize("kind", range(10))
def test_bad_documents_are_named(documents, tokenizer, tmp_path, kind):
    bad, what = damaged(tokenizer.vocabulary, documents)[kind]
    documents[7] = documents[19] = bad
    write_megatron(tmp_path / "m", documents)
    with pytest.raises(DataError, match=what) as error:
        open_token_file(tmp_path / "m", tokenizer)
    assert "2 documents (7, 19, counted from 0) have " in str(error.value)


def test_negative_ids_are_named(documents, tokenizer, tmp_path):
    documents[3] = [300, -1]
    write_megatron(tmp_path / "m", documents)
    with pytest.raises(DataError, match=r"1 document \(3, counted from 0\) has token ids outside"):
        open_token_file(tmp_path / "m", tokenizer)


def change(path: Path, position: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[position : position + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: change(Path(f"{p}.idx"), 0, b"XX"), "not with the header of a Megatron .idx"),
        (lambda p: Path(f"{p}.idx").write_bytes(b""), "not with the header of a Megatron .idx"),
        (lambda p: change(Path(f"{p}.idx"), 17, b"\x07"), "holds float32 values, which are no"),
        (lambda p: change(Path(f"{p}.idx"), 17, b"\x63"), "holds unknown code 99 values"),
        (lambda p: change(Path(f"{p}.idx"), 17, b"\x08"), "of sequence 1 does not follow"),
        (lambda p: change(Path(f"{p}.idx"), 18, b"\xff" * 8), "its header names"),
        (lambda p: change(Path(f"{p}.idx"), 34, b"\x00"), "does not follow from the lengths"),
        (lambda p: change(Path(f"{p}.idx"), -8, b"\x00"), "do not span its 30 sequences"),
        (lambda p: Path(f"{p}.bin").write_bytes(b"1234"), "has 4 bytes, but its index names"),
        (lambda p: Path(f"{p}.bin").write_bytes(b""), "has 0 bytes, but its index names"),
        (lambda p: Path(f"{p}.bin").write_bytes(b"123"), "has 3 bytes, but its index names"),
        (lambda p: Path(f"{p}.documents").write_bytes(b""), "incomplete: its .json, which is"),
    ],
)
def test_damaged_files_are_refused(documents, tokenizer, tmp_path, damage, message):
    write_megatron(tmp_path / "m", documents)
    damage(tmp_path / "m")
    with pytest.raises(ChameleonError) as error:
        open_token_file(tmp_path / "m", tokenizer)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_damaged_datatrove_files_are_refused(documents, tokenizer, tmp_path):
    write_datatrove(tmp_path / "d", documents)
    whole = Path(f"{tmp_path}/d.ds").read_bytes()
    Path(f"{tmp_path}/d.ds").write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"but its .index names \d+ tokens, of 2 or 4 bytes"):
        open_token_file(tmp_path / "d", tokenizer)
    Path(f"{tmp_path}/d.ds.index").write_bytes(b"")
    with pytest.raises(DataError, match="holds no document with a token"):
        open_token_file(tmp_path / "d", tokenizer)


def test_the_tokenizer_must_be_named(documents, tmp_path):
    write_megatron(tmp_path / "m", documents)
    with pytest.raises(
        DataError, match=r"so its tokenizer is not known\. Name it: --tokenizer DIR"
    ):
        open_token_file(tmp_path / "m", None)
