"""What a step has read, as a table and as a page: the counts add up, the documents are right."""

import re

import numpy as np
import pytest

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.data.preprocess.encode import DocumentEncoder
from megatron_chameleon.data.views.audit import audit_step, count_kinds, format_audit, kinds_of
from megatron_chameleon.data.views.mixture import (
    mixture_blocks,
    mixture_spans,
    mixture_summary,
)
from megatron_chameleon.data.views.sequence_page import write_sequence_page
from megatron_chameleon.errors import ConfigError
from page_origin import ORIGIN


@pytest.fixture
def config(tmp_path, token_file, numbered, tokenizer, picture):
    """A config with text, and with documents of a picture and a caption."""
    image = ImagePart(str(tmp_path / picture("i.png")))
    content = [[TextPart(f"a handwritten seven {i}"), image] for i in range(12)]
    documents = [Document(str(i), "s", tuple(parts), "f:1") for i, parts in enumerate(content)]
    block, _ = DocumentEncoder(tokenizer).encode(documents)
    token_file(np.split(block.token_ids, np.cumsum(block.lengths)[:-1]), "pairs")
    token_file(numbered([30, 9, 14, 70]), "text")
    config = Config()
    config.model.seq_length = 80
    config.data.stage1 = [
        SourceConfig(str(tmp_path / "text")),
        SourceConfig(str(tmp_path / "pairs")),
    ]
    config.data.stage2 = [SourceConfig(str(tmp_path / "pairs"), name="again")]
    config.training.steps, config.training.global_batch_size = 10, 4
    return config


def test_kinds(tokenizer):
    v = tokenizer.vocabulary
    ids = [v.bos, v.begin_image, *v.code_token_ids[:2], v.end_image, 300, v.separator, v.eos, v.pad]
    assert kinds_of(np.array(ids), v).tolist() == [2, 1, 1, 1, 1, 0, 2, 2, 3]


def test_a_step_is_what_the_run_read(config, tokenizer):
    reader = BatchReader(config, tokenizer)
    audit = audit_step(reader, 3)
    assert [index for index, _ in audit.samples] == [8, 9, 10, 11]
    assert audit.stage == 1 and audit_step(reader, 9).stage == 2
    for index, sample in audit.samples:
        np.testing.assert_array_equal(sample.tokens, reader.sample(index).tokens)
    counts = count_kinds([sample for _, sample in audit.samples], tokenizer.vocabulary)
    tokens = np.concatenate([sample.tokens for _, sample in audit.samples])
    expected = np.bincount(kinds_of(tokens, tokenizer.vocabulary), minlength=4)
    np.testing.assert_array_equal(sum(counts.values()), expected)


def test_the_table_names_files_documents_and_shares(config, tokenizer, tmp_path):
    reader = BatchReader(config, tokenizer)
    audit = audit_step(reader, 3)
    text = format_audit(audit, tokenizer.vocabulary, documents=1000)
    lines = text.splitlines()
    assert lines[0] == "step 3: samples 8 to 11, 320 tokens, stage 1"
    shares = [float(share) for share in re.findall(r"(\d+\.\d\d)%", text)]
    assert sum(shares) == pytest.approx(100, abs=0.05)
    rows = [line.split() for line in lines if re.match(r" +\d+ +\d+ ", line)]
    sample = audit.samples[0][1]
    ours = [row for row in rows if row[0] == "8"]
    assert [int(row[1]) for row in ours] == sample.packed.parts.document.tolist()
    assert [row[-1] for row in ours] == [sample.source_names[n] for n in sample.packed.source]
    assert len(rows) == sum(len(sample.packed.source) for _, sample in audit.samples)
    short = format_audit(audit, tokenizer.vocabulary, documents=2).splitlines()
    assert short[-1] == f"... and {len(rows) - 2} more: --documents {len(rows)}"


def test_a_step_that_the_run_does_not_have(config, tokenizer):
    reader = BatchReader(config, tokenizer)
    for step in (0, 11):
        with pytest.raises(ConfigError, match=f"--step: the run has no step {step}. Give 1 to 10"):
            audit_step(reader, step)


def test_the_mixture_s_table(config, tokenizer):
    text = mixture_summary(BatchReader(config, tokenizer))
    assert text.startswith("10 steps, 40 sequences of 80 tokens; 1 mixture\n")
    assert "stage 1, samples 0 to 31:" in text and "stage 2, samples 32 to 39:" in text
    shares = [float(share) for share in re.findall(r"([\d.]+)% of the tokens", text)]
    assert shares == [50, 50, 25, 25, 50]


def test_the_mixture_on_a_page_has_the_numbers_of_its_text(config, tokenizer):
    reader = BatchReader(config, tokenizer)
    text, page = mixture_summary(reader), "".join(mixture_blocks(reader))
    pattern = r"([\d.]+)% of the tokens, ([\d.]+)% of the samples, ([\d.]+)% .*, ([\d.]+) epochs"
    shown = r'<td class="n">([\d.]+)%<span[^/]*/span></td>' * 3 + r'<td class="n">([\d.]+)</td>'
    assert (
        re.findall(shown, page) == re.findall(pattern, text) and len(re.findall(pattern, text)) == 5
    )
    assert "<h3>Stage 1, steps 1 to 8</h3>" in page and "<h3>Stage 2, steps 9 to 10</h3>" in page
    assert page.count('<svg viewBox="0 0 2000') == 2  # shares, and how often each was read


def test_how_often_a_source_is_read_counts_what_the_run_uses_of_a_block(config, tokenizer):
    """The run has 40 sequences of a block of 2,048."""
    reader = BatchReader(config, tokenizer)
    read = {part.key: part.epochs[1] for span in mixture_spans(reader) for part in span.parts}
    tokens = {key: c.stream.corpus.tokens for key, c in reader.mixture(39).cursors.items()}
    expected = 40 * 80 * (1 - config.data.packing_reserve)
    total = sum(read[key] * tokens[key] for key in read)
    # Sequences that no document fills are padding, which is not read.
    assert 0.6 * expected < total <= 1.001 * expected


def test_the_page_shows_sequences_with_kinds_and_pictures(config, tokenizer, tmp_path):
    reader = BatchReader(config, tokenizer)
    audit = audit_step(reader, 3)
    path = tmp_path / "page.html"
    assert write_sequence_page(path, audit, reader, tokenizer, 3, ORIGIN) == 3
    page = path.read_text()
    assert page.count("<article") == 3 and page.count('class="stripes"') == 3
    parts = [len(sample.packed.source) for _, sample in audit.samples[:3]]
    assert page.count("<section>") == sum(parts)
    images = sum(
        int((s.tokens == tokenizer.vocabulary.begin_image).sum()) for _, s in audit.samples[:3]
    )
    assert images > 0 and page.count("data:image/png;base64,") == images
    widths = [float(w) for w in re.findall(r'class="k." style="width:([\d.]+)%', page)]
    assert sum(widths) == pytest.approx(300, abs=0.5)
    assert "http" not in page.replace("http-equiv", "")
