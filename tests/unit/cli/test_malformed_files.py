"""Each verb on malformed versions of each file that it reads: a result or one line, never a crash.

A row of ``READS`` is a command and the files that it reads. Each file is replaced by everything of
``malformed`` in turn. The verbs run in this process, where an unexpected exception fails the test.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from PIL import Image

from megatron_chameleon.cli.main import main
from megatron_chameleon.data.preprocess.run import preprocess

LONGEST_SECONDS = 10
CONFIG = """
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, seq_length: 64}
tokenizer: {path: tokenizer}
data: {stage1: [{prefix: tokens, weight: 1.0}]}
optimizer: {lr_warmup_steps: 1}
training: {steps: 4, micro_batch_size: 1, global_batch_size: 2}
logging: {run_dir: run}
"""
TEXT = ("tokenizer", "text", "--output", "new", "--vocab-size", "400", "--image-codes", "4")
INSPECT = ("inspect", "tokens", "--verify", "--html", "page.html", "--documents", "1")
TOKEN_FILES = [f"tokens.{suffix}" for suffix in ("json", "idx", "bin", "documents", "images")]
TOKENIZER = ["vocabulary.json", "text.model", "image.json", "image.safetensors"]
READS: list[tuple[tuple[str, ...], list[str]]] = [
    (INSPECT, TOKEN_FILES + [f"tokenizer/{name}" for name in TOKENIZER]),
    (("inspect", "train.yaml"), ["train.yaml", "tokens.idx"]),
    (("data", "audit", "train.yaml", "--step", "1"), ["train.yaml", "tokens.documents"]),
    (("config", "check", "train.yaml"), ["train.yaml"]),
    (("plan", "train.yaml", "--gpus", "8", "--gpu", "h200"), ["train.yaml"]),
    (("plot", "metrics.jsonl", "--keys", "loss", "--output", "a.svg"), ["metrics.jsonl"]),
    ((*TEXT, "documents.jsonl"), ["documents.jsonl"]),
    ((*TEXT, "lines.txt"), ["lines.txt"]),
    (("preprocess", "documents.jsonl", "--tokenizer", "tokenizer", "--output", "new/t"),
     ["documents.jsonl", "tokenizer/vocabulary.json"]),
]  # fmt: skip


def malformed(content: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Names and contents of the replacements of a file; None is not a regular file."""
    yield from (("empty", b""), ("one byte", b"x"), ("half", content[: len(content) // 2]))
    yield from (("one byte less", content[:-1]), ("twice", content * 2))
    yield from (("random", rng.randbytes(500)), ("null bytes", bytes(len(content))))
    yield from ((text, text.encode()) for text in ("[]", '"x"', "3", "null", "{}", "true", "1e999"))
    yield from (("deep list", b"[" * 9999), ("deep object", b'{"a":' * 5000 + b"1" + b"}" * 5000))
    yield "UTF-16", content[:9999].decode("latin-1").encode("utf-16")
    yield "byte order mark", b"\xef\xbb\xbf" + content
    for number in range(3):
        changed = bytearray(content)
        for _ in range(3):
            changed[rng.randrange(min(len(changed), 999))] = rng.randrange(256)
        yield f"change {number}", bytes(changed)
    yield from ((name, None) for name in ("folder", "FIFO", "loop", "missing", "endless"))


def replace(path: Path, name: str, content: bytes | None) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif os.path.lexists(path):
        path.unlink()
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    elif name == "FIFO":
        os.mkfifo(path)
    elif name == "loop":
        path.symlink_to(path.name)
    elif name == "endless":
        path.symlink_to("/dev/zero")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A folder with everything that the commands read; tests copy it."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_tokenizer, folder / "tokenizer")
    Image.new("RGB", (8, 8), "red").save(folder / "0.png")
    picture = {"type": "image", "image": "0.png"}
    documents = [{"content": [picture, {"type": "text", "text": f"number {i}"}]} for i in range(9)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "lines.txt").write_text("a line of text\n" * 9)
    records = [{"step": step, "loss": 5 / step} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "train.yaml").write_text(CONFIG)
    preprocess([folder / "documents.jsonl"], folder / "tokenizer", folder / "tokens")
    sidecar = (folder / "tokens.json").read_text()
    (folder / "tokens.json").write_text(sidecar.replace(str(folder / "tokenizer"), "tokenizer"))
    return folder


def stop(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"no end after {LONGEST_SECONDS} s")


ROWS = [(words, name) for words, names in READS for name in names]


@pytest.mark.parametrize(("words", "name"), ROWS, ids=[f"{w[0]}-{w[1]}-{n}" for w, n in ROWS])
def test_a_malformed_file_is_one_line(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    name: str,
) -> None:
    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    path = Path(name)
    content = path.read_bytes()
    handler = signal.signal(signal.SIGALRM, stop)
    for kind, replacement in malformed(content, random.Random(name)):
        replace(path, kind, replacement)
        shutil.rmtree("new", ignore_errors=True)
        signal.alarm(LONGEST_SECONDS)
        try:
            main(list(words))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException as error:
            raise AssertionError(f"{kind}: {type(error).__name__}: {error}") from error
        finally:
            signal.alarm(0)
        errors = capsys.readouterr().err
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code in (0, 2) and "Traceback" not in errors, f"{kind}: {code}, {errors}"
        assert (len(lines) >= 1) == (code == 2), f"{kind}: {code}, {errors}"
        assert all(len(line) < 1500 for line in lines), f"{kind}: {errors}"
    signal.signal(signal.SIGALRM, handler)
