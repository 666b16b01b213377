"""Every kind of file, written by the library that people use for it, against our own schema."""

import base64
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.parse import read_documents
from megatron_chameleon.data.documents.schema import Document
from megatron_chameleon.data.documents.shapes import FORMS
from megatron_chameleon.data.inputs.form_keys import FORM_KEYS
from megatron_chameleon.data.preprocess.options import PreprocessOptions
from megatron_chameleon.data.preprocess.run import preprocess
from megatron_chameleon.data.views.raw_input import (
    describe_documents,
    describe_input,
    look_at_input,
    write_input_page,
)
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.options import ImageOptions
from page_origin import ORIGIN
from tools import write_data_tables

Record = dict[str, Any]


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def text(value: str) -> Record:
    return {"type": "text", "text": value}


def image(number: int) -> Record:
    return {"type": "image", "image": f"{number}.png"}


def turns(question: Any, answer: Any) -> list[Record]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


BYTES = [{"bytes": png(n), "path": None} for n in range(2)]
NAMES = ["0.png", "1.png"]
MARKED = turns("<image>Which?", "Zero.")
PARTED = turns([{"type": "image", "text": None}, text("Which?")], [text("Zero.")])
LLAVA = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "Zero."}]

# in our own schema
ASKED = [{"messages": turns([image(n), text("Which?")], "Zero.")} for n in range(2)]
CAPTIONED = [{"content": [image(n), text("a zero")]} for n in range(2)]
MIXED = [{"content": [text("one"), image(0), text("two"), image(1)]}]
MATCHED = [{"content": [image(1), image(0), text("one"), text("two")]}]
ADDED = [{"messages": turns("Add.\n\n1 1", "2")}]
TOLD = [{"messages": [{"role": "system", "content": "Be brief.\n\nBe kind."}, *turns("Hi", "Yo")]}]


def lines(path: Path, *records: Record) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def each(path: Path, make: Callable[[str], Record]) -> Path:
    return lines(path, *map(make, NAMES))


def asked_rows() -> datasets.Dataset:
    rows = {"messages": [PARTED] * 2, "images": [[b] for b in BYTES]}
    return datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))


def flat_rows(**columns: Any) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({**columns, "image": BYTES})
    return rows.cast_column("image", datasets.Image())


def captions() -> datasets.Dataset:
    return flat_rows(caption=["a zero"] * 2)


def saved(rows: Any, path: Path, inner: str = "", **options: Any) -> Path:
    rows.save_to_disk(path, **options)
    return path / inner


def parquet(rows: datasets.Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)
    return path


def cache(folder: Path) -> Path:
    source = str(parquet(flat_rows(messages=[MARKED] * 2), folder / "rows.parquet"))
    datasets.load_dataset("parquet", data_files=source, cache_dir=str(folder / "cache"))
    return folder / "cache"


def arrow_file(folder: Path) -> Path:
    table = flat_rows(messages=[MARKED] * 2).data.table
    with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=1)
    return folder / "a.arrow"


def feather(folder: Path) -> Path:
    pa.feather.write_feather(captions().data.table, str(folder / "a.feather"))
    return folder / "a.feather"


def image_folder(folder: Path, name: str, content: str) -> Path:
    inner = folder / "pictures"
    inner.mkdir()
    for n in range(2):
        (inner / f"{n}.png").write_bytes(png(n))
    (inner / name).write_text(content)
    return inner


