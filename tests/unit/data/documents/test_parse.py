"""Each kind of file: the documents that it gives, and what is said of a broken one."""

import gzip
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.parse import UnusedKeys, parse_block, read_documents
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.data.inputs.records import Fault
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.errors import DataError


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_files_are_read_in_order(write_lines):
    first = write_lines("a.jsonl", {"text": "1"}, "", {"text": "2"})
    second = write_lines("b.json", {"text": "3"})
    documents = list(read_documents([first, second]))
    assert [document.content[0].text for document in documents] == ["1", "2", "3"]
    assert (documents[1].where, documents[1].record) == (f"{first}:3", 3)


def test_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "1"}\n{"text": "2"}\n'))
    assert [d.content[0].text for d in read_documents([path])] == ["1", "2"]


def test_truncated_gzip_names_the_line(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(10_000))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:-2000])
    with pytest.raises(
        DataError, match=r"a\.jsonl\.gz:\d+: the file breaks off here, the rest of it is lost"
    ):
        list(read_documents([path]))


def test_tar_pairs_an_image_with_its_caption(tmp_path):
    path = write_tar(
        tmp_path / "shard-0.tar",
        {
            "000.JPG": b"jpeg",
            "000.txt": b"a caption\n",
            "001.json": json.dumps({"caption": "from json"}).encode(),
            "001.png": b"png",
            "002.json": json.dumps({"caption": "no image"}).encode(),
        },
    )
    documents = list(read_documents([path]))
    assert [d.id for d in documents] == ["000", "001", "002"]
    assert documents[0].content == (ImagePart(b"jpeg"), TextPart("a caption"))
    assert documents[1].content == (ImagePart(b"png"), TextPart("from json"))
    assert documents[1].where == f"{path}:001" and documents[1].corpus_name == "shard-0"
    with pytest.raises(DataError, match="no such image file"):
        documents[2].content[0].open()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": b"x"}, r"s\.tar:0: no caption among its files \(png\)\. Add KEY\.txt"),
        ({"0.png": b"x", "0.json": b"{"}, r"s\.tar:0: its \.json is not valid JSON"),
        ({"0.png": b"x", "0.txt": b"\xff"}, r"s\.tar:0: its \.txt is not UTF-8"),
        ({"0.png": b"x", "0.json": b'["caption"]'}, r"no caption among its files \(png, json\)"),
    ],
)
def test_tar_sample_without_a_caption(tmp_path, files, message):
    path = write_tar(tmp_path / "s.tar", files)
    with pytest.raises(DataError, match=message):
        list(read_documents([path]))


def shown(path):
    """The texts of each document, with None in the place of a picture; or why it is dropped."""
    inputs = find_inputs([path])
    found = []
    for block in read_blocks(inputs, plan_ranges(inputs)):
        for item in parse_block(block):
            if isinstance(item, Fault):
                found.append(item.error.what)
            else:
                parts = item.content
                found.append([p.text if isinstance(p, TextPart) else None for p in parts])
    return found


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"k.png": PNG, "k.jpg": b"x", "k.txt": b"two"}, [None, None, "two"]),
        ({"k.0.png": PNG, "k.1.png": PNG, "k.txt": b"<image>a<image>"}, [None, "a", None]),
        ({"k.picture": PNG, "k.txt": b"x", "k.cls": b"7"}, [None, "x"]),
        ({"k.PNG": PNG, "k.TXT": b"\xef\xbb\xbf x\n"}, [None, "x"]),
        ({"k.png": PNG, "k.json": b'\xef\xbb\xbf{"caption": "\\ufeff x\\n"}'}, [None, "x"]),
        ({"k.png": PNG, "k.caption": b"x", "k.txt": b"x\n"}, [None, "x"]),
        ({"k.png": PNG, "k.txt": b"x", "k.json": b'{"caption": "y", "text": "z"}'}, [None, "x"]),
        ({"k.png": PNG, "k.txt": b"x", "k.json": b'{"url": "https://a.b/c.jpg"}'}, [None, "x"]),
        ({"k.png": PNG, "k.txt": b"x", "k.json": b'{"image": "d/k.png"}'}, [None, "x"]),
        (
            {"k.png": PNG, "k.json": b'{"prompt": "<image>Which?", "answer": "Zero."}'},
            [None, "Which?", "Zero."],
        ),
        (
            {"k.png": PNG, "k.caption": b"x", "k.txt": b"y"},
            "has different captions in .txt and .cap",
        ),
        (
            {"k.png": PNG, "k.txt": b"a<image>b<image>"},
            "has 2 places for pictures (<image>) and 1 ",
        ),
        ({"k.png": PNG, "k.txt": b"x", "k.wav": b"y"}, "its .wav holds sound, which is not read"),
        (
            {"k.png": PNG, "k.txt": b"x", "k.json": b'{"mask": "m.png"}'},
            "the key mask holds a pict",
        ),
        (
            {"k.png": PNG, "k.json": b'{"caption": ["x", "y"]}'},
            "caption must be a string, not list",
        ),
    ],
)
def test_all_pictures_of_a_tar_sample_are_read_or_it_is_dropped(tmp_path, files, expected):
    (found,) = shown(write_tar(tmp_path / "s.tar", files))
    assert found == expected or found.startswith(expected)


