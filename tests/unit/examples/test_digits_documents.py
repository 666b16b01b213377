"""The demo's documents: texts name the right digits, and held-out digits stay held out."""

import hashlib
import importlib.util
import json
import re
import sys

import numpy as np
import pytest

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.parse import read_documents
from megatron_chameleon.data.documents.schema import TextPart
from places import REPOSITORY

SCRIPT = REPOSITORY / "examples" / "digits" / "make_documents.py"
FILES = ("pairs", "sums", "text", "chats", "quality", "heldout")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS += ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")

DIGIT = rf"\b(?:{'|'.join(WORDS[:10])}|\d)\b"
NUMBER = rf"\b(?:{'|'.join(WORDS)})\b"


def make(output, *options):
    sys.path.insert(0, str(SCRIPT.parent))  # as when the script is run
    try:
        load().main(
            [
                "--output",
                str(output),
                *("--sums", "200", "--texts", "200", "--chats", "400"),
                *options,
            ]
        )
    finally:
        sys.path.remove(str(SCRIPT.parent))


def load():
    spec = importlib.util.spec_from_file_location("make_documents", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    output = tmp_path_factory.mktemp("digits")
    make(output, "--variants", "2")
    return output


def records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def parts_of(record):
    return [part for m in record.get("messages", [record]) for part in m["content"]]


def text_of(record):
    return "".join(part.get("text", "#") for part in record["content"])


def read_digit(text):
    """The first digit of a caption, read as a scorer would."""
    found = re.search(r"\b(?:" + "|".join(WORDS[:10]) + r")\b|\d", text.lower())[0]
    return int(found) if found.isdigit() else WORDS.index(found)


@pytest.mark.parametrize("name", ["pairs", "quality", "heldout"])
def test_first_digit_of_a_caption_names_the_picture(digits, name):
    for record in records(digits, name):
        assert read_digit(text_of(record)) == record["label"], record


def test_sums_are_right(digits):
    labels = {r["content"][0]["image"]: r["label"] for r in records(digits, "heldout")}
    for record in records(digits, "pairs"):
        (image,) = [part["image"] for part in record["content"] if part["type"] == "image"]
        labels[image] = record["label"]
    for record in records(digits, "sums"):
        images = [part["image"] for part in record["content"] if part["type"] == "image"]
        total = sum(labels[image] for image in images)
        assert len(images) == 2 and record["labels"] == [*(labels[i] for i in images), total]
        assert re.findall(rf"\b(?:{'|'.join(WORDS)})\b", text_of(record)) == [WORDS[total]]


def labels_of(folder):
    return {
        part["image"]: record["label"]
        for record in records(folder, "pairs")
        for part in record["content"]
        if part["type"] == "image"
    }


def turns_of(digits):
    """The record, the user's message and the answer, for each answer."""
    for record in records(digits, "chats"):
        messages = record["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2), record
        for place in range(0, len(messages), 2):
            yield record, messages[place], messages[place + 1], place


def images_of(message):
    return [part["image"] for part in message["content"] if part["type"] == "image"]


def test_answers_in_conversations_are_right(digits):
    """What the model says of a picture is its digit, and what it draws is what was asked for."""
    labels, checked = labels_of(digits), dict.fromkeys(("read", "drawn", "asked", "sum"), 0)
    last = None
    for record, user, answer, place in turns_of(digits):
        words, shown, drawn = text_of(answer), images_of(user), images_of(answer)
        last = last if place else None
        if shown:
            last = labels[shown[0]]
            assert not drawn and read_digit(words) == last, record
            checked["read"] += 1
        elif drawn:
            last = labels[drawn[0]]
            wanted = set(re.findall(DIGIT, text_of(user).lower())) - {"one"}  # "another one"
            assert {read_digit(name) for name in wanted} <= {last}, record
            assert words == "#" or read_digit(words) == last, record
            checked["asked"] += len(wanted)
            checked["drawn"] += 1
        elif words.startswith("I drew"):
            assert read_digit(words) == last, record
        elif " plus " in words:
            left, right, total = map(WORDS.index, re.findall(NUMBER, words.lower()))
            assert left + right == total, record
            checked["sum"] += 1
    assert min(checked.values()) > 40, checked


def test_conversations_are_varied(digits):
    """Hardly any request is written twice, and all styles of writing occur."""
    asked = [text_of(user) for _, user, answer, _ in turns_of(digits) if images_of(answer)]
    assert len(set(asked)) > 0.7 * len(asked)
    for style in (
        r"^[a-z]",
        r"^[A-Z][a-z]",
        r"^[A-Z !?.,0-9]+$",
        r"\?$",
        r"\d",
        r"please",
        r"seven",
    ):
        assert sum(bool(re.search(style, words)) for words in asked) > 5, style


def test_held_out_digits_are_in_no_training_document(digits):
    heldout = {part["image"] for r in records(digits, "heldout") for part in r["content"][:1]}
    assert len(heldout) == round(0.2 * 1797)
    pixels = set()
    for image in heldout:
        pixels.add(hashlib.sha256((digits / image).read_bytes()).hexdigest())
    seen = set()
    for name in FILES[:-1]:
        for record in records(digits, name):
            images = [part["image"] for part in parts_of(record) if part["type"] == "image"]
            assert not heldout & set(images)
            seen |= {hashlib.sha256((digits / image).read_bytes()).hexdigest() for image in images}
    assert not pixels & seen


def test_same_seed_same_bytes_and_the_split_does_not_move(digits, tmp_path):
    make(tmp_path / "again", "--variants", "2")
    make(tmp_path / "other", "--variants", "2", "--seed", "2")
    for path in sorted(digits.rglob("*.*")):
        name = path.relative_to(digits)
        assert (tmp_path / "again" / name).read_bytes() == path.read_bytes(), name
    for name, same in (("heldout", True), ("pairs", False), ("sums", False), ("chats", False)):
        other = (tmp_path / "other" / f"{name}.jsonl").read_bytes()
        assert (other == (digits / f"{name}.jsonl").read_bytes()) is same, name


def test_variants_differ_from_the_digit_but_not_much(digits):
    """A variant moves the black ink, so its pixels differ but the amount of ink hardly changes."""
    documents = list(read_documents([digits / "pairs.jsonl"]))
    images = {}
    for document in documents:
        (part,) = [part for part in document.content if isinstance(part, ImagePart)]
        images[document.id] = 255 - np.asarray(part.open(), dtype=float)
    ratios = []
    for identity, image in images.items():
        if identity.endswith("-0"):
            variant = images[identity[:-1] + "1"]
            assert image.shape == (16, 16, 3) and np.abs(image - variant).max() > 20
            ratios.append(variant.sum() / image.sum())
    # The scale is 0.9 to 1.1, so the area is 0.81 to 1.21. Ink at the edge may leave the picture.
    assert min(ratios) > 0.7 and max(ratios) < 1.3
    assert 0.9 < np.mean(ratios) < 1.1


def test_all_files_are_documents(digits):
    for name, kinds in zip(
        FILES,
        [{TextPart} if name == "text" else {TextPart, ImagePart} for name in FILES],
        strict=True,
    ):
        documents = list(read_documents([digits / f"{name}.jsonl"]))
        assert len({document.id for document in documents}) == len(documents) > 0
        assert {type(part) for document in documents for part in document.content} == kinds


def test_corpus_is_the_text_of_the_training_documents(digits):
    lines = (digits / "corpus.txt").read_text().splitlines()
    parts = [
        part["text"]
        for name in FILES[:-1]
        for record in records(digits, name)
        for part in parts_of(record)
        if part["type"] == "text"
    ]
    assert lines == parts


def test_options_that_cannot_work(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        make(tmp_path, "--size", "4")
    assert caught.value.code == 2 and "and --size at least 8" in capsys.readouterr().err