def tar(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for n in range(2):
            for suffix, data in (("png", png(n)), ("json", json.dumps({"messages": MARKED}))):
                content = data if isinstance(data, bytes) else data.encode()
                info = tarfile.TarInfo(f"{n}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return folder / "a.tar"


def table(folder: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def anthropic(name: str) -> Record:
    source = {"type": "base64", "media_type": "image/png"}
    data = base64.b64encode(png(NAMES.index(name))).decode()
    return {
        "messages": turns(
            [{"type": "image", "source": {**source, "data": data}}, text("Which?")], "Zero."
        )
    }


def mmc4(folder: Path) -> Path:
    info = {"face_detections": None, "matched_text_index": 0, "matched_sim": 0.3}
    pictures = [{**info, "image_name": name, "raw_url": f"https://a.b/{name}"} for name in NAMES]
    document = {"text_list": ["one", "two"], "image_info": pictures[::-1], "url": "https://a.b/c"}
    return lines(folder / "a.jsonl", {**document, "similarity_matrix": [[0.1, 0.2]] * 2})


KINDS: dict[str, tuple[list[Record], Callable[[Path], Path]]] = {
    "save_to_disk": (ASKED, lambda d: saved(asked_rows(), d / "s")),
    "save_to_disk in shards": (ASKED, lambda d: saved(asked_rows(), d / "s", num_shards=2)),
    "one split of two": (
        CAPTIONED,
        lambda d: saved(datasets.DatasetDict(train=captions(), test=captions()), d / "s", "test"),
    ),
    "a dict of one split": (
        CAPTIONED,
        lambda d: saved(datasets.DatasetDict(a=captions()), d / "s"),
    ),
    "one arrow file": (
        CAPTIONED,
        lambda d: saved(captions(), d / "s", "data-00000-of-00001.arrow"),
    ),
    "arrow's file format": (ASKED, arrow_file),
    "feather, compressed": (CAPTIONED, feather),
    "cache of load_dataset": (ASKED, cache),
    "folder of a hub": (
        CAPTIONED,
        lambda d: parquet(captions(), d / "h" / "data" / "train-00000.parquet").parent.parent,
    ),
    "parquet of datasets": (ASKED, lambda d: parquet(asked_rows(), d / "a.parquet")),
    "imagefolder, csv": (
        CAPTIONED,
        lambda d: image_folder(d, "metadata.csv", "file_name,text\n0.png,a zero\n1.png,a zero\n"),
    ),
    "imagefolder, lines": (
        CAPTIONED,
        lambda d: image_folder(
            d,
            "metadata.jsonl",
            "".join(f'{{"file_name": "{n}", "caption": "a zero"}}\n' for n in NAMES),
        ),
    ),
    "csv": (
        CAPTIONED,
        lambda d: Path(
            datasets.Dataset.from_dict({"image": NAMES, "caption": ["a zero"] * 2}).to_csv(
                d / "a.csv"
            )
            and d / "a.csv"
        ),
    ),
    "LLaMA-Factory": (
        ASKED,
        lambda d: each(d / "a.jsonl", lambda n: {"messages": MARKED, "images": [n], "tools": ""}),
    ),
    "LLaVA": (ASKED, lambda d: each(d / "a.jsonl", lambda n: {"image": n, "conversations": LLAVA})),
    "OpenAI": (
        ASKED,
        lambda d: each(
            d / "a.jsonl",
            lambda n: {
                "messages": turns(
                    [{"type": "image_url", "image_url": {"url": n}}, text("Which?")], "Zero."
                )
            },
        ),
    ),
    "Anthropic": (ASKED, lambda d: each(d / "a.jsonl", anthropic)),
    "Qwen": (
        ASKED,
        lambda d: each(
            d / "a.jsonl",
            lambda n: {"messages": turns([{"image": n}, {"text": "Which?"}], "Zero.")},
        ),
    ),
    "ms-swift": (
        ASKED,
        lambda d: each(
            d / "a.jsonl", lambda n: {"query": "<image>Which?", "response": "Zero.", "images": [n]}
        ),
    ),
    "TRL": (
        ASKED,
        lambda d: each(
            d / "a.jsonl", lambda n: {"prompt": PARTED[:1], "completion": PARTED[1:], "images": [n]}
        ),
    ),
    "The Cauldron": (
        ASKED,
        lambda d: table(
            d,
            images=[[b] for b in BYTES],
            texts=[[{"user": "Which?", "assistant": "Zero.", "source": "vqa"}]] * 2,
        ),
    ),
    "OBELICS": (
        MIXED,
        lambda d: lines(
            d / "a.jsonl",
            {"images": [None, "0.png", None, "1.png"], "texts": ["one", None, "two", None]},
        ),
    ),
    "MMC4": (MATCHED, mmc4),
    "Alpaca array": (
        ADDED,
        lambda d: Path(
            (d / "a.json").write_text('[{"instruction":"Add.","input":"1 1","output":"2"}]')
            and d / "a.json"
        ),
    ),
    "WebDataset": (ASKED, tar),
    "img2dataset's parquet": (
        CAPTIONED,
        lambda d: table(
            d,
            url=["https://a.b/c.jpg"] * 2,
            caption=["a zero"] * 2,
            jpg=[b["bytes"] for b in BYTES],
        ),
    ),
    "system and developer": (
        TOLD,
        lambda d: lines(
            d / "a.jsonl",
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "developer", "content": "Be kind."},
                    *turns("Hi", "Yo"),
                ]
            },
        ),
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    return tmp_path


def plain(document: Document) -> list[Any]:
    """Its roles, texts and the bytes of its pictures."""
    roles = document.roles or ("",) * len(document.content)
    found: list[Any] = []
    for role, part in zip(roles, document.content, strict=True):
        value = part.read() if isinstance(part, ImagePart) else part.text
        if found and isinstance(value, str) and found[-1][0] == role and found[-1][1:] != (value,):
            last = found[-1][1]
            if isinstance(last, str):
                found[-1] = (role, last + value)
                continue
        found.append((role, value))
    return found


def test_their_token_files_are_equal_byte_for_byte(folder: Path, tokenizer_folder: Path) -> None:
    inputs, expected = [], []
    for number, (own, write) in enumerate(KINDS.values()):
        inner = folder / str(number)
        inner.mkdir()
        for n in range(2):
            (inner / f"{n}.png").write_bytes(png(n))
        inputs.append(write(inner))
        expected += own
    options = PreprocessOptions()
    preprocess(inputs, tokenizer_folder, folder / "theirs", options)
    own_file = lines(folder / "own.jsonl", *expected)
    info = preprocess([own_file], tokenizer_folder, folder / "own", options)
    assert info.documents == len(expected)
    suffixes = (".bin", ".idx", ".images", ".answers")
    theirs, ours = (
        [(folder / f"{name}{suffix}").read_bytes() for suffix in suffixes]
        for name in ("theirs", "own")
    )
    if theirs != ours:
        for kind, path, (own, _) in zip(KINDS, inputs, KINDS.values(), strict=True):
            found = list(map(plain, read_documents([path])))
            own_path = lines(folder / "own.jsonl", *own)
            assert found == list(map(plain, read_documents([own_path]))), kind
    assert theirs == ours


URL = "https://a.b/c.jpg"


def links(folder: Path) -> Path:
    return table(folder, URL=[URL] * 3, TEXT=["x"] * 3, similarity=[0.3] * 3)


def link_csv(folder: Path) -> Path:
    (folder / "a.csv").write_text(f"url,caption\n{URL}?w=2,x\n")
    return folder / "a.csv"


def two_splits(folder: Path) -> Path:
    return saved(datasets.DatasetDict(train=captions(), test=captions()), folder / "s")


def record(**keys: Any) -> Callable[[Path], Path]:
    return lambda folder: lines(folder / "a.jsonl", keys)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            links,
            r"URL, which is not followed. .* img2dataset --url_list .*a.parquet --input_",
        ),
        (links, r"parquet --url_col URL --caption_col TEXT --output_format webdataset --output_f"),
        (link_csv, r"a.csv:1: .*--input_format csv --url_col url --caption_col caption"),
        (two_splits, r"is a folder of 2 splits: train, test. Pass .*, such as .*/s/train"),
        (lambda d: image_folder(d, "a.md", ""), "is a folder of 2 pictures without a text"),
        (record(messages=[*turns("Hi", "Yo")[:1], CALL]), r"1 call of a tool\); the first: .*"),
        (record(messages=turns("<image>Which?", "a")), "1 place without a picture"),
        (record(messages=turns("<|image_1|>\nWhich?", "a")), "1 place without a picture"),
        (record(text="A <image> b", image=None), "1 place without a picture"),
        (record(text="<|image|> b"), "1 place without a picture"),
        (record(messages=turns([image(0), text("<image>?")], "a")), "1 place without a picture"),
        (record(messages=turns("<image>?", "a"), images=NAMES), "1 picture without a place"),
        (record(text="a", mask="0.png"), "1 picture in a key that is not read"),
        (record(text="a", video="0.mp4"), "1 sound or video"),
        (record(caption="a"), "1 caption without a picture"),
        (
            record(text_list=["a"], image_info=[{"image_name": "0.png", "matched_text_index": 1}]),
            r"image_info\[0\] has the matched_text_index 1, but text_list has 1 entries",
        ),
    ],
)
def test_what_cannot_be_read_is_one_clear_refusal(
    folder: Path, tokenizer_folder: Path, write: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        preprocess([write(folder)], tokenizer_folder, folder / "tokens", PreprocessOptions())


def test_the_registry_has_every_form_and_its_examples_are_read(folder: Path) -> None:
    assert tuple(form.key for form in FORMS) == FORM_KEYS
    for form in FORMS:
        (document,) = read_documents([lines(folder / "a.jsonl", dict(form.example))])
        assert document.content and not document.unused_keys, form.key


def test_rows_of_a_broken_stream_and_of_a_table_are_kept(
    folder: Path, tokenizer_folder: Path
) -> None:
    rows = pa.table({"text": [f"row {n}" for n in range(40)]})
    with pa.ipc.new_stream(str(folder / "a.arrow"), rows.schema) as stream:
        stream.write_table(rows, max_chunksize=10)
    whole = (folder / "a.arrow").read_bytes()
    (folder / "a.arrow").write_bytes(whole[:-200])
    (folder / "b.csv").write_bytes(
        b'\xef\xbb\xbftext;note\n"two\nlines";x\nbad;row;here\nb\xff;x\n"open;x\n'
    )
    inputs = [folder / "a.arrow", folder / "b.csv"]
    info = preprocess(inputs, tokenizer_folder, folder / "t", PreprocessOptions())
    dropped = [json.loads(line) for line in (folder / "t.dropped.jsonl").read_text().splitlines()]
    assert info.documents == 30 + 1
    assert [d["where"].rpartition("/")[2] for d in dropped] == [
        *("a.arrow:31", "b.csv:2", "b.csv:3", "b.csv:4")
    ]


def test_the_tables_of_the_guide_are_current() -> None:
    guide = write_data_tables.GUIDE.read_text(encoding="utf-8")
    assert write_data_tables.with_tables(guide) == guide, "run python tools/write_data_tables.py"


def test_inspect_shows_how_a_raw_input_is_understood(folder: Path) -> None:
    faulty = {"messages": turns("<image>?", "a"), "note": "b"}
    path = str(lines(folder / "a.jsonl", *ASKED, {"text": "plain", "score": 1}, faulty))
    found = look_at_input(path, ImageOptions(), most=2)
    told = describe_input(path, found)
    assert "4 documents in 1 file, of which 3 would be kept (2 conversations)" in told
    assert "forms: messages 3 (75.0%), text 1 (25.0%)" in told
    assert "parts by role: user 4 (66.7%), assistant 2 (33.3%)" in told
    assert "opened: 16 x 16 (2)" in told and "keys not used: score" in told
    assert "dropped, place without a picture: 1\n" in told and "a.jsonl:4: has 1 place" in told
    shown = describe_documents(found.first).splitlines()
    assert shown[2:4] == ["prompt: Which?", "answer: Zero."] and len(shown) == 8
    assert write_input_page(folder / "a.html", path, found, ORIGIN) == 2
    assert "data:image/png;base64," in (folder / "a.html").read_text()
