"""Conversations: their turns, the tokens that are trained, and where they are stored and packed."""

import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.records import parse_line
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.data.preprocess.encode import DocumentEncoder
from megatron_chameleon.data.preprocess.options import EncodeOptions
from megatron_chameleon.data.token_files.modality_balance import describe_answers, rare_modality
from megatron_chameleon.data.token_files.reader import TokenFileWriter, open_token_file, read_info
from megatron_chameleon.data.views.audit import audit_step, count_trained, format_audit
from megatron_chameleon.data.views.mixture import mixture_summary
from megatron_chameleon.data.views.sequence_page import write_sequence_page
from megatron_chameleon.data.views.token_file_page import token_file_summary, write_token_file_page
from megatron_chameleon.errors import ConfigErrors, DataError
from page_origin import ORIGIN

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def message(role, *content):
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}


def image(path):
    return {"type": "image", "image": path}


def text(words):
    return {"type": "text", "text": words}


def parse(record, folder="folder", number=1):
    return parse_line(json.dumps(record).encode(), f"{folder}/chat.jsonl", number)


def encode(records, tokenizer, folder="folder", **options):
    """The block, the token ids of each document and what was dropped."""
    documents = [parse(record, folder, number) for number, record in enumerate(records, start=1)]
    block, dropped = DocumentEncoder(tokenizer, EncodeOptions(**options)).encode(documents)
    return block, np.split(block.token_ids, np.cumsum(block.lengths)[:-1]), dropped


class Peer:
    """The format and the mask, worked out once more from the documents, part by part."""

    def __init__(self, tokenizer, folder):
        self.tokenizer, self.folder = tokenizer, folder
        self.v = tokenizer.vocabulary

    def part(self, part, pad):
        if isinstance(part, str) or part["type"] == "text":
            return self.tokenizer.text.encode(part if isinstance(part, str) else part["text"])
        picture = Image.open(self.folder / part["image"]).convert("RGB")
        if pad:
            square = Image.new("RGB", (16, 16), "white")
            scale = 16 / max(picture.size)
            small = picture.resize([round(side * scale) for side in picture.size], Image.LANCZOS)
            square.paste(small, [(16 - side) // 2 for side in small.size])
            picture = square
        codes = self.tokenizer.image.encode([picture])[0]
        return [self.v.begin_image, *self.v.codes_to_token_ids(codes), self.v.end_image]

    def tokens(self, record):
        """(token, whether it is trained) of a document."""
        if "text" in record:
            ids = self.tokenizer.text.encode(record["text"])
            return [(i, True) for i in (self.v.bos, *ids, self.v.eos)]
        found = [(self.v.bos, False)]
        for entry in record["messages"]:
            answers = entry["role"] == ASSISTANT
            content = entry["content"]
            for part in [content] if isinstance(content, str) else content:
                found += [(int(i), answers) for i in self.part(part, pad=not answers)]
            if entry["role"] == SYSTEM:
                found += [(i, False) for i in self.tokenizer.text.encode("\n\n")]
            else:
                found.append((self.v.eos if answers else self.v.separator, answers))
        return found


@pytest.fixture
def records(tmp_path, picture):
    """Conversations of every kind, and other documents between them."""
    wide, tall = picture("wide.png", 1, size=(40, 16)), picture("tall.png", 2, size=(16, 24))
    return [
        {"messages": [message(USER, "a seven"), message(ASSISTANT, "and two")]},
        {"text": "zero one four six eight nine"},
        {
            "messages": [
                message(SYSTEM, "handwritten"),
                message(USER, image(wide), text("what?")),
                message(ASSISTANT, "the sum is five"),
                message(USER, text("and "), image(tall)),
                message(ASSISTANT, text("this"), image(wide), text("nine"), image(tall)),
            ]
        },
        {"messages": [message(USER, "draw"), message(ASSISTANT, image(tall))]},
        {"text": "a handwritten seven"},
        {"messages": [message(USER, image(tall)), message(ASSISTANT, "six")]},
    ]


@pytest.fixture
def write(tmp_path, tokenizer):
    def write_records(records, name="chat"):
        block, _, dropped = encode(records, tokenizer, tmp_path)
        assert dropped == []
        with TokenFileWriter(tmp_path / name, tokenizer, inputs=["chat.jsonl"]) as writer:
            writer.add_block(block)
            writer.commit()
        return open_token_file(tmp_path / name, tokenizer)

    return write_records


# Documents


def test_prompt_and_answer_are_a_short_way_to_write_two_messages():
    long = parse({"messages": [message(USER, image("i.png")), message(ASSISTANT, "two")]})
    short = parse({"prompt": [image("i.png")], "answer": "two"})
    assert (short.content, short.roles) == (long.content, long.roles)
    assert short.content == (ImagePart("folder/i.png"), TextPart("two"))
    assert short.roles == (USER, ASSISTANT)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        (
            [message("bot", "x")],
            "messages[0] has the unknown role 'bot'. Write user, assistant or system",
        ),
        (
            [message(USER, "x")] * 2,
            "messages[1] is from the user, like the message before it. Join the",
        ),
        ([message(ASSISTANT, "x")], "messages[0] is from the assistant, but no user message comes"),
        (
            [message(SYSTEM, "x"), message(ASSISTANT, "x")],
            "messages[1] is from the assistant, but no user message comes before it. Put a user",
        ),
        (
            [message(USER, "x"), message(SYSTEM, "x")],
            "messages[1] is a system message after other messages. Put the one system message",
        ),
        ([message(USER, " \n")], "messages[0] (user) is empty. Write text or an image"),
        ([message(USER, "x"), message(ASSISTANT, text(""))], "messages[1] (assistant) is empty"),
        ([message(USER, {"type": "audio"})], "content[0] has the unknown type 'audio'"),
    ],
)
def test_messages_out_of_order_are_a_broken_document(messages, what):
    with pytest.raises(DataError) as caught:
        parse({"messages": messages})
    assert str(caught.value).startswith(f"folder/chat.jsonl:1: {what}")


