"""Blocks: resuming after any of them gives the rest; a broken file gives its whole records."""

import gzip
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from megatron_chameleon.data.documents.parse import parse_block
from megatron_chameleon.data.inputs import lines
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.decoding import compression
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.data.inputs.records import BLOCK_IMAGES, Fault, Limits, Position
from megatron_chameleon.data.inputs.shards import plan_ranges
from mixed_corpus import write_corpus

LINES = b"".join(b'{"text": "%d"}\n' % i for i in range(20_000))


def blocks_of(*paths, position=None, **options):
    inputs = find_inputs(paths)
    return list(read_blocks(inputs, plan_ranges(inputs), position, **options))


def contents(blocks):
    """The documents and faults of blocks, in a form that can be compared."""
    items = [item for block in blocks for item in parse_block(block)]
    return [
        (str(item.error), item.reason)
        if isinstance(item, Fault)
        else (item.id, item.where, item.record, str(item.content))
        for item in items
    ]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(compression, "READ_BYTES", 512)


def test_resuming_after_any_block_gives_the_rest(tmp_path, small_blocks):
    # parquet first: it is read by a process of its own, which takes a moment to start
    paths = sorted(write_corpus(tmp_path, 40), key=lambda path: path.suffix != ".parquet")
    paths[3].write_bytes(paths[3].read_bytes()[:30_000])  # a broken tar in the middle
    paths[4].write_bytes(paths[4].read_bytes()[:-40])
    blocks = blocks_of(*paths)
    whole = contents(blocks)
    assert len(blocks) > 20 and sum(reason == "broken file" for _, reason, *_ in whole) == 2
    for number, block in enumerate(blocks, start=1):
        after = Position.from_json(json.loads(json.dumps(block.after.to_json())))
        rest = blocks_of(*paths, position=after)
        assert contents(blocks[:number]) + contents(rest) == whole


def test_read_bytes_end_at_the_size_of_the_input(tmp_path, small_blocks):
    paths = write_corpus(tmp_path, 40)
    read = [block.after.read_bytes for block in blocks_of(*paths)]
    assert read == sorted(read) and read[-1] == sum(path.stat().st_size for path in paths)


def test_blocks_hold_few_images(tmp_path):
    image = {"type": "image", "image": "x.png"}
    lines = [{"content": [image] * (1 + i % 3)} for i in range(100)] + [{"content": [image] * 99}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    counts = [
        sum(len(document.content) for document in parse_block(block)) for block in blocks_of(path)
    ]
    assert sum(counts) == sum(len(line["content"]) for line in lines) and counts[-1] == 99
    assert all(BLOCK_IMAGES - 3 < count <= BLOCK_IMAGES for count in counts[:-2])


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_compressed_file_that_breaks_off(tmp_path, codec, kept):
    content = pyarrow.compress(LINES, codec, asbytes=True)
    path = tmp_path / f"a.jsonl.{'gz' if codec == 'gzip' else 'zst'}"
    path.write_bytes(content[: int(len(content) * kept)])
    items = [item for block in blocks_of(path) for item in parse_block(block)]
    assert [int(item.content[0].text) for item in items[:-1]] == list(range(len(items) - 1))
    fault = items[-1]
    assert fault.error.where == f"{path}:{len(items)}" and fault.reason == "broken file"
    assert "the file breaks off here, the rest of it is lost (" in fault.error.what


@pytest.mark.parametrize("pack", [gzip.compress, lambda b: pyarrow.compress(b, "zstd", asbytes=1)])
def test_several_members_are_one_file(tmp_path, pack):
    path = tmp_path / f"a.jsonl.{'gz' if pack is gzip.compress else 'zst'}"
    path.write_bytes(pack(LINES[:100_006]) + pack(LINES[100_006:]))
    items = [item for block in blocks_of(path) for item in parse_block(block)]
    assert [int(item.content[0].text) for item in items] == list(range(20_000))


def test_not_compressed_at_all(tmp_path):
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(LINES)
        (fault,) = [item for block in blocks_of(tmp_path / name) for item in parse_block(block)]
        assert fault.reason == "broken file" and fault.error.where.endswith(f"{name}:1")


def test_line_that_is_too_long_is_one_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1"}\n{"text": "' + "x" * 20_000 + '"}\n{"text": "3"}\n')
    found = blocks_of(path, limits=Limits(5000))
    items = [item for block in found for item in parse_block(block)]
    assert [getattr(item, "record", None) for item in items] == [1, None, 3]
    assert str(items[1].error).startswith(f"{path}:2: the line has 0 MiB, more than the 0.00476")
    assert items[1].error.remedy == "Split or remove it, or raise --largest-document"


def test_zip_bomb_needs_no_memory(tmp_path):
    """A single line of 256 MiB, packed into a few hundred KB: none of it may be kept."""
    part = gzip.compress(b"x" * (1 << 24))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(part * 16 + gzip.compress(b'\n{"text": "2"}\n'))
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = blocks_of(path, limits=Limits(1 << 21))
    items = [item for block in found for item in parse_block(block)]
    assert items[0].reason == "too large document" and items[1].record == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_samples_are_those_of_webdataset(tmp_path):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    names = ["a/000.JPG", "a/000.seg.png", "a/000.txt", "a/b.c/1.txt", "001.txt", "001.png", "x"]
    files = [(name, name.encode()) for name in names]
    path = write_tar(tmp_path / "a.tar", files)
    with path.open("rb") as file:
        expander = tar_file_expander([{"url": str(path), "stream": file}])
        theirs = [
            {key: value for key, value in sample.items() if key in ("__key__",) or key[:2] != "__"}
            for sample in group_by_keys(expander)
        ]
    (block,) = blocks_of(path)
    assert block.payload.samples == theirs


@pytest.mark.parametrize(("suffix", "mode"), [("tar.gz", "w:gz"), ("tgz", "w:gz")])
def test_compressed_tar(tmp_path, suffix, mode):
    files = [(f"{i}.{kind}", b"x" * 5000) for i in range(40) for kind in ("png", "txt")]
    plain = write_tar(tmp_path / "a.tar", files)
    packed = write_tar(tmp_path / f"b.{suffix}", files, mode)
    found = [[block.payload for block in blocks_of(path)] for path in (plain, packed)]
    assert found[0] == found[1] and [len(p.samples) for p in found[0]] == [32, 8]
    zstd = tmp_path / "c.tar.zst"
    zstd.write_bytes(pyarrow.compress(plain.read_bytes(), "zstd", asbytes=True))
    assert [block.payload for block in blocks_of(zstd)] == found[0]


def test_parquet_of_texts(tmp_path):
    table = pyarrow.table({"text": ["a", None, "c"], "source": ["s"] * 3, "id": [7, 8, 9]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (block,) = blocks_of(tmp_path / "a.parquet")
    first, fault, last = parse_block(block)
    assert (first.id, first.corpus_name, first.content[0].text, last.record) == ("7", "s", "a", 3)
    assert fault.error.what == "text must be a string, not NoneType"
