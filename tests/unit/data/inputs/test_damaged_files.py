"""What was whole is read, whatever stands around it: padding, cuts, garbage, foreign files."""

import gzip
import io
import json
import random
import tarfile
import zlib

import pyarrow
import pytest

from megatron_chameleon.data.documents.parse import parse_block
from megatron_chameleon.data.inputs import lines
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.decoding import compression
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.data.inputs.records import Fault, Limits, TarSamples
from megatron_chameleon.data.inputs.shards import plan_ranges

LINES = b"".join(b'{"text": "%d"}\n' % i for i in range(9000))


def zstd(content):
    return pyarrow.compress(content, "zstd", asbytes=True)


PACKERS = {".gz": gzip.compress, ".zst": zstd}


def blocks_of(path, position=None, **options):
    inputs = find_inputs([path])
    return list(read_blocks(inputs, plan_ranges(inputs), position, **options))


def read(path, content, **options):
    """The texts of a file's documents, and its faults."""
    path.write_bytes(content)
    items = [item for block in blocks_of(path, **options) for item in parse_block(block)]
    faults = [item for item in items if isinstance(item, Fault)]
    return [item.content[-1].text for item in items if not isinstance(item, Fault)], faults


def samples_of(path, content, **options):
    """The samples of a tar as dicts, and its faults."""
    path.write_bytes(content)
    payloads = [block.payload for block in blocks_of(path, **options)]
    faults = [payload for payload in payloads if isinstance(payload, Fault)]
    return [s for p in payloads if isinstance(p, TarSamples) for s in p.samples], faults


# Compression


@pytest.mark.parametrize("end", [bytes(4) + b"1234", b"1234"])
def test_content_of_which_only_the_checksum_or_length_is_wrong_is_kept(tmp_path, end):
    packed = gzip.compress(LINES)
    texts, faults = read(tmp_path / "a.jsonl.gz", packed[: -len(end)] + end)
    assert len(texts) == 9000
    assert len(faults) == 1 and "incorrect" in faults[0].error.what


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("zeros", [1, 3, 512, 200_000])
def test_zeros_after_the_end_are_padding(tmp_path, suffix, zeros):
    packed = PACKERS[suffix](LINES) + bytes(zeros)
    texts, faults = read(tmp_path / f"a.jsonl{suffix}", packed)
    assert len(texts) == 9000 and faults == []


def test_gzip_members_with_zeros_between_them(tmp_path):
    packed = gzip.compress(LINES) + bytes(700) + gzip.compress(b'{"text": "z"}\n') + bytes(5)
    texts, faults = read(tmp_path / "a.jsonl.gz", packed)
    assert len(texts) == 9001 and texts[-1] == "z" and faults == []


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("garbage", [b"x", b"not compressed\n" * 9000, bytes(9) + b"x"])
def test_garbage_after_the_end_is_one_fault(tmp_path, suffix, garbage):
    texts, (fault,) = read(tmp_path / f"a.jsonl{suffix}", PACKERS[suffix](LINES) + garbage)
    assert len(texts) == 9000 and fault.reason == "broken file"


@pytest.mark.parametrize("kept", [0.0001, 0.1, 0.37, 0.5, 0.9, 0.999, 0.99999])
def test_all_that_zlib_gives_of_a_cut_file_is_used(tmp_path, kept):
    packed = gzip.compress(LINES)
    packed = packed[: int(len(packed) * kept)]
    texts, faults = read(tmp_path / "a.jsonl.gz", packed)
    assert len(texts) == zlib.decompressobj(31).decompress(packed).count(b"\n")
    assert len(faults) == bool(packed)


def test_all_that_zstd_gives_of_a_cut_file_is_used(tmp_path):
    """Frames of a few lines each: all that are whole are read, and the next one's blocks."""
    frames = [zstd(LINES[at : at + 3000]) for at in range(0, len(LINES), 3000)]
    packed = b"".join(frames[:12]) + frames[12][:-3]
    texts, (fault,) = read(tmp_path / "a.jsonl.zst", packed)
    assert len(texts) == LINES[:36_000].count(b"\n")
    assert "Truncated" in str(fault.error)


def test_damage_within_gzip_loses_nothing_before_it(tmp_path):
    rng = random.Random(0)
    content = b"".join(b'{"text": "%d"}\n' % rng.randrange(10**12) for _ in range(9000))
    packed = bytearray(gzip.compress(content))
    middle = len(packed) // 2
    packed[middle : middle + 50] = b"\xff" * 50
    texts, faults = read(tmp_path / "a.jsonl.gz", bytes(packed))
    whole = zlib.decompressobj(31).decompress(bytes(packed[: middle - 300]))
    assert len(texts) >= whole.count(b"\n") > 4000
    assert texts[:4000] == [json.loads(line)["text"] for line in content.splitlines()[:4000]]
    assert [fault.reason for fault in faults].count("broken file") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", gzip.compress(LINES), "is compressed with gzip. Let its name end with .gz."),
        ("a.tar", gzip.compress(LINES), "is compressed with gzip. Let its name end with .gz."),
        ("a.tar", zstd(LINES), "is compressed with zstd. Let its name end with .zst."),
        ("a.jsonl", b"PK\3\4....", "is a zip archive. Unpack it."),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "is UTF-16. Write it as UTF-8."),
        ("a.jsonl.gz", LINES, "is not gzip. Let its name end as its kind does."),
        ("a.tar", LINES, "no header of a tar is found"),
        ("a.jsonl", b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "Let its name end with .json."),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, name, content, message):
    texts, (fault,) = read(tmp_path / name, content)
    assert texts == [] and message in str(fault.error)


