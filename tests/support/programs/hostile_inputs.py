"""Inputs that somebody has made to hurt: containers, bombs, references, shapes and pictures.

``fuzz_inputs.py`` reads them beside damaged files. Each is made from a seed.
"""

import base64
import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

SIZES = (0, 1, 511, 512, 1 << 20, 1 << 33, (1 << 63) - 1, 1 << 80)
HOSTS = ("ftp", "http", "HTTPS", "s3", "hf", "webhdfs", "simplecache::ftp", "zip://a::http", "gs")
PLACES = (
    *("/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "/proc/self/environ", "/dev/zero"),
    *(
        "/dev/stdin",
        "fifo.png",
        "loop.png",
        ".",
        "",
        "a\0b",
        "\ud800",
        "x" * 9000,
        "/proc/self/fd/3",
    ),
    *("data:image/png;base64,AAAA", "data:,x", "data:image/png;base64,!!", "image.png", "%2e%2e/x"),
    "/proc/self/fd/3",
)
KEYS = (
    *("content", "text", "messages", "conversations", "prompt", "answer", "question", "images"),
    *("image", "texts", "caption", "instruction", "input", "output", "id", "source", "type"),
    *("role", "from", "value", "image_url", "url", "bytes", "path", "audio", "extra", ""),
)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "YCbCr", "LAB", "HSV")


def hostile_file(folder: Path, rng: random.Random) -> Path:
    """Write one hostile input; returns its path."""
    kind = rng.choice(sorted(_MAKERS))
    content = _MAKERS[kind](rng)
    if not (folder / "fifo.png").exists():
        os.mkfifo(folder / "fifo.png")
        (folder / "loop.png").symlink_to("loop.png")
        Image.new("RGB", (9, 9)).save(folder / "image.png")
    path = folder / f"hostile{kind.partition(' ')[2]}"
    path.write_bytes(content)
    return path