IMAGE = {"bytes": PNG, "path": "0.png"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": [IMAGE], "text": ["x"]}, [None, "x"]),
        ({"text": ["<image>x"], "images": [[IMAGE]]}, [None, "x"]),
        ({"caption": ["x"], "jpg": [PNG]}, [None, "x"]),
        ({"image": [None], "text": ["x"]}, ["x"]),
        ({"text": ["x"], "image": [[[0, 255]]]}, "the key image must hold a picture, not a number"),
        ({"text": ["x"], "mask": [IMAGE]}, "the key mask holds a picture"),
        ({"text": ["x"], "thumbnail": [PNG]}, "the key thumbnail holds a picture"),
        ({"text": ["x"], "views": [[{"file": "a.jpg"}]]}, "the key views holds a picture"),
        ({"text": ["x"], "embedding": [[0.5] * 9], "day": [1]}, ["x"]),
        ({"question": ["x"], "answer": ["y"], "image": ["a.png"]}, [None, "x", "y"]),
        ({"instruction": ["x"], "input": [""], "output": ["y"]}, ["x", "y"]),
    ],
)
def test_pictures_in_columns_are_read_or_the_row_is_dropped(tmp_path, columns, expected):
    (found,) = shown(write_parquet(tmp_path / "p.parquet", **columns))
    assert found == expected or found.startswith(expected)


def test_keys_that_nobody_reads_are_listed_once(tmp_path, caplog, write_lines):
    keys = {f"key {number:02}": 1 for number in range(30)} | {"\x1b[2J" + "k" * 99: 1}
    path = write_lines("a.jsonl", *[{"text": "x", **keys}] * 3)
    with caplog.at_level("WARNING"):
        list(read_documents([path]))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("keys not used: \\x1b[2Jkkk") and line.endswith("key 18 and 11 more")
    assert len(line) < 300
    many = UnusedKeys()
    many.add(map(str, range(10**5)))
    assert len(many.names) == 1000
    columns = {"text": ["x"], "score": [0.5], "note": ["n"]}
    (document,) = read_documents([write_parquet(tmp_path / "p.parquet", **columns)])
    assert sorted(document.unused_keys) == ["note", "score"]


def test_ignored_keys_are_left_out_whatever_they_hold(write_lines):
    path = write_lines("a.jsonl", {"text": "x", "mask": "m.png", "image": 7})
    inputs = find_inputs([path])
    (block,) = read_blocks(inputs, plan_ranges(inputs))
    (document,) = parse_block(block, ignored=frozenset(("mask", "image")))
    assert document.content == (TextPart("x"),)