def test_byte_order_marks_are_not_content(tmp_path):
    one = b'\xef\xbb\xbf{"text": "a"}\n'
    assert read(tmp_path / "a.jsonl", one + b'{"text": "b"}\n' + one) == (["a", "b", "a"], [])
    assert read(tmp_path / "a.json", b'\xef\xbb\xbf[{"text": "a"}]') == (["a"], [])


# .json


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_an_array_is_its_elements(tmp_path, monkeypatch, indent, suffix):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 700)
    monkeypatch.setattr(compression, "READ_BYTES", 7)
    texts = ['"', "\\", '\\"', "]}", "a\nb", "[{", ",", "\ud800", "é"] * 9
    content = json.dumps([{"id": i, "text": t} for i, t in enumerate(texts)], indent=indent)
    path = tmp_path / f"a.json{suffix}"
    path.write_bytes(PACKERS.get(suffix, bytes)(content.encode()))
    blocks = blocks_of(path)
    items = [item for block in blocks for item in parse_block(block)]
    assert [item.content[0].text for item in items] == texts and len(blocks) > 1
    assert [item.record for item in items] == list(range(1, 82))
    for number, block in enumerate(blocks, start=1):
        rest = [item for later in blocks_of(path, block.after) for item in parse_block(later)]
        assert rest == [item for later in blocks[number:] for item in parse_block(later)]


def test_objects_of_several_lines(tmp_path):
    content = "\n".join(json.dumps({"id": i, "text": str(i)}, indent=1) for i in range(40))
    assert read(tmp_path / "a.json", content.encode()) == ([str(i) for i in range(40)], [])


def test_lines_in_a_json_file_are_lines(tmp_path):
    content = b'{"text": "a"}\n[1, 2]\n{"text": "b"}\n{"text": \n'
    texts, faults = read(tmp_path / "a.json", content)
    assert texts == ["a", "b"] and [f.error.where[-1] for f in faults] == ["2", "4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"}, {"te', "the array does not end"),
        (b'[{"text": "a"}, {"text": "b"}', "the array does not end"),
        (b'[{"text": "a"}, {"text": "b"}] x', "something follows the array"),
        (b'[{"text": "a"},, {"text": "b"},]', None),
        (b' [ \n{"text": "a"}\n,\n{"text": "b"}\n] \n', None),
    ],
)
def test_arrays_with_faults(tmp_path, content, message):
    texts, faults = read(tmp_path / "a.json", content)
    assert texts == ["a", "b"][: len(texts)] and "a" in texts
    assert [message in str(fault.error) for fault in faults] == [True] * bool(message)


def test_an_element_that_is_too_large_is_one_fault(tmp_path):
    long = {"text": "x" * 5000}
    content = json.dumps([{"text": "a"}, long, {"text": "b"}]).encode()
    texts, (fault,) = read(tmp_path / "a.json", content, limits=Limits(3000))
    assert texts == ["a", "b"] and fault.reason == "too large document"


def test_a_line_of_very_many_values_is_one_fault(tmp_path):
    """It would take a gigabyte; commas within a text are not values."""
    many = b'{"content": [' + b"[]," * 1_400_000 + b"[]]}\n"
    commas = b'{"text": "' + b',\\"' * 1_400_000 + b'"}\n'
    texts, (fault,) = read(tmp_path / "a.jsonl", many + commas)
    assert [len(text) for text in texts] == [2_800_000]
    assert "a.jsonl:1: the line has 2,800,003 values, more than the 1,048,576" in str(fault.error)


