"""``--holdout``: which documents are held out, and two token files that are written as if one.

The reference is a set comparison: the test reads both sides back and asks where each document is.
"""

import hashlib
import itertools
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.data.documents.records import Origin, document_of
from megatron_chameleon.data.preprocess.holdout import is_held_out, text_digest
from megatron_chameleon.data.preprocess.merge_shards import merge_shards
from megatron_chameleon.data.preprocess.options import EncodeOptions, PreprocessOptions
from megatron_chameleon.data.preprocess.progress import status_table
from megatron_chameleon.data.preprocess.run import preprocess
from megatron_chameleon.data.token_files.format import read_info
from megatron_chameleon.data.token_files.partial_files import PartialFiles
from megatron_chameleon.data.token_files.reader import TokenFileWriter, open_token_file
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.images.pixels import digest_of_pixels

SUFFIXES = (".bin", ".idx", ".documents", ".images", ".answers", ".json", ".dropped.jsonl")


def options(share: float | None = 0.3, shard=(0, 1), **others) -> PreprocessOptions:
    encoding = EncodeOptions(holdout=share, **others.pop("encoding", {}))
    return PreprocessOptions(shard=shard, encoding=encoding, **others)


def written(prefix: Path) -> dict[str, bytes]:
    """The files of both sides, by their names without the prefix."""
    return {
        side + suffix: path.read_bytes()
        for side in ("", "-holdout")
        for suffix in SUFFIXES
        if (path := Path(f"{prefix}{side}{suffix}")).exists()
    }


def texts_of(prefix: Path, tokenizer) -> list[str]:
    """The texts of a side in order; an empty side, which cannot be opened, has none."""
    if not read_info(prefix).documents:
        return []
    token_file = open_token_file(prefix, tokenizer)
    return [tokenizer.text.decode(token_file.read(i)) for i in range(len(token_file))]


