"""Prompts are encoded in the format of fine-tuning."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.data.documents.records import parse_line
from megatron_chameleon.data.documents.schema import Document
from megatron_chameleon.data.preprocess.encode import DocumentEncoder
from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.chat import (
    EncodedImage,
    PromptFormat,
    chat_prompt,
    prompt_format,
    prompt_of,
)
from megatron_chameleon.inference.session import Session


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Path) -> Session:
    return Session.load(tiny_checkpoint.parents[1])


def parse(folder: Path, *messages: tuple[str, object]) -> Document:
    record = {"messages": [{"role": role, "content": content} for role, content in messages]}
    return parse_line(json.dumps(record).encode(), folder / "chat.jsonl", 1)


def test_a_prompt_is_the_beginning_of_the_document_that_answers_it(
    session: Session, tmp_path: Path
) -> None:
    """This includes images: wide ones are padded in prompts, and cropped in answers."""
    noise = np.random.default_rng(1).integers(256, size=(8, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    wide = {"type": "image", "image": "wide.png"}
    turns = [
        ("system", "a handwritten"),
        ("user", [wide, {"type": "text", "text": "one"}]),
        ("assistant", [{"type": "text", "text": "two"}, wide]),
        ("user", [{"type": "text", "text": "digit number"}, wide]),
    ]
    (token_ids,) = session.encode([chat_prompt(parse(tmp_path, *turns), session.tokenizer)])
    answered = parse(tmp_path, *turns, ("assistant", "seven"))
    block, _ = DocumentEncoder(session.tokenizer).encode([answered])
    answer = int(block.answers["start"][-1])
    assert block.token_ids[:answer].tolist() == token_ids
    assert token_ids[-1] == session.tokenizer.vocabulary.separator


def test_a_document_without_roles_is_one_question(session: Session, tmp_path: Path) -> None:
    line = json.dumps({"text": "digit number"}).encode()
    plain = parse_line(line, tmp_path / "x.jsonl", 1)
    asked = chat_prompt(plain, session.tokenizer)
    assert asked == chat_prompt(parse(tmp_path, ("user", "digit number")), session.tokenizer)
    (answer,) = session.generate([asked])
    assert answer.token_ids


def test_without_a_question(session: Session, tmp_path: Path) -> None:
    answered = parse(tmp_path, ("user", "one"), ("assistant", "two"))
    with pytest.raises(DataError, match=r"chat.jsonl:1: the last message is the assistant's, so"):
        chat_prompt(answered, session.tokenizer)
    with pytest.raises(
        DataError, match=r"--prompt: no prompt given\. Give a text, an image or both"
    ):
        chat_prompt(Document("", "", (), "--prompt"), session.tokenizer)


def test_in_a_document_the_turns_follow_one_another(session: Session, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 30, 3), dtype=np.uint8)).save(tmp_path / "wide.png")
    wide = {"type": "image", "image": "wide.png"}
    turns = [("user", [wide, {"type": "text", "text": "one"}]), ("assistant", "two"), ("user", "3")]
    talk = parse(tmp_path, *turns)
    plain = Document("", "", talk.content, "")
    form = PromptFormat.DOCUMENT
    (ids,) = session.encode([prompt_of(talk, session.tokenizer, form)])
    block, _ = DocumentEncoder(session.tokenizer).encode([plain])
    assert ids == block.token_ids.tolist()[:-1], "all but its </s>; the image is cropped too"
    assert prompt_of(talk, session.tokenizer, PromptFormat.CHAT) == chat_prompt(
        talk, session.tokenizer
    )


@pytest.mark.parametrize(("recorded", "form"), [(True, "chat"), (False, "document")])
def test_the_form_of_prompts_survives_conversions(
    tiny_checkpoint: Path, tmp_path: Path, recorded: bool | None, form: str
) -> None:
    source = tmp_path / "source" / "step_00000007"
    shutil.copytree(tiny_checkpoint, source)
    state = json.loads((source / "state.json").read_text())
    (source / "state.json").write_text(json.dumps({**state, "trained_on_conversations": recorded}))
    assert prompt_format(open_checkpoint(source)) == form
    for to in ("hf", "meta", "megatron", "deepspeed")[: 4 if recorded else 1]:
        convert(source, tmp_path / to, to, verify=False)
        source = tmp_path / to
        assert prompt_format(open_checkpoint(source)) == form, to
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ("| Prompts | conversations |" in card) is (recorded is True)
    assert Session.load(tmp_path / "hf").prompt_format == form


def test_folders_that_others_published_answer_conversations(
    tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """They are Meta's or made from Meta's, and converting them keeps that."""
    for to in ("hf", "meta"):
        folder = convert(tiny_checkpoint, tmp_path / to, to, verify=False).destination
        (folder / "chameleon.json").unlink()
        assert prompt_format(open_checkpoint(folder)) == "chat"
    ours = convert(tmp_path / "hf", tmp_path / "ours", "megatron", verify=False).destination
    assert prompt_format(open_checkpoint(ours)) == "chat"


def test_an_export_of_an_earlier_version_gets_documents(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = convert(tiny_checkpoint, tmp_path / "hf", "hf", verify=False).destination
    origin = json.loads((folder / "chameleon.json").read_text())
    del origin["trained_on_conversations"]
    (folder / "chameleon.json").write_text(json.dumps(origin))
    assert prompt_format(open_checkpoint(folder)) == "document"


def test_images_with_known_codes_stand_beside_others(session: Session, tmp_path: Path) -> None:
    noise = np.random.default_rng(2).integers(256, size=(8, 8, 3), dtype=np.uint8)
    image, other = Image.fromarray(noise), Image.new("RGB", (8, 8), "red")
    known = EncodedImage(b"never opened", codes=np.arange(16))
    (ids,) = session.encode([[other, known, image]])
    v = session.tokenizer.vocabulary
    blocks = [ids[1:19], ids[19:37], ids[37:]]
    assert blocks[1][1:-1] == v.codes_to_token_ids(np.arange(16)).tolist()
    assert blocks[0] == session.encode([[other]])[0][1:]
    assert blocks[2] == session.encode([[image]])[0][1:]
