"""Documents to token ids: the layout of a document, the batching, and what is dropped."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.data.inputs.records import Fault
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.data.preprocess.encode import DocumentEncoder
from megatron_chameleon.data.preprocess.options import EncodeOptions
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.pixels import RULES
from megatron_chameleon.tokenizer.folder import load_tokenizer


def document(*content, source="source", record=1):
    return Document("id", source, content, f"file:{record}", record=record)


def encode(documents, tokenizer, **options):
    """The token ids of each document, what was dropped, and the block."""
    block, dropped = DocumentEncoder(tokenizer, EncodeOptions(**options)).encode(documents)
    return np.split(block.token_ids, np.cumsum(block.lengths)[:-1]), dropped, block


def test_layout_of_a_document(tmp_path, tokenizer, picture):
    path = tmp_path / picture("i.png")
    content = TextPart("a seven"), ImagePart(str(path)), TextPart("and two")
    (token_ids,), dropped, block = encode([document(*content)], tokenizer)
    vocabulary = tokenizer.vocabulary
    codes = vocabulary.codes_to_token_ids(tokenizer.image.encode([Image.open(path)])[0])
    expected = [vocabulary.bos, *tokenizer.text.encode("a seven")]
    expected += [vocabulary.begin_image, *codes, vocabulary.end_image]
    expected += [*tokenizer.text.encode("and two"), vocabulary.eos]
    assert token_ids.tolist() == expected
    assert dropped == [] and block.image_counts.tolist() == [1]
    before = 1 + len(tokenizer.text.encode("a seven"))
    assert block.images.tolist() == [(before, len(codes) + 2)]


def test_batches_over_documents_give_what_single_documents_give(tmp_path, tokenizer, picture):
    """Several batches of images, in documents of 0 to 4 of them."""
    documents, image = [], 0
    for images in [3, 0, 4, 1, 4, 4, 0, 4]:
        parts = [TextPart(f"{images} of two")]
        for _ in range(images):
            parts.append(ImagePart(str(tmp_path / picture(f"{image}.png", seed=image))))
            image += 1
        documents.append(document(*parts))
    together, _, block = encode(documents, tokenizer)
    spans = iter(block.images)
    for single, token_ids, count in zip(documents, together, block.image_counts, strict=True):
        (alone,), _, alone_block = encode([single], tokenizer)
        np.testing.assert_array_equal(token_ids, alone)
        assert [next(spans).item() for _ in range(count)] == alone_block.images.tolist()


@pytest.mark.parametrize("text_encoder", ["gigatoken", "sentencepiece"])
def test_text_never_becomes_a_control_or_image_token(tokenizer, text_encoder):
    spelled = "<s></s><pad><unk>IMGIMGAZ<racm3:break><eoss><reserved08706><image>"
    documents = [document(TextPart(spelled))]
    (token_ids,), _, _ = encode(documents, tokenizer, text_encoder=text_encoder)
    inner = token_ids[1:-1]
    vocabulary = tokenizer.vocabulary
    assert not vocabulary.is_image_code(inner).any()
    assert inner.min() > vocabulary.image_placeholder  # all special ids come first
    assert tokenizer.text.decode(inner) == spelled


def test_unusable_image_drops_its_document_and_no_other(tmp_path, tokenizer, picture):
    good = ImagePart(str(tmp_path / picture("good.png")))
    (tmp_path / "empty.png").write_bytes(b"")
    empty = ImagePart(str(tmp_path / "empty.png"))
    documents = [
        document(TextPart("one"), good, record=1),
        document(good, TextPart("two"), empty, source="other", record=2),
        document(TextPart("three"), good, record=3),
    ]
    (first, last), (dropped,), block = encode(documents, tokenizer)
    assert (dropped.reason, dropped.corpus_name, dropped.where) == (
        "empty image",
        "other",
        "file:2",
    )
    assert dropped.detail == f"{tmp_path / 'empty.png'}: the image has 0 bytes"
    (alone,), _, _ = encode(documents[2:], tokenizer)
    np.testing.assert_array_equal(last, alone)
    assert block.image_counts.tolist() == [1, 1] and block.records.tolist() == [1, 3]
    assert block.corpus_names == ["source"] and len(first) > 2


def test_faults_are_listed_in_the_order_of_the_input(tmp_path, tokenizer):
    """The list must not depend on how the input was cut into blocks."""
    bad = ImagePart(str(tmp_path / "none.png"))
    fault = Fault(DataError("file:2", "not valid JSON", "Fix it"), "broken document", "x", "s")
    items = [document(bad, record=1), fault, document(bad, record=3), document(TextPart("a"))]
    _, dropped, _ = encode(items, tokenizer)
    assert [bad.where for bad in dropped] == ["file:1", "file:2", "file:3"]


@pytest.mark.parametrize("content", [(TextPart("a"),), (TextPart("a"), TextPart("two"))])
def test_sources_are_numbered_and_can_be_replaced(tokenizer, content):
    documents = [document(*content, source=name) for name in ("x", "y", "x")]
    _, _, block = encode(documents, tokenizer)
    assert block.corpus_names == ["x", "y"] and block.corpus_numbers.tolist() == [0, 1, 0]
    _, _, block = encode(documents, tokenizer, corpus_name="all")
    assert block.corpus_names == ["all"] and block.corpus_numbers.tolist() == [0, 0, 0]


def test_no_documents_are_no_tokens(tokenizer):
    block, _ = DocumentEncoder(tokenizer).encode([])
    assert len(block.token_ids) == len(block.lengths) == len(block.images) == 0


def test_image_cache_gives_the_same_codes(tmp_path, tokenizer, picture, monkeypatch):
    documents = [document(ImagePart(str(tmp_path / picture(f"{i}.png", i)))) for i in range(3)]
    expected, _, _ = encode(documents, tokenizer)
    folder = str(tmp_path / "cache")
    encode(documents, tokenizer, image_cache=folder)
    entries = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert len(entries) == 3
    entries[0].write_bytes(b"damaged")
    encoded = []
    real = type(tokenizer.image).encode_prepared
    monkeypatch.setattr(
        type(tokenizer.image),
        "encode_prepared",
        lambda self, images: encoded.append(len(images)) or real(self, images),
    )
    found, _, _ = encode(documents, tokenizer, image_cache=folder)
    assert encoded == [1]  # only the damaged one
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_codes_of_another_dtype_are_kept_apart(tmp_path, tokenizer, picture):
    documents = [document(ImagePart(str(tmp_path / picture(f"{i}.png", i)))) for i in range(9)]
    without_images = load_tokenizer(tokenizer.folder, images=False)
    cache = tmp_path / "cache"
    exact, rounded = (
        np.concatenate(
            encode(documents, without_images, image_cache=str(cache), image_dtype=dtype)[0]
        )
        for dtype in ("fp32", "bf16")
    )
    assert (exact == rounded).mean() > 0.8
    folders = {path.parent for path in cache.rglob("*") if path.is_file()}
    names = sorted(folder.relative_to(cache).parts[0] for folder in folders)
    name = tokenizer.fingerprint[:16]
    assert set(names) == {f"{name}-pixels{RULES}", f"{name}-bf16-pixels{RULES}"}


def test_images_need_an_image_tokenizer(tokenizer, tmp_path):
    text_only = dataclasses.replace(tokenizer, image=None, folder=tmp_path)
    assert len(encode([document(TextPart("x"))], text_only)[0]) == 1
    with pytest.raises(DataError, match=r"file:1: the document has 1 image, .* no image tokenizer"):
        encode([document(ImagePart("i.png"))], text_only)


def test_documents_choose_no_file_and_no_host(tmp_path, tokenizer, picture):
    """Each such reference drops its document, with the option that would keep it."""
    (tmp_path / "docs").mkdir()
    good = (tmp_path / picture("good.png")).rename(tmp_path / "docs/good.png")
    (tmp_path / "docs/link.png").symlink_to(tmp_path / picture("elsewhere.png"))
    names = ("good.png", "../elsewhere.png", "link.png", str(tmp_path / "elsewhere.png"))
    names += ("/etc/passwd", "https://x.invalid/y.png", "zip://a::ftp://x.invalid/b", "\0", "")
    lines = [{"content": [{"type": "image", "image": name}]} for name in names]
    path = tmp_path / "docs/a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def kept(**options):
        images = ImageOptions(**options)
        (block,) = read_blocks(find_inputs([path]), plan_ranges(find_inputs([path])))
        encoded = DocumentEncoder(tokenizer, EncodeOptions(images=images)).encode_block(block)
        return encoded.tokens.records.tolist(), encoded.dropped

    records, dropped = kept()
    assert records == [1]
    told = {bad.where.rsplit(":", 1)[1]: (bad.reason, bad.detail) for bad in dropped}
    for line in "2", "3", "4":
        assert told[line][0] == "refused image"
        assert told[line][1].endswith(f"add --image-root {tmp_path}")
    assert told["6"][1].endswith("add --image-protocols https")
    assert good.is_file() and kept(roots=(str(tmp_path),))[0] == [1, 2, 3, 4]
