"""Documents to token ids: the layout of a document, the batches behind it, what is dropped."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.data.documents import Document, ImagePart, TextPart
from megatron_chameleon.data.encode import IMAGE_BATCH, encode_documents
from megatron_chameleon.errors import DataError


def document(*content):
    return Document("id", "source", content, "file:1")


def test_layout_of_a_document(tmp_path, tokenizer, picture):
    path = tmp_path / picture("i.png")
    (result,) = encode_documents(
        [document(TextPart("a seven"), ImagePart(str(path)), TextPart("and two"))], tokenizer
    )
    vocabulary = tokenizer.vocabulary
    codes = vocabulary.codes_to_token_ids(tokenizer.image.encode([Image.open(path)])[0])
    expected = [vocabulary.bos, *tokenizer.text.encode("a seven")]
    expected += [vocabulary.begin_image, *codes, vocabulary.end_image]
    expected += [*tokenizer.text.encode("and two"), vocabulary.eos]
    assert result.token_ids.tolist() == expected
    assert result.images == 1 and result.dropped is None


def test_batches_over_documents_give_what_single_documents_give(tmp_path, tokenizer, picture):
    """More images than one batch holds, in documents of 0 to 4 of them."""
    documents, image = [], 0
    for images in [3, 0, 4, 1, 4, 4, 0, 4]:
        parts = [TextPart(f"{images} of two")]
        for _ in range(images):
            parts.append(ImagePart(str(tmp_path / picture(f"{image}.png", seed=image))))
            image += 1
        documents.append(document(*parts))
    assert image > IMAGE_BATCH
    together = encode_documents(documents, tokenizer)
    for single, result in zip(documents, together, strict=True):
        (alone,) = encode_documents([single], tokenizer)
        np.testing.assert_array_equal(result.token_ids, alone.token_ids)
        assert result.images == alone.images


def test_text_never_becomes_a_control_or_image_token(tokenizer):
    spelled = "<s></s><pad><unk>IMGIMGAZ<racm3:break><eoss><reserved08706><image>"
    (result,) = encode_documents([document(TextPart(spelled))], tokenizer)
    inner = result.token_ids[1:-1]
    vocabulary = tokenizer.vocabulary
    assert not vocabulary.is_image_code(inner).any()
    assert inner.min() > vocabulary.image_placeholder  # all special ids come first
    assert tokenizer.text.decode(inner) == spelled


def test_unusable_image_drops_its_document_and_no_other(tmp_path, tokenizer, picture):
    good = ImagePart(str(tmp_path / picture("good.png")))
    (tmp_path / "empty.png").write_bytes(b"")
    empty = ImagePart(str(tmp_path / "empty.png"))
    documents = [
        document(TextPart("one"), good),
        document(good, TextPart("two"), empty),
        document(TextPart("three"), good),
    ]
    first, dropped, last = encode_documents(documents, tokenizer)
    assert dropped.token_ids is None and dropped.dropped == "empty image"
    assert dropped.detail == f"{tmp_path / 'empty.png'}: the image has 0 bytes"
    (alone,) = encode_documents(documents[2:], tokenizer)
    np.testing.assert_array_equal(last.token_ids, alone.token_ids)
    assert first.images == last.images == 1


def test_images_need_an_image_tokenizer(tokenizer):
    text_only = dataclasses.replace(tokenizer, image=None)
    assert encode_documents([document(TextPart("x"))], text_only)[0].token_ids is not None
    with pytest.raises(
        DataError, match=r"file:1: the document has 1 images, .* no image tokenizer"
    ):
        encode_documents([document(ImagePart("i.png"))], text_only)