def chosen_by_hand(text: str, share: float) -> bool:
    """The rule as docs/data.md states it, computed another way than the package does."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < share


@pytest.fixture
def texts() -> list[str]:
    return [f"number {i} {'seven ' * (i % 5)}" for i in range(120)]


# Which documents


def document(**record):
    return document_of(record, Origin("/data/file.jsonl", 7))


@pytest.mark.parametrize(
    "record",
    [
        {"text": "What is it? A cat."},
        {"text": "What is it? A cat.", "id": "other", "source": "other", "score": 3},
        {"content": [{"type": "text", "text": t} for t in ("What is it?", " A cat.")]},
        {"prompt": "What is it?", "answer": " A cat."},
        {
            "messages": [
                {"role": "user", "content": "What is it?"},
                {"role": "assistant", "content": " A cat."},
            ]
        },
        {"texts": ["What is it? A cat."], "images": [None]},
    ],
)
def test_the_same_words_have_one_digest_in_every_form(record) -> None:
    expected = hashlib.sha256(b"What is it? A cat.").digest()
    assert text_digest(document(**record)) == expected
    assert text_digest(document(text="What is it? A cat. ")) != expected  # nothing is normalised


def test_letters_that_are_not_unicode_have_a_digest() -> None:
    assert text_digest(document(text="\ud800")) == hashlib.sha256(b"\xed\xa0\x80").digest()


def test_shares_are_met_and_a_larger_one_holds_out_more_of_the_same() -> None:
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(20_000)]
    chosen = [{d for d in digests if is_held_out(d, s)} for s in (1e-30, 0.01, 0.1, 0.5, 1 - 1e-9)]
    for small, large in itertools.pairwise(chosen):
        assert small <= large
    # five standard deviations of a binomial distribution
    assert not chosen[0] and abs(len(chosen[1]) - 200) < 70
    assert abs(len(chosen[2]) - 2000) < 212 and abs(len(chosen[3]) - 10_000) < 354
    assert len(chosen[4]) == 20_000


def test_one_picture_in_several_files_has_one_digest(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "level.png", compress_level=0)
    image.save(tmp_path / "a.bmp")
    image.save(tmp_path / "a.webp", lossless=True)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    turned = Image.Exif()
    turned[274] = 6  # to be turned clockwise by a quarter when it is shown
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "exif.png", exif=turned)
    digests = {digest_of_pixels(Image.open(path)) for path in tmp_path.iterdir()}
    assert digests == {hashlib.sha256(b"9x7:" + pixels.tobytes()).digest()}
    pixels[3, 3, 1] ^= 1
    assert digest_of_pixels(Image.fromarray(pixels)) not in digests
    assert digest_of_pixels(Image.fromarray(pixels.reshape(9, 7, 3))) not in digests


# Both sides


@pytest.mark.parametrize("seed", range(3))
def test_no_document_is_lost_or_on_both_sides(
    tmp_path, tokenizer, tokenizer_folder, write_lines, texts, seed
) -> None:
    """In any order, cut into files and shards in any way, with duplicates across files."""
    draw = random.Random(seed)
    records = texts + draw.choices(texts, k=40)
    draw.shuffle(records)
    cuts = sorted(draw.choices(range(len(records)), k=draw.randint(0, 4)))
    files = [
        write_lines(f"{draw.random()}.jsonl", *({"text": t, "id": draw.random()} for t in part))
        for part in (records[a:b] for a, b in itertools.pairwise([0, *cuts, len(records)]))
    ]
    prefix, count = tmp_path / "out" / "t", draw.randint(2, 5)
    for index in range(count):
        preprocess(files, tokenizer_folder, prefix, options(shard=(index, count)))
    merge_shards(prefix)
    training = texts_of(prefix, tokenizer)
    held_out = texts_of(tmp_path / "out" / "t-holdout", tokenizer)
    in_order = [text.strip() for path in files for text in map(text_of, path.open())]
    assert [t.strip() for t in training] == [t for t in in_order if not chosen(t, texts)]
    assert [t.strip() for t in held_out] == [t for t in in_order if chosen(t, texts)]
    assert 20 < len(held_out) < 80
    preprocess(files, tokenizer_folder, tmp_path / "whole", options())
    assert written(tmp_path / "whole") == written(prefix)


def text_of(line: str) -> str:
    return json.loads(line)["text"]


def chosen(stripped: str, texts: list[str]) -> bool:
    return chosen_by_hand(next(text for text in texts if text.strip() == stripped), 0.3)


def test_a_picture_is_on_one_side_whatever_stands_beside_it(
    tmp_path, tokenizer, tokenizer_folder, write_lines, picture
) -> None:
    """Captions, questions, prompts and second pictures do not count, and neither does the cache."""
    names = [picture(f"{i}.png", seed=i) for i in range(16)]
    Image.open(tmp_path / "0.png").save(tmp_path / "again.bmp")
    records = []
    for i, name in enumerate(names):
        image = {"type": "image", "image": name}
        text = {"type": "text", "text": f"picture {i}"}
        records += [
            {"content": [image, text]},
            {"content": [text, image, {"type": "image", "image": names[i - 1]}]},
            {"prompt": [{"type": "text", "text": "What is it? "}, image], "answer": f"seven {i}"},
            {"content": [image, {"type": "text", "text": "the same words for all"}]},
        ]
    records.append({"image": "again.bmp", "text": "picture 0 another time"})
    path = write_lines("d.jsonl", *records)
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        prefix = tmp_path / "t"
        preprocess([path], tokenizer_folder, prefix, options(encoding={"image_cache": cache}))
        numbers = [
            {int(n) - 1 for n in open_token_file(p, tokenizer).documents["record"]}
            for p in (prefix, tmp_path / "t-holdout")
        ]
        assert numbers[0] | numbers[1] == set(range(65)) and not numbers[0] & numbers[1]
        pixels = [np.asarray(Image.open(tmp_path / name)) for name in names]
        digests = [hashlib.sha256(b"20x16:" + p.tobytes()).hexdigest() for p in pixels]
        held = [i for i, digest in enumerate(digests) if int(digest[:16], 16) / 2**64 < 0.3]
        expected = {4 * i + k for i in held for k in range(4)} | ({64} if 0 in held else set())
        assert numbers[1] == expected and 0 < len(held) < 16
        (tmp_path / "t.json").unlink()  # so that the command runs again


def test_each_side_is_what_its_documents_alone_would_give(
    tmp_path, tokenizer_folder, write_lines, picture, texts
) -> None:
    records = [{"text": text, "source": f"s{len(text) % 3}"} for text in texts[:40]]
    for i in range(12):
        image = {"type": "image", "image": picture(f"{i}.png", seed=i)}
        records.append({"content": [image, {"type": "text", "text": texts[i]}], "source": "p"})
        records.append({"prompt": texts[i], "answer": texts[i + 1], "source": "chat"})
    records.insert(20, {"content": [{"type": "image", "image": "none.png"}]})
    path = write_lines("d.jsonl", *records)
    preprocess([path], tokenizer_folder, tmp_path / "t", options())
    before = written(tmp_path / "t")
    assert json.loads(before[".json"])["dropped"] == {"missing image": 1}
    assert "-holdout.dropped.jsonl" not in before
    for side in ("", "-holdout"):
        documents = np.fromfile(tmp_path / f"t{side}.documents", "<u8,<u8,<u4,<u4")
        kept = [records[number - 1] for number in documents["f1"].tolist()]
        preprocess([write_lines("kept.jsonl", *kept)], tokenizer_folder, tmp_path / "alone")
        for suffix in (".bin", ".idx", ".images", ".answers"):
            assert (tmp_path / f"alone{suffix}").read_bytes() == before[side + suffix]
        alone = json.loads((tmp_path / "alone.json").read_text())
        here = json.loads(before[f"{side}.json"])
        for key in ("documents", "tokens", "images", "answers", "sources", "longest_conversation"):
            assert here[key] == alone[key]
        assert "holdout" not in alone  # as earlier versions wrote it
        assert here["holdout"]["held_out_documents"] == read_info(tmp_path / "t-holdout").documents


# Kills


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["between the states", "after the state"])
def test_a_killed_run_continues_both_sides_at_one_document(
    tmp_path, tokenizer_folder, write_lines, texts, monkeypatch, moment
) -> None:
    files = [write_lines(f"{i}.jsonl", *({"text": t} for t in texts[i::4])) for i in range(4)]
    preprocess(files, tokenizer_folder, tmp_path / "whole", options())
    unbroken = TokenFileWriter.save
    left = 5

    def save(self, position) -> None:
        nonlocal left
        is_training = bool(position)
        if is_training and moment == "between the states":
            left -= 1
        if left == 0:
            raise Killed
        unbroken(self, position)
        left -= is_training and moment == "after the state"

    monkeypatch.setattr(TokenFileWriter, "save", save)
    kills = 0
    while True:
        left = 2 if moment == "after the state" else 3
        try:
            preprocess(files, tokenizer_folder, tmp_path / "t", options(save_seconds=0.0))
            break
        except Killed:
            kills += 1
    assert kills > 1
    assert written(tmp_path / "t") == written(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_is_killed_while_it_moves_its_files_finishes(
    tmp_path, tokenizer_folder, write_lines, texts, monkeypatch
) -> None:
    path = write_lines("d.jsonl", *({"text": text} for text in texts))
    preprocess([path], tokenizer_folder, tmp_path / "t", options())
    expected, moves = written(tmp_path / "t"), 0
    unbroken = PartialFiles.move_into_place
    for last in (0, 4, 7, 9):  # ten files are moved, the held-out side's first
        # over an older hold-out, or where there is none
        old = options(0.6) if last % 2 else None
        for file in tmp_path.glob("t*"):
            file.unlink()
        if old is not None:
            preprocess([path], tokenizer_folder, tmp_path / "t", old)
        moves = 0

        def move(self, suffix, last=last) -> None:
            nonlocal moves
            if moves == last:
                raise Killed
            moves += 1
            unbroken(self, suffix)

        monkeypatch.setattr(PartialFiles, "move_into_place", move)
        with pytest.raises(Killed):
            preprocess([path], tokenizer_folder, tmp_path / "t", options())
        monkeypatch.setattr(PartialFiles, "move_into_place", unbroken)
        preprocess([path], tokenizer_folder, tmp_path / "t", options())
        assert written(tmp_path / "t") == expected
        assert not list(tmp_path.glob("*.partial"))


# What may go wrong


def test_a_share_that_is_no_part(tmp_path, tokenizer_folder, write_lines) -> None:
    path = write_lines("d.jsonl", {"text": "x"})
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"--holdout: .* is not above 0 and below 1\. Give a"):
            preprocess([path], tokenizer_folder, tmp_path / "t", options(share))


def test_few_documents(tmp_path, tokenizer_folder, write_lines, caplog) -> None:
    """None is held out, or all are: it is said with numbers."""
    caplog.set_level(logging.INFO)
    path = write_lines("d.jsonl", {"text": "one"}, {"text": ""}, {"text": "three"})
    preprocess([path], tokenizer_folder, tmp_path / "t", options(0.001))
    assert (
        f"{tmp_path}/t-holdout is empty: --holdout 0.001 of 3 documents is 0.003 documents on "
        "average. Use a larger share"
    ) in caplog.messages
    assert any("t-holdout: held out 0 of 3 documents (0.00%" in line for line in caplog.messages)
    with pytest.raises(DataError, match=r"holds 0 documents\. Run .* with a larger --holdout"):
        open_token_file(tmp_path / "t-holdout", None)
    message = r"u: --holdout 0\.999 holds out all of its 3 documents, so that .*u-holdout would"
    with pytest.raises(DataError, match=message + r".* have them all\. Use a smaller share"):
        preprocess([path], tokenizer_folder, tmp_path / "u", options(0.999))
    assert not list(tmp_path.glob("u*"))
    for index in range(2):
        preprocess([path], tokenizer_folder, tmp_path / "u", options(0.999, shard=(index, 2)))
    with pytest.raises(DataError, match=message):
        merge_shards(tmp_path / "u")


def test_files_that_nobody_held_out_are_not_replaced(
    tmp_path, tokenizer_folder, write_lines
) -> None:
    path = write_lines("d.jsonl", *({"text": str(i)} for i in range(9)))
    preprocess([path], tokenizer_folder, tmp_path / "t-holdout")
    before = written(tmp_path / "t")
    message = r"--holdout: the held-out documents would replace .*t-holdout\.json, which is not of"
    with pytest.raises(ConfigError, match=message + r" an earlier --holdout\. Move it, or"):
        preprocess([path], tokenizer_folder, tmp_path / "t", options())
    assert written(tmp_path / "t") == before
    (tmp_path / "u-holdout.bin").write_bytes(b"of another program")
    with pytest.raises(ConfigError, match=r"would replace .*u-holdout\.bin"):
        preprocess([path], tokenizer_folder, tmp_path / "u", options(shard=(0, 2)))
    preprocess([path], tokenizer_folder, tmp_path / "v", options())
    preprocess([path], tokenizer_folder, tmp_path / "v", options(0.6))  # an earlier hold-out is
    assert read_info(tmp_path / "v-holdout").holdout.share == 0.6


def test_the_two_sides_are_not_taken_for_each_other(
    tmp_path, tokenizer_folder, write_lines, caplog
) -> None:
    caplog.set_level(logging.INFO)
    path = write_lines("d.jsonl", *({"text": str(i)} for i in range(30)))
    preprocess([path], tokenizer_folder, tmp_path / "t", options())
    first = written(tmp_path / "t")
    preprocess([path], tokenizer_folder, tmp_path / "t", options())
    assert sum("an earlier run has written it" in line for line in caplog.messages) == 1
    (tmp_path / "t-holdout.idx").unlink()
    preprocess([path], tokenizer_folder, tmp_path / "t", options())
    assert written(tmp_path / "t") == first
    preprocess([path], tokenizer_folder, tmp_path / "t-holdout", options())  # the same command
    assert read_info(tmp_path / "t-holdout").documents == read_info(tmp_path / "t").documents
    caplog.clear()
    preprocess([path], tokenizer_folder, tmp_path / "u", options())
    preprocess([path], tokenizer_folder, tmp_path / "u")
    held_out = read_info(tmp_path / "u-holdout").documents
    (warning,) = (r.message for r in caplog.records if r.levelno == logging.WARNING)
    assert warning == (
        f"{tmp_path}/u-holdout: its {held_out} documents, held out by an earlier command, may be "
        f"in {tmp_path}/u too. Remove it, or use --holdout again"
    )


def test_unfinished_work_shows_both_sides(tmp_path, tokenizer_folder, write_lines) -> None:
    lines = [{"text": str(i)} for i in range(30)]
    path = write_lines("d.jsonl", *lines, {"image": "none.png", "caption": "x"})
    with pytest.raises(DataError, match=r"1 of 31 documents \(3\.2%\) are bad"):
        preprocess([path], tokenizer_folder, tmp_path / "t", options(max_bad=0.0))
    titles, row = (line.split() for line in status_table(tmp_path / "t").splitlines())
    assert titles[5:8] == ["bad", "held", "out"]
    kept, held_out = int(row[3]), int(row[7])
    assert kept + held_out == 30 and held_out > 0
    state = tmp_path / "t.partial" / "state.json"
    saved = json.loads(state.read_text())
    for damage in ([], {"documents": 1}, {**saved["position"]["held_out"], "tokens": -1}):
        state.write_text(
            json.dumps(saved | {"position": {**saved["position"], "held_out": damage}})
        )
        with pytest.raises(DataError, match=r"state\.json: cannot be read .* with --restart"):
            preprocess([path], tokenizer_folder, tmp_path / "t", options())
        with pytest.raises(DataError, match=r"state\.json: cannot be read"):
            status_table(tmp_path / "t")
    state.write_text(json.dumps(saved))
    for other in (options(0.31), options(None)):
        with pytest.raises(DataError, match=r"t\.partial: its \d+ documents come from other"):
            preprocess([path], tokenizer_folder, tmp_path / "t", other)
    assert preprocess([path], tokenizer_folder, tmp_path / "t", options()).documents == kept


@pytest.mark.parametrize(
    "change",
    [
        {"side": "left"},
        {"share": 2.0},
        {"share": "1"},
        {"training_tokens": 1},
        {"more": 1},
        [],
    ],
)
def test_a_sidecar_that_was_edited_is_refused(
    tmp_path, tokenizer_folder, write_lines, change
) -> None:
    path = write_lines("d.jsonl", *({"text": str(i)} for i in range(30)))
    preprocess([path], tokenizer_folder, tmp_path / "t", options())
    sidecar = tmp_path / "t.json"
    record = json.loads(sidecar.read_text())
    record["holdout"] = {**record["holdout"], **change} if change else change
    sidecar.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"t\.json: not the sidecar of a token file \("):
        read_info(tmp_path / "t")