def test_an_array_belongs_to_one_shard(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": str(i)} for i in range(99)], indent=1))
    inputs = find_inputs([path])
    found = []
    for index in range(5):
        for block in read_blocks(inputs, plan_ranges(inputs, (index, 5))):
            found += parse_block(block)
    assert [item.content[0].text for item in found] == [str(i) for i in range(99)]


# Tar


def tar_of(files, format=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


PAIRS = [(f"{i}.{s}", b"%d" % i * 300) for i in range(8) for s in ("png", "txt")]


def keys(samples):
    return [sample["__key__"] for sample in samples]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_format(tmp_path, format):
    long = "d" * 90 + "/" + ("e" * 99 if format != tarfile.USTAR_FORMAT else "e" * 60)
    files = [(f"{long}.png", b"1"), (f"{long}.txt", b"2"), ("é.png", b"3"), ("x", b"4")]
    samples, faults = samples_of(tmp_path / "a.tar", tar_of(files, format))
    assert faults == [] and samples == [
        {"png": b"1", "txt": b"2", "__key__": long},
        {"png": b"3", "__key__": "é"},
    ]


@pytest.mark.parametrize("cut", [100, 512, 700, 1023, 1024, 1100, 1536, 2048, 2200, 4096, 5000])
def test_a_cut_tar_keeps_its_whole_samples(tmp_path, cut):
    """Each file takes 1,024 bytes. A file without its padding is whole."""
    whole = tar_of([(name, content[:300]) for name, content in PAIRS])
    samples, faults = samples_of(tmp_path / "a.tar", whole[:cut])
    both = [key for i, key in enumerate("01234567") if cut >= (2 * i + 1) * 1024 + 512 + 300]
    assert [s["__key__"] for s in samples if len(s) == 3] == both
    assert len(faults) == (cut % 1024 != 0 and cut % 1024 < 812)


def test_no_end_and_garbage_at_the_end(tmp_path):
    whole = tar_of(PAIRS)
    end = len(PAIRS) * 1024
    samples, faults = samples_of(tmp_path / "a.tar", whole[:end])
    assert keys(samples) == list("01234567") and faults == []
    samples, faults = samples_of(tmp_path / "a.tar", whole + b"garbage" * 999)
    assert keys(samples) == list("01234567")
    assert [fault.reason for fault in faults] == ["broken file"]
    samples, faults = samples_of(tmp_path / "a.tar", whole + tar_of([("z.txt", b"z")]))
    assert keys(samples) == [*"01234567", "z"] and faults == []


def test_reading_goes_on_after_a_damaged_header(tmp_path):
    whole = bytearray(tar_of(PAIRS))
    at = 2 * 2 * 1024  # the header of 2.png
    whole[at + 124 : at + 136] = b"77777777777\0"
    path = tmp_path / "a.tar"
    samples, (fault,) = samples_of(path, bytes(whole))
    assert keys(samples) == list("01234567") and "png" not in samples[2]
    assert str(fault.error).startswith(f"{path}: a header is damaged after sample 2; reading goes")
    for number, block in enumerate(blocks := blocks_of(path), start=1):
        assert str(blocks_of(path, block.after)) == str(blocks[number:])


def test_foreign_entries_are_passed_over(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in [
            ("./", tarfile.DIRTYPE),
            ("./._0001.png", tarfile.REGTYPE),
            ("./0001.png", tarfile.REGTYPE),
            ("./PaxHeaders.12/0001.txt", tarfile.REGTYPE),
            ("__MACOSX/._0001.txt", tarfile.REGTYPE),
            ("./.DS_Store", tarfile.REGTYPE),
            ("0001.txt", tarfile.REGTYPE),
            (".txt", tarfile.REGTYPE),
            ("README", tarfile.REGTYPE),
            ("0001.jpg", tarfile.LNKTYPE),
            ("0001.gif", tarfile.SYMTYPE),
            ("0001.bmp", tarfile.FIFOTYPE),
            ("0001.tif", tarfile.CHRTYPE),
        ]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "0001.png"
            entry.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(b"abc"))
    samples, faults = samples_of(tmp_path / "a.tar", buffer.getvalue())
    assert samples == [{"png": b"abc", "txt": b"abc", "__key__": "0001"}] and faults == []


def header(name, size, kind=b"0"):
    """A header with any size, even one that no file has."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("size", [1 << 20, 1 << 62, (1 << 63) - 1, 1 << 80])
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"V"])
def test_sizes_that_nothing_has(tmp_path, size, kind):
    content = tar_of(PAIRS)[: len(PAIRS) * 1024] + header("big.png", size, kind) + bytes(3000)
    samples, (fault,) = samples_of(tmp_path / "a.tar", content)
    assert keys(samples) == list("01234567")
    assert "unexpected end" in str(fault.error) and "after sample 8" in str(fault.error)


def test_extended_headers_and_sparse_files(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, extra in [
            ("a.txt", {}),
            ("b.txt", {"comment": "x" * 100_000}),
            ("c.txt", {"GNU.sparse.major": "1"}),
            ("d.txt", {"comment": "small"}),
        ]:
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = 1, extra
            tar.addfile(entry, io.BytesIO(b"x"))
    sparse = header("e.txt", 1, b"S")
    content = buffer.getvalue() + sparse + b"y" + bytes(511) + header("f.txt", 0)
    samples, faults = samples_of(tmp_path / "a.tar", content, limits=Limits(50_000))
    assert keys(samples) == ["a", "d", "f"]
    assert [fault.error.where.rpartition(":")[2] for fault in faults] == ["b", "c", "e"]
    assert [fault.reason for fault in faults] == ["too large document", *["broken document"] * 2]
    assert "sparse file" in str(faults[2].error)


def test_a_sample_that_is_too_large_is_one_fault(tmp_path):
    files = [("a.txt", b"a"), *((f"k.{i}.png", bytes(4000)) for i in range(5)), ("z.txt", b"z")]
    samples, (fault,) = samples_of(tmp_path / "a.tar", tar_of(files), limits=Limits(15_000))
    assert keys(samples) == ["a", "z"] and fault.id == "k"
    assert "the files of the sample have 0 MiB, more than" in str(fault.error)
