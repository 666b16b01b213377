"""Prompts are encoded in the format of fine-tuning."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.data.documents.records import parse_line
from megatron_chameleon.data.documents.schema import Document
from megatron_chameleon.data.preprocess.encode import DocumentEncoder
from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.chat import chat_prompt
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