def test_a_prompt_must_have_content():
    with pytest.raises(DataError, match=r"chat.jsonl:1: answer \(assistant\) is empty"):
        parse({"prompt": "x", "answer": ""})
    with pytest.raises(
        DataError, match=r"chat.jsonl:1: prompt must be a list with at least one part"
    ):
        parse({"prompt": [], "answer": "x"})


def test_conversations_that_cannot_be_trained_are_listed(tmp_path, tokenizer):
    good = message(USER, "two"), message(ASSISTANT, "five")
    records = [
        {"messages": [message(USER, "two")]},
        {"messages": [*good, message(USER, "three")]},
        {"messages": [message(USER, image("none.png")), message(ASSISTANT, "five")]},
        {"messages": [*good]},
    ]
    (tmp_path / "chat.jsonl").touch()
    block, _, dropped = encode(records, tokenizer, tmp_path)
    assert [(bad.reason, bad.detail) for bad in dropped] == [
        ("broken document", "the conversation has no assistant message"),
        ("broken document", "the conversation ends with a user message that has no answer"),
        ("missing image", f"{tmp_path}/none.png: no such image file"),
    ]
    assert len(block.lengths) == 1 and block.answer_counts.tolist() == [1]


# Tokens and marks


def test_tokens_and_marks_follow_from_the_documents(tmp_path, tokenizer, records, write):
    file = write(records)
    peer = Peer(tokenizer, tmp_path)
    for document, record in enumerate(records):
        expected = peer.tokens(record)
        assert file.read(document).tolist() == [token for token, _ in expected]
        marks = np.zeros(len(expected), dtype=bool)
        spans = file.answer_spans(document)
        for start, length in spans:
            marks[start : start + length] = True
        if "text" in record:
            assert len(spans) == 0
        else:
            assert marks.tolist() == [trained for _, trained in expected]
    assert file.are_conversations(0, 6).tolist() == [True, False, True, True, False, True]
    assert file.are_conversations(1, 3).tolist() == [False, True]
    file.verify()


def test_the_sidecar_counts_answers(tmp_path, tokenizer, records, write):
    info = write(records).info
    peer = Peer(tokenizer, tmp_path)
    chats = [peer.tokens(record) for record in records if "messages" in record]
    assert (info.answers, info.total("conversations")) == (5, 4)
    assert info.longest_conversation == max(map(len, chats))
    assert info.total("conversation_tokens") == sum(map(len, chats))
    assert info.total("answer_tokens") == sum(trained for chat in chats for _, trained in chat)
    assert (info.total("answer_images"), info.total("answer_image_tokens")) == (3, 3 * 18)
    assert info.total("conversation_image_tokens") == 6 * 18
    assert info.format == "megatron_chameleon.tokens/3"
    (line,) = describe_answers(info)
    assert line.startswith("answers: 5 in 4 conversations, ") and line.endswith("3 images)")


def test_images_are_padded_or_cropped_as_told(tmp_path, tokenizer, picture):
    record = {"prompt": [image(picture("wide.png", size=(40, 16)))], "answer": "seven"}
    tokens = {}
    for fit in ("role", "crop", "pad"):
        _, (tokens[fit],), _ = encode([record], tokenizer, tmp_path, image_fit=fit)
    assert tokens["role"].tolist() == tokens["pad"].tolist() != tokens["crop"].tolist()


