"""Texts to train on: what ``preprocess`` reads and drops is read and dropped here too."""

import base64
import gzip
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_chameleon.data.preprocess.run import preprocess
from megatron_chameleon.data.tokenizer_corpus import texts
from megatron_chameleon.data.tokenizer_corpus.documents import DroppedDocuments
from megatron_chameleon.data.tokenizer_corpus.texts import read_texts
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.text.tokenizer import without_surrogates


def lines(*documents: object) -> bytes:
    return "".join(json.dumps(document) + "\n" for document in documents).encode()


def a_tar(*files: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def a_parquet(**columns: list) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


MESSAGES = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}]
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
FILES = {
    "bom.jsonl": b"\xef\xbb\xbf" + lines({"text": "first"}, {"text": "second"}),
    "surrogate.jsonl": b'{"text": "fine"}\n{"text": "lone \\ud800 surrogate"}\n',
    "bad_utf8.jsonl": b'{"text": "fine"}\n{"text": "bad \xff byte"}\n{"text": "more"}\n',
    "prompt_answer.jsonl": lines({"prompt": "question", "answer": "reply"}),
    "messages.jsonl": lines({"messages": MESSAGES}, {"messages": MESSAGES[:1]}, {"messages": []}),
    "text.jsonl.gz": gzip.compress(lines({"text": "packed"})),
    "cut.jsonl.gz": gzip.compress(lines({"text": "a" * 9}, {"text": "b"}))[:-12],
    "array.json": json.dumps([{"text": "one"}, {"text": 2}, {"text": "three"}]).encode(),
    "pairs.tar": a_tar(
        *(("k.png", PICTURE), ("k.txt", b"caption"), ("l.png", PICTURE)),
        *(("l.json", b'{"caption": "other"}'), ("m.png", PICTURE), ("m.txt", b"\xff")),
    ),
    "rows.parquet": a_parquet(text=["row", None, "last"]),
    "broken.parquet": b"PAR1 and nothing else",
    "empty.jsonl": b"",
    "odd.jsonl": b'[1]\n{"title": "x"}\nnull\n{"content": "x"}\n{"content": [{"type": "text"}]}\n{'
    + lines({"id": ["x"], "source": {"name": "web"}, "text": "kept"}),
    "utf16.jsonl": '{"text": "wide"}\n'.encode("utf-16"),
    "deep.jsonl": b'{"text": ' + b"[" * 9999 + b"]" * 9999 + b"}\n" + lines({"text": "after"}),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def kept_tokens(prefix: Path, tokenizer) -> list[str]:
    """The text of the documents in a token file, decoded."""
    from megatron_chameleon.data.token_files.reader import open_token_file

    file = open_token_file(prefix, tokenizer)
    vocabulary = tokenizer.vocabulary
    control = {vocabulary.bos, vocabulary.eos, vocabulary.separator, vocabulary.begin_image}
    control |= {vocabulary.end_image, *vocabulary.code_token_ids.tolist()}
    ids = [[i for i in file.read(d).tolist() if i not in control] for d in range(len(file))]
    return [tokenizer.text.decode(document) for document in ids]


def outcome(work) -> str:
    """The error that a file as a whole gives; empty if it gives none."""
    try:
        work()
    except DataError as error:
        return error.what
    return ""


@pytest.mark.parametrize("name", FILES)
def test_the_same_documents_are_kept_and_dropped_as_by_preprocess(
    corpus: Path, tmp_path: Path, tokenizer, name: str
) -> None:
    dropped = DroppedDocuments()
    found: list[str] = []
    fault = outcome(lambda: found.extend(read_texts([corpus / name], dropped)))
    expected = outcome(lambda: preprocess([corpus / name], tokenizer.folder, tmp_path / "t"))
    dropped.write(tmp_path / "list")
    theirs = tmp_path / "t.dropped.jsonl"
    if expected and not theirs.exists():  # nothing is left, so there is no token file
        assert fault or found == [], f"preprocess says {expected}"
        return
    assert (fault, expected) == ("", "")
    assert (tmp_path / "list").exists() == theirs.exists()
    if theirs.exists():
        assert (tmp_path / "list").read_text() == theirs.read_text()
    trained = "".join(without_surrogates(text) for text in found)
    assert trained == "".join(kept_tokens(tmp_path / "t", tokenizer))


def test_lines_of_text_files_are_read_with_globs_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("first line\n\n  second ü\r\nlast", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark\n")
    (tmp_path / "c.jsonl").write_bytes(lines({"text": "plain\ntext"}, {"content": []}))
    found = read_texts([tmp_path / "*.txt", str(tmp_path / "*.jsonl")])
    assert list(found) == ["with a mark", "first line", "", "  second ü", "last", "plain\ntext"]


def test_a_line_that_is_not_text_is_dropped_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "READ_BYTES", 4)
    dropped = DroppedDocuments()
    (tmp_path / "a.txt").write_bytes("übergröße\n".encode() + b"bad \xff byte\nend \xc3")
    assert "".join(read_texts([tmp_path / "a.txt"], dropped)) == "übergrößebad end "
    assert dropped.reasons == {"broken document": 2}
    assert dropped.first == f"{tmp_path}/a.txt:2: is not UTF-8 (invalid start byte)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"x", r"a.xlsx: unknown kind of file. Pass a .jsonl, .json, .*"),
        ("a", b"x", r"a: unknown kind of file"),
        ("a.txt", "wide".encode("utf-16"), r"a.txt: is UTF-16. Convert it to UTF-8"),
        ("none.txt", None, r"none.txt: no such file"),
        ("none*.txt", None, r"matches no file"),
        ("none.jsonl", None, r"none.jsonl: no such file"),
        ("folder.txt", b"", r"folder.txt: cannot be read \(Is a directory\)"),
        ("fifo.txt", b"", r"fifo.txt: cannot be read \(not a regular file\)"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    elif name.startswith("fifo"):
        os.mkfifo(tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_texts([tmp_path / name]))


def test_the_key_weight_is_not_reported_and_others_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a", "weight": 2, "url": "x"}))
    dropped = DroppedDocuments()
    assert list(read_texts([tmp_path / "a.jsonl"], dropped)) == ["a"]
    assert dropped.unused_keys.names == {"url"}


@pytest.mark.parametrize("error", [DataError("a", "b", "c"), KeyboardInterrupt(), ValueError("x")])
def test_an_exception_inside_the_trainer_is_raised_as_it_is(
    tmp_path: Path, error: BaseException
) -> None:
    from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

    def failing() -> Iterator[str]:
        yield from ["a handwritten seven"] * 20
        raise error

    with pytest.raises(type(error)) as caught:
        train_text_tokenizer(failing(), tmp_path, vocab_size=340, image_codes=32)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
