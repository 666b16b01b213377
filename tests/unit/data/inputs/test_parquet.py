"""Parquet is decoded within limits, and what is whole in a damaged file is read."""

import os
import signal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_chameleon.data.documents.parse import parse_block
from megatron_chameleon.data.inputs import parquet
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.decoding import parquet_client
from megatron_chameleon.data.inputs.decoding.parquet_client import ParquetClient, ParquetFault
from megatron_chameleon.data.inputs.files import InputFile, find_inputs
from megatron_chameleon.data.inputs.records import Fault, Limits
from megatron_chameleon.data.inputs.shards import plan_ranges


def read(path, **options):
    """The texts of a file's documents by row, and its faults."""
    inputs = find_inputs([path])
    items = [
        item
        for block in read_blocks(inputs, plan_ranges(inputs), **options)
        for item in parse_block(block)
    ]
    faults = [item for item in items if isinstance(item, Fault)]
    good = {i.record: i.content[-1].text for i in items if not isinstance(i, Fault)}
    return good, faults


def write(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100)
    return path


def test_what_is_whole_around_a_damaged_page_is_read(tmp_path):
    """Three row groups; in the second one a page in the middle is damaged."""
    rng = np.random.default_rng(0)
    texts = [
        f"{i} {bytes(rng.integers(97, 123, 400, dtype=np.uint8)).decode()}" for i in range(300)
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}),
        path,
        row_group_size=100,
        data_page_size=2000,
        write_batch_size=10,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    content = bytearray(path.read_bytes())
    at = content.index(texts[155].encode())
    content[at] ^= 1
    path.write_bytes(content)
    good, (fault,) = read(path)
    lost = sorted(set(range(1, 301)) - set(good))
    assert lost[0] in range(147, 157) and lost[-1] == 200
    assert lost == list(range(lost[0], 201)) and fault.reason == "broken file"
    what = f"a.parquet:{lost[0]}: rows {lost[0]} to 200, the rest of a row group, are lost"
    assert what in str(fault.error)
    assert all(good[row] == texts[row - 1] for row in good)


def test_many_damaged_row_groups_end_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MOST_FAULTS", 1)
    path = write(tmp_path / "a.parquet", text=[f"{i}" for i in range(500)])
    metadata = pyarrow.parquet.read_metadata(path)
    content = bytearray(path.read_bytes())
    for group in (1, 3):
        column = metadata.row_group(group).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + 30] = bytes(30)
    path.write_bytes(content)
    good, faults = read(path)
    assert sorted(good) == [*range(1, 101), *range(201, 301)] and len(faults) == 2
    assert "the rest of the file is lost: 2 row groups are damaged" in faults[1].error.what


@pytest.mark.parametrize("is_dictionary", [True, False])
def test_rows_that_share_one_long_text(tmp_path, is_dictionary):
    """30 kB of parquet that are gigabytes of rows."""
    text = "x" * (20 << 20)
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4, pyarrow.int32()), [text])
    path = tmp_path / "a.parquet"
    column = pyarrow.chunked_array([texts if is_dictionary else texts.dictionary_decode()])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")
    good, faults = read(path, limits=Limits(16 << 20 if not is_dictionary else 128 << 20))
    assert good == {} and [fault.reason for fault in faults] == ["too large document"] * 4
    if is_dictionary:
        assert str(faults[1].error) == (
            f"{path}:2: the document has 20 MiB of text, more than the 16 MiB of --largest-text. "
            "Split or remove it, or raise --largest-text."
        )
    else:
        assert "the row has 20 MiB, more than the 16 MiB of --largest-document" in str(
            faults[1].error
        )


def test_lists_of_very_many_values(tmp_path):
    """A list of nulls has no bytes; as Python objects it would take gigabytes."""
    many = pyarrow.array([[None], [None] * 3_000_000, [None]], type=pyarrow.list_(pyarrow.null()))
    path = write(tmp_path / "a.parquet", images=many, texts=[["a"], ["b"], ["c"]])
    good, (fault,) = read(path)
    assert good == {1: "a", 3: "c"}
    assert "a.parquet:2: the row has 3,000,003 values, more than the 1,048,576" in str(fault.error)


def test_a_row_that_takes_more_memory_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_client, "LEAST_MEMORY_BYTES", 0)
    texts = ["a", "x" * (64 << 20), "c", *["d"] * 98]
    path = write(tmp_path / "a.parquet", text=texts)
    good, (fault,) = read(path, limits=Limits(4 << 20))
    assert good == {101: "d"}  # the rows around it have the same dictionary
    assert "takes more than 16 MiB of memory, 4 times --largest-document" in str(fault.error)


def test_remote_files(tmp_path):
    import fsspec

    path = write(tmp_path / "a.parquet", text=[f"{i}" for i in range(250)])
    system = fsspec.filesystem("memory")
    system.pipe("/set/a.parquet", path.read_bytes())
    try:
        good, faults = read("memory://set/a.parquet")
    finally:
        system.store.clear()
    assert len(good) == 250 and faults == []


def test_a_decoder_that_dies_is_a_fault(tmp_path):
    path = write(tmp_path / "a.parquet", text=["a"] * 300)
    with path.open("rb") as file, ParquetClient(str(path), file, 0, 1 << 27) as client:
        os.kill(client._process.pid, signal.SIGSEGV)
        with pytest.raises(ParquetFault, match=r"^Arrow ended with SIGSEGV$"):
            list(client.rows(group=0))
        request = {"batch_rows": 9, "limits": [1 << 27, 9999, 9999], "text_columns": []}
        (message,) = client.rows(group=1, first=0, stop=3, columns=["text"], **request)
        assert message[0] == b"B"  # it has been started again


def test_not_parquet_at_all(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    good, (fault,) = read(path)
    assert good == {} and "the file breaks off after row 0" in str(fault.error)
    vanished = InputFile(str(tmp_path / "b.parquet"), "parquet", None, 9, "")
    with path.open("rb") as file, pytest.raises(FileNotFoundError):
        ParquetClient(vanished.path, file, 9, 1 << 27).open()