def test_the_cache_keeps_padded_and_cropped_codes_apart(tmp_path, tokenizer, picture):
    wide = image(picture("wide.png", size=(40, 16)))
    records = [{"prompt": [wide], "answer": [wide]}]
    _, (expected,), _ = encode(records, tokenizer, tmp_path)
    for _ in range(2):
        _, (found,), _ = encode(records, tokenizer, tmp_path, image_cache=str(tmp_path / "cache"))
        assert found.tolist() == expected.tolist()
    v = tokenizer.vocabulary
    codes = expected[v.is_image_code(expected)]
    assert codes[:16].tolist() != codes[16:].tolist()
    assert sum(path.is_file() for path in (tmp_path / "cache").rglob("*")) == 2


def test_files_put_together_keep_their_answers(tmp_path, tokenizer, records, write):
    whole = write(records)
    parts = [write(records[:2], "a"), write(records[4:5], "b"), write(records[2:4], "c")]
    parts.append(write(records[4:], "d"))
    with TokenFileWriter(tmp_path / "merged", tokenizer, inputs=["chat.jsonl"]) as writer:
        for part in (parts[0], parts[2], parts[3]):
            writer.add_file(part.prefix, part.info)
        writer.commit()
    assert not (tmp_path / "b.answers").exists()
    assert (tmp_path / "merged.answers").read_bytes() == (tmp_path / "chat.answers").read_bytes()
    assert read_info(tmp_path / "merged") == whole.info


def test_a_token_file_of_an_earlier_version_is_trained_whole(tmp_path, tokenizer, records, write):
    write(records[4:5])
    path = tmp_path / "chat.json"
    record = json.loads(path.read_text())
    for key in ("answers", "longest_conversation", "image_fit"):
        del record[key]
    for totals in record["sources"].values():
        for key in [name for name in totals if "answer" in name or "conversation" in name]:
            del totals[key]
    path.write_text(json.dumps(record))
    file = open_token_file(tmp_path / "chat", tokenizer)
    assert len(file.answer_spans(0)) == 0 and not file.are_conversations(0, 1).any()


@pytest.mark.parametrize(
    ("start", "length"), [(10**6, 3), (1, 10**6), (1, 0)], ids=["start", "length", "empty"]
)
def test_damaged_answers(tmp_path, tokenizer, records, write, start, length):
    write(records[:1])
    path = tmp_path / "chat.answers"
    path.write_bytes(np.array([start, length], dtype="<u8").tobytes())
    file = open_token_file(tmp_path / "chat", tokenizer)
    if start == 1:
        with pytest.raises(
            DataError, match=r"chat\.answers: document 0 has \d+ tokens and ends before its"
        ):
            file.answer_spans(0)
        with pytest.raises(DataError, match=r"chat\.answers: document 0 has answers that do not"):
            file.verify()
    else:
        with pytest.raises(DataError, match=r"chat\.answers: its last answer begins after"):
            file.verify()
    path.write_bytes(b"short")
    with pytest.raises(
        DataError, match=r"chat\.answers: has 5 bytes; its \.json names 1 answers, which take 16\."
    ):
        open_token_file(tmp_path / "chat", tokenizer)
    path.unlink()
    with pytest.raises(DataError, match=r"chat: \.answers is missing"):
        open_token_file(tmp_path / "chat", tokenizer)


# Training


@pytest.fixture
def config(tmp_path):
    config = Config()
    config.model.seq_length = 160
    config.data.stage1 = [SourceConfig(str(tmp_path / "chat"), image_first=0.5)]
    config.training.steps, config.training.global_batch_size = 4, 8
    return config


def expected_sample(sample, peer, records):
    """Tokens and marks of a sample's parts, each a document from its first token on."""
    for document, start, stop, length in zip(
        *(getattr(sample.packed.parts, name) for name in ("document", "start", "stop", "length")),
        strict=True,
    ):
        record = records[document]
        assert "text" in record or (start, stop) == (0, length)
        whole = peer.tokens(record)
        yield from [(*whole[i], *(whole[i + 1] if i + 1 < length else (peer.v.pad, False)))
                    for i in range(start, stop)]  # fmt: skip


@pytest.mark.parametrize("isolated", [False, True])
def test_the_loss_is_on_answers_and_conversations_are_not_cut(
    tmp_path, tokenizer, records, write, config, isolated
):
    """Nor turned, although some are an image and a text."""
    records = [*records, *({"text": "zero one four " * n} for n in range(1, 9))]
    write(records)
    config.data.reset_attention = isolated
    reader = BatchReader(config, tokenizer)
    peer = Peer(tokenizer, tmp_path)
    seen = set()
    for index in range(32):
        sample = reader.sample(index)
        rows = list(expected_sample(sample, peer, records))
        seen |= set(sample.packed.parts.document.tolist())
        assert sample.tokens[: len(rows)].tolist() == [token for token, *_ in rows]
        wanted = [trained and label not in (peer.v.bos, peer.v.pad) for *_, label, trained in rows]
        mask = reader.batch([index]).loss_mask[0].tolist()
        assert mask == [*wanted, *[0] * (160 - len(rows))]
    assert len(seen) == len(records)


