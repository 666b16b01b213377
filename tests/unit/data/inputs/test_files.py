"""Which files are read, and which part of them belongs to a shard."""

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from megatron_chameleon.data.documents.parse import parse_block, read_documents
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import InputRange, find_inputs, signature_of
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.errors import DataError


def texts(documents):
    return [part.text for document in documents for part in document.content]


def test_globs_are_sorted_and_words_keep_their_order(tmp_path, write_lines):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        write_lines(name, {"text": name})
    (tmp_path / "folder.jsonl").mkdir()
    words = [tmp_path / "c.jsonl", tmp_path / "[a-b]*.jsonl", f"{tmp_path}/*.jsonl"]
    assert [item.name for item in find_inputs(words)] == [
        *("c.jsonl", "a.jsonl", "b.jsonl", "a.jsonl", "b.jsonl", "c.jsonl"),
    ]
    literal = write_lines("x[1].jsonl", {"text": "not a pattern"})
    assert [item.path for item in find_inputs([literal])] == [str(literal)]
    with pytest.raises(DataError, match=r"/\*\.tar: matches no file\. Check the pattern"):
        find_inputs([tmp_path / "*.tar"])


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.jsonl", "lines", None),
        ("a.b.JSON.gz", "json", "gzip"),
        ("a.ndjson.zst", "lines", "zstd"),
        ("a.tar", "tar", None),
        ("a.tgz", "tar", "gzip"),
        ("a.tar.zstd", "tar", "zstd"),
        ("a.parquet", "parquet", None),
    ],
)
def test_kind_by_suffix(tmp_path, name, kind, compression):
    (tmp_path / name).write_bytes(b"")
    (item,) = find_inputs([tmp_path / name])
    assert (item.kind, item.compression) == (kind, compression)


@pytest.mark.parametrize("name", ["a.xlsx", "jsonl", "a.gz", "a.parquet.gz", "tar"])
def test_unknown_kinds(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"unknown kind of file\. Pass a \.jsonl, \.json"):
        find_inputs([tmp_path / name])


@pytest.fixture
def memory():
    """A remote file system, in memory."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_a_folder_at_a_url_is_read_as_a_local_one(memory):
    memory.pipe("/set/b.jsonl", b'{"text": "b"}\n')
    memory.pipe("/set/a.jsonl", b'{"text": "a"}\n')
    memory.pipe("/set/README.md", b"of the set")
    for name in ("memory://set", "memory://set/"):
        assert texts(read_documents([name])) == ["a", "b"]
    memory.pipe("/none/README.md", b"no documents")
    memory.pipe("/saved/state.json", b"{}")
    memory.pipe("/splits/train.jsonl", b"{}")
    memory.pipe("/splits/test.jsonl", b"{}")
    memory.pipe("/kinds/a.jsonl", b"{}")
    memory.pipe("/kinds/b.parquet", b"PAR1")
    for name, said in (
        ("gone", "no such file"),
        ("none", r"without files of documents \(it has 1 others\)"),
        ("saved", "is a folder of `datasets`, which is read from a local disk alone. Copy it"),
        ("splits", "is a folder of 2 splits: .* Pass what you want to read, such as memory://spl"),
        ("kinds", "is a folder of 2 kinds of file: .jsonl, .parquet"),
    ):
        with pytest.raises(DataError, match=said):
            find_inputs([f"memory://{name}/"])


def test_urls_with_globs_and_relative_images(memory, tmp_path, picture):
    image = (tmp_path / picture("i.png")).read_bytes()
    memory.pipe("/set/b.jsonl", b'{"text": "b"}\n')
    memory.pipe("/set/a.jsonl", b'{"content": [{"type": "image", "image": "img/i.png"}]}\n')
    memory.pipe("/set/img/i.png", image)
    first, second = read_documents(["memory://set/*.jsonl"])
    assert first.where == "memory:///set/a.jsonl:1" and texts([second]) == ["b"]
    assert first.content[0].read() == image
    (alone,) = read_documents(["memory://set/b.jsonl"])
    assert alone.id == "b.jsonl:1" and alone.corpus_name == "b"
    with pytest.raises(DataError, match=r"memory://set/none\.jsonl: no such file"):
        find_inputs(["memory://set/none.jsonl"])
    with pytest.raises(DataError, match=r"nosuch://x/a\.jsonl: cannot be opened .* Install the pa"):
        find_inputs(["nosuch://x/a.jsonl"])


def test_signature_follows_names_sizes_and_times(write_lines):
    path = write_lines("a.jsonl", {"text": "1"})
    before = signature_of(find_inputs([path]))
    assert signature_of(find_inputs([path])) == before
    write_lines("a.jsonl", {"text": "22"})
    assert signature_of(find_inputs([path])) != before
    other = path.rename(path.with_name("b.jsonl"))
    assert len({before, signature_of(find_inputs([other]))}) == 2


@pytest.fixture
def files(tmp_path, write_lines):
    """Texts 0, 1, 2, ... in lines of very different lengths, parquet, gzip and an empty file."""
    lengths = [1, 900, 3, 3, 50, 1, 1, 400, 1]
    lines = write_lines("a.jsonl", *({"text": f"{i} {'x' * n}"} for i, n in enumerate(lengths)))
    lines.write_text(lines.read_text().removesuffix("\n"))
    table = pyarrow.table({"text": [str(i) for i in range(9, 20)]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=3)
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(pyarrow.compress(b'{"text": "20"}\n{"text": "21"}\n', "gzip", asbytes=True))
    last = write_lines("d.jsonl", {"text": "22"}, "", {"text": "23"})
    return [lines, tmp_path / "b.parquet", packed, write_lines("empty.jsonl"), last]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 500])
def test_shards_one_after_the_other_are_the_whole(files, count):
    if count > 20:  # parquet is read by a process of its own, which takes a moment to start
        lines = "".join(f'{{"text": "{i}"}}\n' for i in range(9, 20))
        files[1] = files[1].with_suffix(".jsonl")
        files[1].write_text(lines)
    inputs = find_inputs(files)
    found = []
    for index in range(count):
        for block in read_blocks(inputs, plan_ranges(inputs, (index, count))):
            found += parse_block(block)
    assert [int(text.split()[0]) for text in texts(found)] == list(range(24))
    whole = list(read_documents(files))
    assert [document.where for document in found] == [document.where for document in whole]


def test_shards_have_about_the_same_size(write_lines):
    names = [f"{i:03}.jsonl" for i in range(100)]
    paths = [write_lines(name, *[{"text": "x" * 50}] * 100) for name in names]
    inputs = find_inputs(paths)
    total = sum(item.size_bytes for item in inputs)
    for index in range(7):
        ranges = plan_ranges(inputs, (index, 7))
        assert abs(sum(part.size_bytes for part in ranges) - total / 7) <= 1
        assert all(part.start < inputs[part.input].size_bytes for part in ranges)


def test_one_shard_reads_all(files):
    inputs = find_inputs(files)
    sizes = [item.size_bytes for item in inputs]
    assert plan_ranges(inputs) == [InputRange(i, 0, None, size) for i, size in enumerate(sizes)]