def test_truncated_tar_says_after_which_sample(tmp_path):
    files = {f"{i}.{kind}": b"x" * 5000 for i in range(3) for kind in ("png", "txt")}
    path = write_tar(tmp_path / "s.tar", files)
    path.write_bytes(path.read_bytes()[: 5 * 5632 + 1000])  # 5632 bytes: header + padded content
    with pytest.raises(DataError, match=r"s\.tar: the file breaks off after sample 2, .* \(unexp"):
        list(read_documents([path]))


def test_parquet_interleaves_images_and_texts(tmp_path):
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = pyarrow.array(
        [[{"bytes": b"png", "path": None}, None, {"bytes": None, "path": "i.png"}]],
        type=pyarrow.list_(struct),
    )
    path = write_parquet(tmp_path / "o.parquet", images=images, texts=[[None, "between", None]])
    (document,) = read_documents([path])
    assert document.content == (
        ImagePart(b"png"),
        TextPart("between"),
        ImagePart(str(tmp_path / "i.png")),
    )
    assert document.where == f"{path}:1" and document.id == "o.parquet:1"


def test_parquet_with_messages(tmp_path):
    """Columns of structs: keys that a part does not have are null."""
    parts = [{"type": "image", "image": "i.png"}, {"type": "text", "text": "what?"}]
    chats = [
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}],
        [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
    ]
    path = write_parquet(tmp_path / "c.parquet", messages=chats[:1], extra=[1])
    (document,) = read_documents([path])
    assert document.content == (TextPart("one"), TextPart("two"))
    assert document.roles == ("user", "assistant") and document.where == f"{path}:1"
    path = write_parquet(tmp_path / "p.parquet", messages=[[{"role": "user", "content": parts}]])
    (document,) = read_documents([path])
    assert document.content == (ImagePart(str(tmp_path / "i.png")), TextPart("what?"))
    path = write_parquet(tmp_path / "b.parquet", messages=chats[1:])
    with pytest.raises(DataError, match=r"b\.parquet:1: messages\[1\] is from the user, like the"):
        list(read_documents([path]))


def test_parquet_images_as_bytes_and_paths(tmp_path):
    as_bytes = write_parquet(tmp_path / "b.parquet", images=[[b"png"]], texts=[[None]], id=["x"])
    as_paths = write_parquet(tmp_path / "p.parquet", images=[["i.png"]], texts=[[None]])
    documents = list(read_documents([as_bytes, as_paths]))
    assert documents[0].content == (ImagePart(b"png"),) and documents[0].id == "x"
    assert documents[1].content == (ImagePart(str(tmp_path / "i.png")),)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"images": [["i"]]}, r"o\.parquet: has no column content, text, .*\(it has images\)"),
        (
            {"images": [["i"]], "texts": [[None, "x"]]},
            r"o\.parquet:1: images has 1 entries, but texts has 2",
        ),
        ({"images": [["i"]], "texts": [["x"]]}, r"images\[0\] and texts\[0\] are both set"),
        ({"images": [["i", None]], "texts": [[None, None]]}, r"texts\[1\] are both null"),
        ({"images": [[None]], "texts": [[3]]}, r"texts\[0\] must be a string, not int"),
        ({"images": [[4]], "texts": [[None]]}, r"images\[0\] must be a path or bytes, not int"),
        ({"images": ["i"], "texts": ["x"]}, r"images and texts must be lists"),
    ],
)
def test_parquet_of_another_shape(tmp_path, columns, message):
    path = write_parquet(tmp_path / "o.parquet", **columns)
    with pytest.raises(DataError, match=message):
        list(read_documents([path]))


def test_truncated_parquet(tmp_path):
    path = write_parquet(tmp_path / "o.parquet", images=[["i"]], texts=[[None]])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        DataError, match=r"o\.parquet: the file breaks off after row 0, the rest of it is lost"
    ):
        list(read_documents([path]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", r"none\.jsonl: no such file\. Pass a file of documents"),
        ("folder.jsonl", r"folder\.jsonl: is a folder"),
        ("words.xlsx", r"words\.xlsx: unknown kind of file\. Pass a \.jsonl"),
    ],
)
def test_what_is_not_a_file_of_documents(tmp_path, name, message):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "words.xlsx").write_text("x")
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path / name]))
