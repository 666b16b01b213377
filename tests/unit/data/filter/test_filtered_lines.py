"""What is written trains as the documents that were kept: the token files are equal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.cli.main import main
from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.parse import parse_block, read_documents
from megatron_chameleon.data.filter.measures.options import FilterOptions
from megatron_chameleon.data.filter.run import RunOptions, filter_documents
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.data.inputs.records import Fault
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.data.preprocess.encode import DocumentEncoder
from megatron_chameleon.data.preprocess.run import preprocess
from megatron_chameleon.data.token_files.writer import TokenFileWriter
from megatron_chameleon.tokenizer.folder import Tokenizer
from mixed_corpus import write_corpus

PARTS = (".bin", ".idx", ".images", ".answers")


def expected_token_file(
    inputs: list[Path], dropped: set[str], prefix: Path, tokenizer: Tokenizer
) -> None:
    """Encode the readable documents of inputs but for those that were dropped."""
    files = find_inputs(list(map(str, inputs)))
    encoder = DocumentEncoder(tokenizer)
    with TokenFileWriter(prefix, tokenizer) as writer:
        for block in read_blocks(files, plan_ranges(files)):
            found = [item for item in parse_block(block) if not isinstance(item, Fault)]
            kept = [d for d in found if f"{block.path}:{d.record}" not in dropped]
            writer.add_block(encoder.encode(kept)[0])
        writer.commit()


@pytest.mark.parametrize("images", ["auto", "copy", "embed"])
def test_the_token_file_is_that_of_the_kept_documents(
    tmp_path: Path, tokenizer: Tokenizer, images: str
) -> None:
    """All containers, with references, embedded pictures, answers, and broken documents."""
    inputs = write_corpus(tmp_path / "in", 15)
    output = tmp_path / "in" / "new" / "kept.jsonl.gz"
    options = FilterOptions(min_words=4, duplicates=True)
    result = filter_documents(
        list(map(str, inputs)), options, RunOptions(str(output), images=images)
    )
    assert result.kept > 40 and result.verdict.filters[0].dropped > 5 and result.unreadable
    rows = (tmp_path / "in/new/kept.dropped.tsv").read_text().splitlines()[1:]
    dropped = {row.split("\t")[0] for row in rows}
    assert len(dropped) == result.documents - result.kept
    expected_token_file(inputs, dropped, tmp_path / "expected", tokenizer)
    preprocess([output], tokenizer.folder, tmp_path / "found")
    for part in PARTS:
        found, expected = (Path(f"{tmp_path}/{name}{part}") for name in ("found", "expected"))
        assert found.read_bytes() == expected.read_bytes(), part
    copies = tmp_path / "in/new/kept-images"
    assert copies.is_dir() == (images != "embed")  # the pictures lie above the new file's folder
    assert result.copied_images == len(list(copies.glob("*/*")))


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


PICTURE = {"type": "image", "image": "a.png"}
RECORDS: list[dict[str, Any]] = [
    {"content": [text_part("\ufeff\ufeffmark"), text_part("<image>")]},
    {"text": "an <image> in the middle, \ud800 alone, \u2028 and \x00"},
    {"text": ""},
    {
        "messages": [
            {"role": "system", "content": [text_part("Be"), text_part(" kind.")]},
            {"role": "user", "content": [PICTURE, text_part(" What?")]},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "\ufeffAnd?"},
            {"role": "assistant", "content": "image is a word"},
        ]
    },
    {"instruction": "Say it", "input": "twice", "output": 7, "system": "Short."},
    {
        "conversations": [
            {"from": "human", "value": "<image>\nWhat <image>?"},
            {"from": "gpt", "value": "A"},
        ],
        "images": ["a.png", "sub/b.png"],
    },
    {"caption": "two", "image": ["sub/b.png", "a.png"]},
    {"images": ["a.png", None], "texts": [None, "t"], "id": 7, "source": {"a": 1}},
    {"text": "x" * 300, "id": "n" * 500, "source": ""},
    {"prompt": "Draw", "completion": [PICTURE]},
    {"prompt": [PICTURE, text_part("?")], "system": "S", "chosen": "good", "rejected": "bad"},
]


def test_every_form_is_read_back_as_it_was(tmp_path: Path) -> None:
    """Parts, roles, ids and sources, also where a reader changes what stands in a text."""
    (tmp_path / "sub").mkdir()
    for number, name in enumerate(("a.png", "sub/b.png")):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    records = [r for r in RECORDS if "messages" not in r]
    conversation = json.loads(json.dumps(RECORDS[3]))
    conversation["messages"][2]["content"] = "\n."
    path = tmp_path / "forms.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*records, conversation]))
    output = tmp_path / "kept.jsonl"
    filter_documents([str(path)], FilterOptions(), RunOptions(str(output)))
    before, after = list(read_documents([path])), list(read_documents([output]))
    assert len(before) == len(RECORDS)
    for old, new in zip(before, after, strict=True):
        assert (old.id, old.corpus_name, old.roles) == (new.id, new.corpus_name, new.roles)
        assert old.pair == new.pair
        assert [contents(p) for p in old.content] == [contents(p) for p in new.content]
    assert '"image":"sub/b.png"' in output.read_text()
    assert not (tmp_path / "kept-images").exists()


def contents(part: object) -> object:
    return part.read() if isinstance(part, ImagePart) else part


def test_pictures_behind_links_and_roots(tmp_path: Path, picture) -> None:  # type: ignore[no-untyped-def]
    """A reference that the new file could not follow becomes a copy."""
    for folder in ("data", "elsewhere"):
        (tmp_path / folder).mkdir()
    for name in ("data/own.png", "elsewhere/root.png"):
        picture(name, seed=len(name))
    (tmp_path / "data/link.png").symlink_to("own.png")
    lines = [{"text": "t", "image": n} for n in ("own.png", "link.png", "root.png")]
    path = tmp_path / "data/in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["data", "filter", str(path), "--image-root", str(tmp_path / "elsewhere")]
    main([*words, "--output", str(tmp_path / "data/kept.jsonl")])
    lines = (tmp_path / "data/kept.jsonl").read_text().splitlines()
    found = [json.loads(line)["content"][0]["image"] for line in lines]
    assert found[:2] == ["own.png", "own.png"] and found[2].startswith("kept-images/")
    assert [d.content[0].open().size for d in read_documents([tmp_path / "data/kept.jsonl"])]
