"""Damage one file of a checkpoint: as a disk does, as a clumsy exporter does, and as an attacker.

``mutate`` chooses by the file's kind. Half of the changes keep the file well-formed and replace a
value in it, because random bytes seldom get past the parser.
"""

import dataclasses
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from damage import damage

VALUES: tuple[Any, ...] = (
    *(None, -1, 0, 1, 3, 2**31, 2**53, 2**63, 10**8, 10**18, 10**30, -(10**30), 1e30, 0.5, True),
    *(
        float("nan"),
        float("inf"),
        "nan",
        "",
        "5",
        "../x",
        "/etc/passwd",
        "a\nb\x1b[31m",
        "x" * 5000,
    ),
    *([], {}, [1], {"a": 1}, [[[[]]]], ["x"] * 300),
)
TEXTS = (
    "[" * 100_000,
    "{" * 1000,
    '{"a":' * 70 + "1" + "}" * 70,
    "null",
    "5",
    "\ufeff{}",
    "",
    "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n",
    "model: {num_layers: ${oc.env:HOME}}\n",
    "model: ${oc.create:{num_layers:3}}\n",
    "tokenizer: {path: '${oc.decode:${oc.env:HOME}}'}\n",
    "model: !!python/object/apply:os.system ['true']\n",
    "x: " + "${x}" * 50,
    "9" * 10_000,
)
PICKLES = (
    b"}" + b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"Ns.",
    b"(" + b"]" * 3_000_000 + b"t.",
    b"cposix\nsystem\nX\4\0\0\0true\x85R.",
    b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R.",
    b"Nr\xff\xff\xff\x7f.",
    b"]q\0h\0a.",
    b"\x80\x04N.",
)


def mutate(path: Path, rng: random.Random) -> str:
    """Change a file in place.

    Returns:
        What was done.
    """
    if rng.random() < 0.04:
        return _replace_by_other_kind(path, rng)
    if rng.random() < 0.45:
        content = damage(path.read_bytes(), rng)
        path.write_bytes(content)
        return "bytes"
    if path.suffix == ".json":
        return _mutate_text(path, rng, json.loads, json.dumps)
    if path.suffix == ".yaml":
        return _mutate_text(path, rng, yaml.safe_load, yaml.safe_dump)
    if path.name == ".metadata":
        return _mutate_metadata(path, rng)
    if path.suffix in (".pth", ".pt", ".ckpt"):
        return _mutate_archive(path, rng)
    if path.suffix == ".safetensors":
        return _mutate_header(path, rng)
    path.write_bytes(rng.choice((b"", b"../x", b"\0", b"x" * 10_000, b"a\nb", b"global_step9")))
    return "text"


def _replace_by_other_kind(path: Path, rng: random.Random) -> str:
    """A FIFO, a folder, a link, a device, a file without bytes or of 100 GiB, or nothing."""
    content = path.read_bytes()
    path.unlink()
    kind = rng.choice(("fifo", "folder", "loop", "device", "empty", "huge", "missing", "link"))
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "empty":
            path.touch()
        case "huge":
            path.write_bytes(content)
            os.truncate(path, 100 << 30)
        case "link":  # as Hugging Face's cache has it: this one is sound
            blob = path.with_name("blob" + path.name.strip("."))
            blob.write_bytes(content)
            path.symlink_to(blob)
    return kind


def _mutate_text(path: Path, rng: random.Random, load: Any, dump: Any) -> str:
    if rng.random() < 0.15:
        path.write_text(rng.choice(TEXTS))
        return "text"
    value = load(path.read_text())
    done = mutate_value(value, rng)
    text = dump(value)
    if rng.random() < 0.05 and path.suffix == ".json":
        text = text.replace("{", '{"step": 1, "step": 2, ', 1)
    path.write_text(text)
    return done


def mutate_value(value: Any, rng: random.Random) -> str:
    """Change one entry of nested dicts and lists; the first ones more often than others."""
    places = list(_places(value))
    if not places:
        return "nothing"
    container, key = places[min(rng.randrange(len(places)), rng.randrange(len(places)))]
    old = container[key]
    match rng.randrange(6):
        case 0:
            del container[key]
            return f"{key} removed"
        case 1 if isinstance(old, int) and not isinstance(old, bool):
            container[key] = old * rng.choice((-1, 2, 10**6)) + rng.choice((-1, 0, 1))
        case 2 if isinstance(container, dict):
            container[rng.choice(("x", "num_layers", "step", "a\nb"))] = container.pop(key)
        case _:
            container[key] = rng.choice(VALUES)
    return f"{key} changed"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in list(entries)[:200]:
        yield value, key
        if isinstance(entry, dict | list) and entry:
            yield from _places(entry)


def _mutate_metadata(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.2:
        path.write_bytes(rng.choice(PICKLES))
        return "pickle"
    metadata = pickle.loads(path.read_bytes())
    chosen = rng.choice(list(metadata.storage_data.values()))
    item = rng.choice([i for i in metadata.state_dict_metadata.values() if vars(i)])
    target = rng.choice((metadata, chosen, item, rng.choice(item.chunks), item.properties))
    name = rng.choice(list(vars(target)))
    old = getattr(target, name)
    new: Any = rng.choice(VALUES)
    if isinstance(old, tuple) and rng.random() < 0.7:
        new = type(old)(n * rng.choice((1, 1, 2, 10**9)) for n in old)
    if dataclasses.is_dataclass(target):
        object.__setattr__(target, name, new)
    try:
        path.write_bytes(pickle.dumps(metadata))
    except (AttributeError, TypeError, RuntimeError, pickle.PicklingError, KeyError):
        return "nothing"
    return f"{type(target).__name__}.{name}"


def _mutate_archive(path: Path, rng: random.Random) -> str:
    with zipfile.ZipFile(path) as old:
        records = {record.filename: _raw(path, record) for record in old.infolist()}
    name = rng.choice([*[n for n in records if n.endswith("data.pkl")] * 4, *records])
    what = rng.choice(("damage", "damage", "remove", "replace", "compress", "twice"))
    if what == "damage":
        records[name] = damage(records[name], rng)
    elif what == "remove":
        del records[name]
    elif what == "replace":
        records[name] = rng.choice(PICKLES)
    compression = zipfile.ZIP_DEFLATED if what == "compress" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", compression) as new:
        for record, content in records.items():
            new.writestr(record, content)
        if what == "compress":
            new.writestr("archive/data/99", bytes(50_000_000))
    return f"{what} {name}"


def _raw(path: Path, record: zipfile.ZipInfo) -> bytes:
    """A record's bytes; their checksum may be that of an empty record."""
    with path.open("rb") as file:
        file.seek(record.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra, 1)
        return file.read(record.file_size)


def _mutate_header(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if rng.random() < 0.2:
        number = rng.choice((0, 1, length - 1, 2**31, 2**62, 2**63, 2**64 - 1))
        path.write_bytes(number.to_bytes(8, "little") + content[8:])
        return "length"
    done = mutate_value(header, rng)
    text = json.dumps(header)
    if rng.random() < 0.1:
        name = next(iter(header), "x")
        text = f'{{"{name}": {json.dumps(header.get(name))}, {text[1:]}'
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)
    return done