def test_conversations_of_text_alone_are_not_cut_either(tmp_path, tokenizer, write, config):
    """Although text flows from one sequence to the next."""
    chats = [
        {"prompt": "zero one " * (n % 7 + 1), "answer": "five " * (n % 9 + 1)} for n in range(40)
    ]
    write(chats)
    config.model.seq_length = 64
    reader = BatchReader(config, tokenizer)
    for index in range(32):
        parts = reader.sample(index).packed.parts
        assert len(parts) > 0 and (parts.tokens == parts.length).all()


def test_pages_and_tables_show_what_is_trained(tmp_path, tokenizer, records, write, config):
    file = write(records)
    text = token_file_summary("chat", file.info, file.lengths)
    assert next(describe_answers(file.info)) in text.splitlines()
    write_token_file_page(
        tmp_path / "page.html", file, tokenizer, start=0, documents=9, origin=ORIGIN
    )
    page = (tmp_path / "page.html").read_text()
    grey = re.findall(r'<div class="untrained">.*?</div>', page, re.DOTALL)
    assert len(grey) == file.info.answers  # a prompt before each
    assert all(run.endswith("&lt;reserved08706&gt;</abbr></div>") for run in grey)
    config.model.seq_length = 400
    reader = BatchReader(config, tokenizer)
    assert reader.describe_answers() == [f"{file.prefix}: {next(describe_answers(file.info))}"]
    assert reader.describe_answers()[0] in mixture_summary(reader)
    audit = audit_step(reader, 1)
    samples = [sample for _, sample in audit.samples]
    trained = int(reader.batch([index for index, _ in audit.samples]).loss_mask.sum())
    assert count_trained(samples) == {file.prefix: trained}
    assert f" {trained:,} " in format_audit(audit, tokenizer.vocabulary, documents=3)
    write_sequence_page(tmp_path / "page.html", audit, reader, tokenizer, len(samples), ORIGIN)
    answers = np.array([1, 0, 2, 1, 0, 1])  # of each document, and as many prompts
    prompts = sum(answers[sample.packed.parts.document].sum() for sample in samples)
    assert (tmp_path / "page.html").read_text().count('<div class="untrained">') == prompts


def test_the_loss_is_on_what_the_config_says(tmp_path, tokenizer, records, write, config):
    write(records)
    reader = BatchReader(config, tokenizer)
    first_samples = range(reader.config.training.global_batch_size)
    marked = reader.batch(first_samples).loss_mask
    config.data.loss_on = "all"
    reader = BatchReader(config, tokenizer)
    everything = reader.batch(first_samples).loss_mask
    assert 0 < marked.sum() < everything.sum()
    assert (everything >= marked).all()
    (warning,) = reader.warnings()
    assert warning.startswith(
        "data.stage1[0]: data.loss_on is all, so the loss includes the prompts of"
    )
    config.data.loss_on = "answers"
    with pytest.raises(ConfigErrors, match=r"2 of the 6 documents of .*chat are not conversations"):
        BatchReader(config, tokenizer)
    write([record for record in records if "messages" in record])
    batch = BatchReader(config, tokenizer).batch(range(8))
    assert 0 < batch.loss_mask.sum() < (batch.labels != tokenizer.vocabulary.pad).sum()


def test_long_conversations_are_left_out_and_counted(tmp_path, tokenizer, records, write, config):
    info = write(records).info
    config.model.seq_length = info.longest_conversation - 1
    config.data.packing_reserve = 0.2
    reader = BatchReader(config, tokenizer)
    seen = [reader.sample(index).packed.parts.document.tolist() for index in range(32)]
    assert set(itertools.chain(*seen)) == {0, 1, 3, 4, 5}
    (warning,) = reader.warnings()
    assert warning.startswith("data.stage1[0]: 1 of 4 conversations (")
    assert warning.endswith("are left out, for example chat.jsonl:3")
    write(records[2:3])
    with pytest.raises(ConfigErrors, match=r"all 1 conversations of .* are longer than mod"):
        BatchReader(config, tokenizer)


def test_a_rare_modality_is_told(tmp_path, tokenizer, records, write, config):
    assert "only 1.0% of the trained tokens are of images" in rare_modality(1000, 10)
    assert "only 2.0% of the trained tokens are of text" in rare_modality(1000, 980)
    assert rare_modality(1000, 30) == rare_modality(1000, 0) == rare_modality(0, 0) == ""
    write(records)
    assert BatchReader(config, tokenizer).warnings() == []
    write(records[:1])
    (warning,) = BatchReader(config, tokenizer).warnings()
    assert warning.startswith("data, stage 1: only 0.0% of the trained tokens are of images")
