"""Each filter drops what it should and keeps the rest; counts and order."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_chameleon.data.filter.measures.options import FilterOptions, paper_options
from megatron_chameleon.data.filter.run import Result, RunOptions, filter_documents

Filter = Callable[..., list[str]]
PROSE = (
    "The old bridge crosses the river where the mill once stood, and in the evening the miller's "
    "daughter still counts the boats that pass below it on their way to the sea."
)


@pytest.fixture
def kept(tmp_path: Path) -> Filter:
    """The ids of the records that filters keep."""

    def run(records: list[dict[str, Any]], **options: Any) -> list[str]:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return ids(filter_file(path, **options), tmp_path)

    return run


def filter_file(path: Path, **options: Any) -> Result:
    run = RunOptions(str(path.parent / "kept.jsonl"))
    return filter_documents([str(path)], FilterOptions(**options), run)


def ids(result: Result, folder: Path) -> list[str]:
    lines = (folder / "kept.jsonl").read_text().splitlines()
    assert len(lines) == result.kept
    return [json.loads(line)["id"] for line in lines]


def texts(*values: str) -> list[dict[str, Any]]:
    return [{"id": str(i), "text": value} for i, value in enumerate(values)]


def draw(path: Path, size: tuple[int, int] = (32, 32), seed: int = 0) -> str:
    """A smooth picture: its perceptual hash survives another size and format."""
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path.name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"min_characters": 3}, ["1", "2"]),
        ({"max_characters": 3}, ["0", "1", "3"]),
        ({"min_words": 2}, ["2"]),
        ({"max_words": 1}, ["0", "1", "3"]),
        ({"min_characters": 3, "max_words": 1}, ["1"]),
    ],
)
def test_lengths(kept: Filter, options: dict[str, int], expected: list[str]) -> None:
    assert kept(texts("a", "abc", "你好, world", ""), **options) == expected


def test_tokens_are_those_of_the_tokenizer(kept: Filter, tokenizer_folder: Path) -> None:
    options = {"tokenizer": str(tokenizer_folder), "min_tokens": 2, "max_tokens": 20}
    assert kept(texts("", "a handwritten seven", "zq" * 40), **options) == ["1"]


def test_languages(kept: Filter) -> None:
    german = "Das ist ein schöner langer Satz über das Wetter im Herbst."
    records = texts(PROSE, german, "123 !", "")
    assert kept(records, languages=["en"]) == ["0", "2", "3"]  # without letters: any language
    assert kept(records, languages=["de", "en"]) == ["0", "1", "2", "3"]
    assert kept(records, languages=["de"], min_language_probability=0.5) == ["1", "2", "3"]


def test_the_safety_list(kept: Filter, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\ufeff# comment\nbad\nvery bad-thing\nre: \\bh[a4]ck\nstraße\n")
    records = texts(
        "BAD!", "badly", "ｂａｄ", "b\u200bad", "a very BAD thing", "H4CK it", "shack",
        "STRASSE", "fine",
    )  # fmt: skip
    assert kept(records, blocklists=[str(words)]) == ["1", "6", "8"]
    assert kept(records, blocklists=[str(words)], blocklist_parts_of_words=True) == ["6", "8"]
    words.write_text("Bad\n")
    cased = kept(texts("bad", "Bad"), blocklists=[str(words)], blocklist_case=True)
    assert cased == ["0"]


def test_listed_pictures(kept: Filter, tmp_path: Path) -> None:
    import hashlib

    import imagehash

    for number in range(3):
        draw(tmp_path / f"{number}.png", seed=number)
    records = [{"id": str(i), "text": "a", "image": f"{i}.png"} for i in range(3)]
    hashes = tmp_path / "hashes.txt"
    digest = hashlib.sha256((tmp_path / "1.png").read_bytes()).hexdigest()
    hashes.write_text(f"sha256: {digest.upper()}\n")
    assert kept(records, blocklists=[str(hashes)]) == ["0", "2"]
    hashes.write_text(f"phash: {imagehash.phash(Image.open(tmp_path / '2.png'))}\n")
    assert kept(records, blocklists=[str(hashes)]) == ["0", "1"]


def test_sizes_count_the_worst_picture_upright(kept: Filter, tmp_path: Path) -> None:
    draw(tmp_path / "wide.png", (64, 16))
    draw(tmp_path / "square.png", (32, 32), 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: 64 x 16 is seen as 16 x 64
    Image.open(tmp_path / "wide.png").save(tmp_path / "turned.jpg", exif=exif)
    records = [
        {"id": name, "text": "t", "images": images}
        for name, images in {
            "w": ["wide.png"], "s": ["square.png"], "t": ["turned.jpg"],
            "ws": ["square.png", "wide.png"],
        }.items()
    ]  # fmt: skip
    records.append({"id": "text", "text": "no picture"})
    assert kept(records, min_width=30) == ["w", "s", "ws", "text"]
    assert kept(records, max_height=32) == ["w", "s", "ws", "text"]
    assert kept(records, min_height=20, max_width=40) == ["s", "t", "text"]
    assert kept(records, max_aspect_ratio=2) == ["s", "text"]
    assert kept(records, nearest="32x32", nearest_factor=1.5) == ["s", "text"]
    assert kept(records, nearest="64x16", keep_nearest=2) == ["w", "s", "text"]
    assert kept(records, nearest="32x32", keep_nearest=1) == ["s", "text"]


SCORES = [6.0, 5.99, "6.5", float("nan"), None, True, [7, 5], [7, 8], float("inf"), "good"]


def test_scores(kept: Filter, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    records = [
        {"id": str(i), "text": "t", "image": "a.png", "AESTHETIC_SCORE": score}
        for i, score in enumerate(SCORES)
    ]
    records.append({"id": "text", "text": "no picture needs no score"})
    assert kept(records, min_score=6.0) == ["0", "2", "7", "text"]
    assert kept(records, max_score=6.0, missing_score="keep") == [
        *("0", "1", "3", "4", "5", "6", "8", "9", "text")
    ]
    nested = [{**r, "AESTHETIC_SCORE": 9, "m": {"s": 3 + i}} for i, r in enumerate(records[:4])]
    assert kept(nested, min_score=5.0, score_key="m.s") == ["2", "3"]
    again = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept(again, min_score=6.0, score_key="m.s") == ["3"]  # the score is kept beside it


def test_a_scorer_of_ones_own(
    kept: Filter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_scores.py").write_text(
        "class S:\n    def score(i):\n        return i.width / 10\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, width in (("a.png", 40), ("b.png", 80)):
        draw(tmp_path / name, (width, 20))
    records = [{"id": n, "text": "t", "image": f"{n}.png", "aesthetic": 1} for n in "ab"]
    assert kept(records, min_score=6, scorer="my_scores:S.score") == ["b"]


def test_scores_in_columns_and_tars(tmp_path: Path) -> None:
    """A column of numbers holds neither text nor picture, and is read all the same."""
    draw(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    columns = {"caption": ["a", "b"], "image": [data, data], "aesthetic_score": [5.0, 7.0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    assert filter_file(tmp_path / "in.parquet", min_score=6.0).kept == 1
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for key, score in (("x", 6.5), ("y", 2)):
            meta = json.dumps({"caption": "c", "aesthetic": score}).encode()
            for suffix, content in (("png", data), ("json", meta)):
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    assert ids(filter_file(tmp_path / "in.tar", min_score=6.0), tmp_path) == ["x"]


def test_exact_duplicates(kept: Filter, tmp_path: Path) -> None:
    for name, seed in (("a.png", 0), ("b.png", 1)):
        draw(tmp_path / name, seed=seed)
    Image.open(tmp_path / "a.png").save(tmp_path / "a.bmp")
    records: list[dict[str, Any]] = [
        {"id": "0", "text": "Q A"},
        {"id": "1", "prompt": "Q ", "answer": "A"},
        {"id": "2", "text": "Q  A"},
        {"id": "3", "text": "cap", "image": "a.png"},
        {"id": "4", "text": "cap", "image": "a.bmp"},
        {"id": "5", "text": "cap", "image": "b.png"},
        {"id": "6", "text": "other", "images": ["b.png", "b.png"]},
        {"id": "7", "text": ""},
        {"id": "8", "text": ""},
    ]  # fmt: skip
    assert kept(records, duplicates=True) == ["0", "2", "3", "5", "6", "7"]
    assert kept(records, duplicate_images=True) == ["0", "1", "2", "3", "5", "7", "8"]
    scored = [{**record, "aesthetic": int(record["id"])} for record in records]
    assert kept(scored, duplicates=True, keep="best") == ["1", "2", "4", "5", "6", "8"]


def test_near_duplicates_of_texts(kept: Filter, tmp_path: Path) -> None:
    for name, seed in (("a.png", 0), ("b.png", 1)):
        draw(tmp_path / name, seed=seed)
    long = " ".join(f"{PROSE} {i}" for i in range(4))
    records = texts(long, f"{long} Indeed.", PROSE, long.upper(), "short", "short!", "", "")
    assert kept(records, near_duplicates=0.8) == ["0", "2", "4", "6", "7"]
    pairs = [{"id": n, "text": "a dog", "image": f"{n[0]}.png"} for n in ("a1", "b1", "a2")]
    assert kept(pairs, near_duplicates=0.8) == ["a1", "b1"]  # one caption of two pictures


def test_near_duplicates_of_pictures(kept: Filter, tmp_path: Path) -> None:
    for number in range(6):
        draw(tmp_path / f"{number}.png", (64, 64), number)
    Image.open(tmp_path / "3.png").resize((200, 190)).save(tmp_path / "again.jpg", quality=60)
    for name, color in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (20, 20), color).save(tmp_path / f"{name}.png")
    names = [*(f"{n}.png" for n in range(6)), "again.jpg", "red.png", "blue.png"]
    records = [{"id": n, "text": "t", "image": n} for n in names]
    # pictures of one color have one and the same hash, which says nothing
    assert kept(records, near_images=4) == [n for n in names if n != "again.jpg"]
    assert kept(records, near_images=0, duplicates=True)[-2:] == ["red.png", "blue.png"]


def test_against(kept: Filter, tmp_path: Path) -> None:
    """An evaluation has the question, with other answers or none; pictures count if asked for."""
    for name, seed in (("a.png", 0), ("b.png", 1)):
        draw(tmp_path / name, seed=seed)
    questions = [
        {"question": f"{PROSE} How many boats?", "answers": ["3"]},
        {"question": "Which color?", "image": "a.png", "answer": "red"},
        {"text": "held out"},
    ]
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(q) + "\n" for q in questions[1:]))
    records = [
        {"id": "0", "prompt": "Which color?", "image": "a.png", "answer": "It is blue."},
        {"id": "1", "prompt": "Which color?", "image": "b.png", "answer": "It is blue."},
        {"id": "2", "text": "held out"},
        {"id": "3", "text": "held  out!"},
        {"id": "4", "text": "another", "image": "a.png"},
        {"id": "5", "text": "this stays"},
    ]
    against = [str(held)]
    assert kept(records, against=against) == ["1", "3", "4", "5"]
    assert kept(records, against=against, near_duplicates=0.8) == ["1", "4", "5"]
    assert kept(records, against=against, duplicate_images=True) == ["1", "3", "5"]


def test_each_filter_sees_what_is_left(kept: Filter, tmp_path: Path) -> None:
    """A duplicate of a dropped document is none, and the nearest are the nearest of the rest."""
    for name, width in (("a.png", 30), ("b.png", 32), ("c.png", 60)):
        draw(tmp_path / name, (width, 32))
    records = [
        {"id": n, "text": "t", "image": f"{n[0]}.png", "aesthetic": s}
        for n, s in (("b1", 1), ("b2", 9), ("b3", 9), ("a1", 2), ("c1", 9))
    ]
    assert kept(records) == ["b1", "b2", "b3", "a1", "c1"]
    options = {"duplicates": True, "nearest": "32x32", "keep_nearest": 2}
    result = filter_file(tmp_path / "in.jsonl", min_score=6.0, **options)
    assert ids(result, tmp_path) == ["b2", "c1"]
    counts = [(f.name, f.seen, f.dropped, f.alone) for f in result.verdict.filters]
    assert counts == [
        ("aesthetic score", 5, 2, 2), ("duplicates", 3, 1, 2), ("nearest size", 2, 0, 3)
    ]  # fmt: skip


def test_the_paper_preset() -> None:
    paper = paper_options()
    paper.check()
    assert (paper.min_score, paper.nearest_size, paper.keep_nearest) == (6.0, (512, 512), 64_000)
    default = FilterOptions()
    changed = [f.name for f in fields(paper) if getattr(paper, f.name) != getattr(default, f.name)]
    assert changed == ["min_score", "nearest", "keep_nearest"]
