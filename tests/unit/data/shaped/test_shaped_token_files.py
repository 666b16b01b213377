"""Pictures with shapes from the documents to token files, batches and pages."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.cli.main import main
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.mixture.corpus import image_spans
from megatron_chameleon.data.preprocess.image_codes import ImageCache
from megatron_chameleon.data.token_files.format import SHAPED_IMAGE_RECORD
from megatron_chameleon.data.token_files.reader import TokenFile, TokenFileWriter, open_token_file
from megatron_chameleon.data.token_files.shaped_images import find_shaped_images
from megatron_chameleon.data.views.tokens import render_tokens, special_tokens
from megatron_chameleon.errors import ConfigErrors, DataError
from megatron_chameleon.tokenizer.common.grids import Grid
from megatron_chameleon.tokenizer.folder import Tokenizer

GRIDS = [(4, 4), (2, 8), (8, 2), (3, 5), (4, 4), (2, 8)]
"""Of the pictures in their order: 16 x 16, 64 x 16, 15 x 60, 50 x 31, 1 x 1, 300 x 20 pixels."""


def run(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def pictures_of(file: TokenFile, tokenizer: Tokenizer) -> list[tuple[Grid, np.ndarray]]:
    """The grid and codes of each picture, read from the tokens."""
    found = []
    for document in range(len(file)):
        token_ids = file.read(document)
        for start, length, *_ in file.image_spans(document).tolist():
            inside = token_ids[start + 1 : start + length - 1]
            found.append(tokenizer.vocabulary.read_image(inside))
    return found


def test_pictures_keep_their_shape_in_the_tokens_and_the_records(
    written: TokenFile, shaped: Tokenizer, tmp_path: Path
) -> None:
    assert shaped.image is not None
    expected = [
        (GRIDS[(number + place) % len(GRIDS)], f"{number}-{place}.png")
        for number in range(12)
        for place in range(1 + number % 3)
    ]
    found = pictures_of(written, shaped)
    grids = [grid for document in range(12) for grid in written.image_grids(document)]
    assert [grid for grid, _ in found] == grids == [grid for grid, _ in expected]
    codes = shaped.image.encode_shaped([Image.open(tmp_path / name) for _, name in expected])
    for (_, read), (_, encoded) in zip(found, codes, strict=True):
        np.testing.assert_array_equal(read, encoded)
    written.verify()


def test_the_sidecar_has_a_format_of_its_own_and_counts_all_tokens_of_pictures(
    written: TokenFile, tmp_path: Path, shaped: Tokenizer
) -> None:
    info = json.loads((tmp_path / "tokens.json").read_text())
    assert info["format"] == "megatron_chameleon.tokens/4" and info["answers"] == 3
    lengths = [shaped.vocabulary.image_length(grid) for grid, _ in pictures_of(written, shaped)]
    assert (info["images"], info["image_tokens"]) == (len(lengths), sum(lengths))
    assert info["longest_image"] == max(lengths) == 2 + 1 + 8 * 3
    assert (tmp_path / "tokens.images").stat().st_size == 12 * len(lengths)


def test_files_of_squares_are_what_they_were(
    written_folder: Path, tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    words = ["--tokenizer", tokenizer_folder, "--output", tmp_path / "squares", "--device", "cpu"]
    assert run("preprocess", written_folder / "documents.jsonl", *words) == 0
    info = json.loads((tmp_path / "squares.json").read_text())
    assert info["format"] == "megatron_chameleon.tokens/3" and "longest_image" not in info
    file = open_token_file(tmp_path / "squares", tokenizer)
    assert file.images.dtype.itemsize == 8 and set(file.images["length"].tolist()) == {18}
    assert file.image_grids(2) == [(4, 4)] * 3


def test_shards_and_a_held_out_side_keep_the_shapes(
    written: TokenFile, shaped: Tokenizer, shaped_folder: Path, tmp_path: Path
) -> None:
    words = ["preprocess", tmp_path / "documents.jsonl", "--tokenizer", shaped_folder]
    words += ["--output", tmp_path / "parts", "--device", "cpu"]
    for shard in ("0/2", "1/2"):
        assert run(*words, "--shard", shard) == 0
    assert run("preprocess", "--merge", "--output", tmp_path / "parts") == 0
    for suffix in (".bin", ".images", ".documents"):
        merged, whole = (tmp_path / f"{name}{suffix}" for name in ("parts", "tokens"))
        assert merged.read_bytes() == whole.read_bytes()
    words[-3] = tmp_path / "split"
    assert run(*words, "--holdout", "0.5") == 0
    sides = [open_token_file(tmp_path / name, shaped) for name in ("split", "split-holdout")]
    assert all(side.info.is_shaped and side.info.longest_image for side in sides)
    assert sum(len(pictures_of(side, shaped)) for side in sides) == written.info.images


def config_of(prefix: Path, seq_length: int = 64) -> Config:
    config = Config()
    config.model.seq_length = seq_length
    config.data.stage1 = [SourceConfig(str(prefix), image_first=0.5)]
    config.training.steps, config.training.global_batch_size = 8, 4
    return config


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("seq_length", [40, 64, 200])
def test_no_picture_is_cut_by_packing(
    written: TokenFile, shaped: Tokenizer, tmp_path: Path, isolated: bool, seq_length: int
) -> None:
    """Sequences from hardly more than one picture to several documents."""
    config = config_of(tmp_path / "tokens", seq_length)
    config.data.reset_attention = isolated
    reader, vocabulary, pictures = BatchReader(config, shaped), shaped.vocabulary, 0
    for index in range(reader.samples):
        tokens = reader.sample(index).tokens
        alone = vocabulary.is_inside_image(tokens)
        for start, stop in image_spans(tokens, vocabulary).tolist():
            vocabulary.read_image(tokens[start + 1 : stop - 1])
            alone[start:stop] = False
            pictures += 1
        assert not alone.any(), "codes, grids or ends of rows stand outside a picture"
    assert pictures > 20


def test_grids_and_ends_of_rows_are_trained_and_count_as_image(
    written: TokenFile, shaped: Tokenizer, tmp_path: Path
) -> None:
    batch = BatchReader(config_of(tmp_path / "tokens", 200), shaped).batch([0, 1, 2])
    beside = np.isin(batch.labels.numpy(), shaped.vocabulary.tokens_beside_codes)
    plain = ~np.isin(np.cumsum(batch.tokens.numpy() == shaped.vocabulary.separator, axis=1), [1, 2])
    assert beside.sum() > 20 and batch.image_mask.numpy()[beside].all()
    assert (batch.loss_mask.numpy()[beside & plain] == 1).all()


def test_a_context_that_does_not_hold_the_largest_picture_is_refused(
    written: TokenFile, shaped: Tokenizer, tmp_path: Path
) -> None:
    """Although the mean picture fits."""
    with pytest.raises(ConfigErrors) as caught:
        BatchReader(config_of(tmp_path / "tokens", 26), shaped)
    text = str(caught.value)
    assert f"an image of {tmp_path / 'tokens'} has 27 tokens, more than model.seq_length 26" in text
    assert "Choose a model.seq_length of at least 27, or a smaller --image-grids" in text
    BatchReader(config_of(tmp_path / "tokens", 27), shaped)


def test_tokens_of_other_shapes_are_refused(
    written: TokenFile, shaped: Tokenizer, tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError, match="a vocabulary of 350 ids"):
        open_token_file(written.prefix, tokenizer)


@pytest.mark.parametrize("column", ["rows", "columns", "length"])
def test_a_damaged_record_is_found(
    written: TokenFile, shaped: Tokenizer, tmp_path: Path, column: str
) -> None:
    records = np.fromfile(tmp_path / "tokens.images", dtype=SHAPED_IMAGE_RECORD)
    records[column][4] += 1
    records.tofile(tmp_path / "tokens.images")
    with pytest.raises(DataError, match=r"tokens\.images: document 2 ends before its image does"):
        open_token_file(written.prefix, shaped).verify()


def test_a_file_without_records_is_read_alike(
    written: TokenFile, shaped: Tokenizer, tmp_path: Path
) -> None:
    """As of another program: PREFIX.bin and .idx alone."""
    for suffix in (".bin", ".idx"):
        (tmp_path / f"plain{suffix}").write_bytes((tmp_path / f"tokens{suffix}").read_bytes())
    plain = open_token_file(tmp_path / "plain", shaped)
    assert plain.images.tolist() == written.images.tolist()
    assert plain.info.is_shaped and plain.info.longest_image == written.info.longest_image
    BatchReader(config_of(tmp_path / "plain"), shaped).sample(0)


def test_damaged_pictures_of_other_programs_are_found(shaped: Tokenizer) -> None:
    vocabulary = shaped.vocabulary
    grid = Grid(3, 5)
    inside = vocabulary.image_tokens(np.arange(15), grid)
    picture = np.array([vocabulary.begin_image, *inside, vocabulary.end_image])
    text = [vocabulary.bos, 340, vocabulary.eos]
    for damaged in range(len(picture)):
        for cut in (picture[:damaged], np.delete(picture, damaged)):
            documents = [[*text], [*text[:2], *cut, 341], [*text[:1], *picture, *text[1:]]]
            ids = np.concatenate([np.array(document) for document in documents])
            ends = np.cumsum([len(document) for document in documents])
            records, broken = find_shaped_images(ids, ends, vocabulary)
            assert broken.tolist() == ([1] if len(cut) else [])
            assert records.tolist() == [(ends[1] + 1, len(picture), 3, 5)]


def test_codes_with_their_grid_are_kept_in_the_cache(tmp_path: Path, shaped: Tokenizer) -> None:
    assert shaped.image is not None
    cache = ImageCache(tmp_path, "name", shaped.image.grids, 32)
    codes = np.arange(16)
    cache.put("ab01", (Grid(2, 8), codes))
    grid, found = cache.get("ab01") or (None, np.empty(0))
    assert grid == (2, 8) and found.tolist() == codes.tolist()
    path = tmp_path / "name" / "ab" / "ab01"
    content = path.read_bytes()
    for damaged in (content[:-4], content[:4], b"", content[:-1], content + content[:4]):
        path.write_bytes(damaged)
        assert cache.get("ab01") is None
    path.write_bytes(np.array([1, 16, *codes], "<u4").tobytes())
    assert cache.get("ab01") is None, "a grid that the tokenizer does not have"


def test_a_cache_gives_what_the_network_gives(
    written: TokenFile, shaped_folder: Path, tmp_path: Path
) -> None:
    words = ["preprocess", tmp_path / "documents.jsonl", "--tokenizer", shaped_folder]
    words += ["--device", "cpu", "--image-cache", tmp_path / "cache"]
    for name in ("first", "second"):
        assert run(*words, "--output", tmp_path / name) == 0
        assert (tmp_path / f"{name}.bin").read_bytes() == (tmp_path / "tokens.bin").read_bytes()


def test_pages_show_pictures_in_their_shape(
    written: TokenFile,
    shaped: Tokenizer,
    shaped_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "page.html"
    words = ["--html", page, "--documents", "12", "--tokenizer", shaped_folder]
    assert run("inspect", written.prefix, *words) == 0
    said = capsys.readouterr().out
    assert "grids of images: 4, the most frequent 4 x 4 (33.3%), 2 x 8 (33.3%), " in said
    captions = re.findall(r"<figcaption[^>]*>(\d+) x (\d+) = (\d+) codes", page.read_text())
    grids = [(int(rows), int(columns)) for rows, columns, _ in captions]
    assert grids == [grid for grid, _ in pictures_of(written, shaped)]
    assert "&lt;grid_" not in page.read_text().split("Documents 0")[1].split("<article")[1]
    assert "&lt;grid_8x2&gt; … &lt;grid_2x8&gt;" in special_tokens(shaped.vocabulary)


def test_a_broken_picture_is_shown_as_its_codes(shaped: Tokenizer) -> None:
    vocabulary = shaped.vocabulary
    inside = vocabulary.image_tokens(np.arange(15), Grid(3, 5))[:-2]
    html = render_tokens(np.array([vocabulary.begin_image, *inside]), shaped)
    assert "14 image codes, no whole image (a picture of 3 x 5 codes has 16 tokens" in html


def test_a_document_that_is_added_by_hand_has_its_grids(shaped: Tokenizer, tmp_path: Path) -> None:
    vocabulary = shaped.vocabulary
    inside = vocabulary.image_tokens(np.zeros(16, int), Grid(8, 2))
    ids = [vocabulary.bos, vocabulary.begin_image, *inside, vocabulary.end_image, vocabulary.eos]
    with TokenFileWriter(tmp_path / "hand", shaped) as writer:
        writer.add(np.array(ids), 1)
        writer.commit()
    file = open_token_file(tmp_path / "hand", shaped)
    assert file.image_grids(0) == [(8, 2)] and file.info.longest_image == 27