def _lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _reference(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return f"{rng.choice(HOSTS)}://127.0.0.1:9/{rng.randrange(99)}.png"
    return rng.choice(PLACES)


def _references(rng: random.Random) -> bytes:
    part = lambda: {"type": "image", "image": _reference(rng)}
    return _lines([{"content": [part() for _ in range(rng.randint(1, 4))]} for _ in range(5)])


def _value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(9)
    if depth > 0 and kind < 3:
        keys = rng.sample(KEYS, rng.randint(0, 4))
        return {key: _value(rng, depth - 1) for key in keys}
    if depth > 0 and kind < 5:
        return [_value(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    words = ("user", "assistant", "system", "human", "text", "image", "<image>", "\ufeff", "")
    numbers = (None, True, 0, -1, 1 << 70, 1e308, float("nan"), float("inf"))
    return rng.choice((rng.choice(words), rng.choice(numbers), _reference(rng), "word " * 9))


def _shapes(rng: random.Random) -> bytes:
    return _lines([_value(rng, rng.choice((1, 2, 3, 5))) for _ in range(20)])


def _array(rng: random.Random) -> bytes:
    records = [_value(rng, 3) for _ in range(9)]
    content = json.dumps(records, indent=rng.choice((None, 1))).encode()
    return content[: rng.choice((None, len(content) // 2))] + rng.choice((b"", b"\n", b"]", b"x"))


def _deep(rng: random.Random) -> bytes:
    depth = rng.choice((100, 2000, 1_000_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"content":[', b"]}")))
    return opening * depth + b"1" + closing * depth + b"\n" + b'{"id":' + b"9" * depth + b"}\n"


def _bomb(rng: random.Random) -> bytes:
    # what is many records takes the time of many records
    unit, count = rng.choice(
        ((b"\0", 64), (b"x", 64), (b"\n", 24), (b"{}\n", 0.03), (b"[],", 0.03), (b",", 1))
    )
    return rng.choice((b"", b'{"text": "', b"[")) + unit * int(count * (1 << 20))


def _header(rng: random.Random, name: str, size: int, kind: bytes) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT, errors="replace"))
    block[124:136] = b"\x80" + size.to_bytes(11, "big")
    if rng.random() < 0.1:
        block[rng.randrange(512)] ^= 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _tar(rng: random.Random) -> bytes:
    content = b""
    for _ in range(rng.choice((1, 5, 50))):
        kind = rng.choice(
            (b"0", b"0", b"0", b"x", b"g", b"L", b"K", b"S", b"5", b"2", b"V", b"\xff")
        )
        size = rng.choice((0, 1, 600, 600, 600, rng.choice(SIZES)))
        names = (
            "a.png",
            "a.txt",
            "b.json",
            "._a.png",
            "__MACOSX/a",
            "../../x.png",
            "/etc/a.txt",
            "",
        )
        data = rng.choice((b"9 path=a.txt\n", b"99999999999 size=-1\n", b"12 size=1e9\n", b"\xff"))
        content += _header(rng, rng.choice(names), size, kind)
        content += (data * 700)[: min(size, 4096)].ljust(-(-min(size, 4096) // 512) * 512, b"\0")
    return content + rng.choice((b"", bytes(1024), b"garbage"))


def _parquet(rng: random.Random) -> bytes:
    rows = rng.choice((1, 3, 20))
    nulls = rng.choice((0, 10, 2_000_000))
    columns = {
        "text": pyarrow.array([rng.choice(("a", None, "x" * 9000)) for _ in range(rows)]),
        "image": pyarrow.array(
            [{"bytes": b"no", "path": _reference(rng).replace("\ud800", "")}] * rows
        ),
        "images": pyarrow.array(
            [[None] * nulls] + [[]] * (rows - 1), pyarrow.list_(pyarrow.null())
        ),
        "texts": pyarrow.array([["a", None]] * rows),
        "messages": pyarrow.array([[{"role": "user", "content": "x"}]] * rows),
        "long": pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * rows, pyarrow.int32()), ["x" * rng.choice((1, 1 << 20, 30 << 20))]
        ),
    }
    named = rng.sample(sorted(columns), rng.randint(1, 4))
    sink = io.BytesIO()
    table = pyarrow.table({("text" if n == "long" else n): columns[n] for n in named})
    pyarrow.parquet.write_table(table, sink, compression="zstd", row_group_size=rng.choice((1, 99)))
    return sink.getvalue()


def _pictures(rng: random.Random) -> bytes:
    documents = []
    for _ in range(4):
        size = rng.choice(((1, 1), (7, 5), (1, 3000), (900, 700)))
        image = Image.fromarray(np.full((size[1], size[0]), rng.randrange(256), np.uint8))
        buffer = io.BytesIO()
        try:
            options = rng.choice(({}, {"transparency": 0}, {"icc_profile": b"x" * 200}))
            image.convert(rng.choice(MODES)).save(
                buffer, rng.choice(("png", "tiff", "gif")), **options
            )
        except (OSError, ValueError, TypeError):
            image.save(buffer, "png")
        data = bytearray(buffer.getvalue())
        if rng.random() < 0.5:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        uri = "data:image/png;base64," + base64.b64encode(bytes(data)).decode()
        documents.append({"content": [{"type": "image", "image": uri}]})
    return _lines(documents)


def _zstd(content: bytes) -> bytes:
    packed: bytes = pyarrow.compress(content, "zstd", asbytes=True)
    return packed


_MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "references .jsonl": _references,
    "shapes .jsonl": _shapes,
    "shapes .json.gz": lambda rng: gzip.compress(_array(rng)),
    "array .json": _array,
    "deep .jsonl": _deep,
    "deep .json.zst": lambda rng: _zstd(_deep(rng)),
    "bomb .jsonl.gz": lambda rng: gzip.compress(_bomb(rng), 1) + rng.choice((b"", b"\0", b"x")),
    "bomb .json.zst": lambda rng: _zstd(_bomb(rng)),
    "bomb .tar.zst": lambda rng: _zstd(_tar(rng) + _bomb(rng)),
    "tar .tar": _tar,
    "tar .tar.gz": lambda rng: gzip.compress(_tar(rng)) + bytes(rng.choice((0, 7))),
    "parquet .parquet": _parquet,
    "pictures .jsonl": _pictures,
}
