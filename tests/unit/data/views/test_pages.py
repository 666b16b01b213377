"""The page of a token file: it shows what was written, and text stays text."""

import base64
import io
import re

import numpy as np
from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.data.preprocess.encode import DocumentEncoder
from megatron_chameleon.data.token_files.reader import TokenFileWriter, open_token_file
from megatron_chameleon.data.views.token_file_page import (
    token_file_summary,
    write_token_file_page,
)
from megatron_chameleon.data.views.tokens import segments
from page_origin import ORIGIN


def encoded(tokenizer, *content):
    tokens, _ = DocumentEncoder(tokenizer).encode([Document("id", "s", content, "f:1")])
    return tokens.token_ids


def test_segments(tokenizer):
    v = tokenizer.vocabulary
    image = [v.begin_image, *v.code_token_ids[:4], v.end_image]
    found = list(segments(np.array([v.bos, 300, 301, *image, *image, v.eos]), v))
    kinds = [(s.kind, len(s.token_ids)) for s in found]
    block = [("control", 1), ("image", 4), ("control", 1)]
    assert kinds == [("control", 1), ("text", 2), *block, *block, ("control", 1)]


def test_page_shows_texts_and_decoded_images(tmp_path, tokenizer, token_file, picture):
    image = ImagePart(str(tmp_path / picture("i.png")))
    text = 'a <script>alert("x")</script> & é 東 seven'
    ids = encoded(tokenizer, TextPart(text), image)
    file = token_file([ids, encoded(tokenizer, TextPart("not shown"))])
    page_path = tmp_path / "page.html"
    assert (
        write_token_file_page(page_path, file, tokenizer, start=0, documents=1, origin=ORIGIN) == 1
    )
    page = page_path.read_text()
    assert "http" not in page.replace("http-equiv", "")
    pattern = r"<span(?: class=\"byte\")? tabindex=\"-1\" title=\"[^\"]*\">(.*?)</span>"
    spans = re.findall(pattern, page, re.DOTALL)
    assert not any("<" in span or '"' in span for span in spans)
    shown = "".join(spans).replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
    assert shown.replace("&amp;", "&") == text
    assert f'title="{ids[1]}  ' in page
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    codes = tokenizer.image.encode([image.open()])
    np.testing.assert_array_equal(decoded, np.asarray(tokenizer.image.decode(codes)[0]))


def test_block_of_the_wrong_length_is_shown_as_codes(tmp_path, tokenizer, token_file):
    v = tokenizer.vocabulary
    ids = np.array([v.bos, v.begin_image, *v.code_token_ids[:3], v.end_image, v.eos])
    write_token_file_page(
        tmp_path / "page.html", token_file([ids]), tokenizer, start=0, documents=9, origin=ORIGIN
    )
    assert "3 image codes, not 16: 0 1 2" in (tmp_path / "page.html").read_text()


def test_summary(tokenizer, token_file, numbered):
    file = token_file(numbered([4, 4, 4, 9]))
    text = token_file_summary("data/x", file.info, file.lengths)
    assert text.startswith("data/x: 4 documents, 21 tokens, 0 images\nimage tokens: 0 (0.0%)")
    assert "tokens per document: 4 to 9, median 4" in text
    assert [line.split()[3] for line in text.splitlines()[5:-1]] == ["3", "0", "0", "0", "0", "1"]
    assert text.splitlines()[-1] == (
        "source unknown: 4 documents, 21 tokens (100.0%), 0 images (0.0% of its tokens)"
    )


def test_a_source_cannot_forge_a_line(tmp_path, tokenizer):
    v = tokenizer.vocabulary
    with TokenFileWriter(tmp_path / "t", tokenizer, inputs=["a.jsonl"]) as writer:
        writer.add(np.array([v.bos, v.eos]), 0, "web\nerror: \x1b[2J", 1)
        writer.commit()
    file = open_token_file(tmp_path / "t", tokenizer)
    text = token_file_summary("t", file.info, file.lengths)
    assert text.splitlines()[-1].startswith(r"source web\nerror: \x1b[2J: 1 documents")


def test_head_of_a_document_says_where_it_comes_from(tmp_path, tokenizer):
    v = tokenizer.vocabulary
    image = [v.begin_image, *v.code_token_ids[:16], v.end_image]
    with TokenFileWriter(tmp_path / "t", tokenizer, inputs=["a<b>.jsonl"]) as writer:
        writer.add(np.array([v.bos, *image, v.eos]), 1, "web & more", 7)
        writer.commit()
    file = open_token_file(tmp_path / "t", tokenizer)
    write_token_file_page(
        tmp_path / "page.html", file, tokenizer, start=0, documents=1, origin=ORIGIN
    )
    (head,) = re.findall(
        "<article class=.document.><h3>(.*?)</h3>", (tmp_path / "page.html").read_text()
    )
    head = head.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert head == "document 0 · web & more · a<b>.jsonl:7 · 20 tokens, 90% of them of images"
