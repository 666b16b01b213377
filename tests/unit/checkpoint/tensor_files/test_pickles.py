"""Pickles that ask for code, for all of the memory or for endless work are refused at once."""

import pickle
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chameleon.checkpoint.tensor_files.pickles import BoundedUnpickler, is_small


def resolve(module: str, name: str) -> Any:
    if (module, name) == ("torch", "Size"):
        return torch.Size
    raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load(content: bytes) -> Any:
    return BoundedUnpickler(content, resolve).load()


@pytest.fixture(autouse=True)
def quick_and_small() -> Iterator[None]:
    """No test of this file may take three seconds or 1 GiB."""
    started = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - started < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # in KiB


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_those_that_pickle_reads(protocol: int) -> None:
    shared = [1, -1, 255, 256, 70_000, -(2**31), 2**40, 2**80, True, None, 0.5, float("inf")]
    value = {
        "list": shared,
        "again": shared,
        "texts": ("", "é", "x" * 300, "\ud800"),
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        ("a", 1): {"nested": {}},
        "size": torch.Size([2, 3]),
    }
    assert load(pickle.dumps(value, protocol)) == value
    found = load(pickle.dumps(value, protocol))
    assert found["list"] is found["again"]


@pytest.mark.parametrize("protocol", [4, 5])
def test_sets_and_bytes(protocol: int) -> None:
    value = [{1, "two"}, frozenset({3}), b"", b"x" * 300]
    assert load(pickle.dumps(value, protocol)) == value


def deep_tuple(levels: int) -> bytes:
    """A tuple that contains another one twice, and so on; its hash takes 2^levels steps."""
    return b")" + b"".join(b"q\0h\0\x86" for _ in range(levels))


HOSTILE = {
    "a deep tuple as a key": (b"}" + deep_tuple(60) + b"Ns.", "a key or an argument of more than"),
    "a deep tuple in a set": (b"\x8f(" + deep_tuple(60) + b"\x90.", "a key or an argument"),
    "a deep tuple in a frozen set": (b"(" + deep_tuple(60) + b"\x91.", "a key or an argument"),
    "a deep tuple as an argument": (
        b"ctorch\nSize\n" + deep_tuple(60) + b"\x85R.",
        "a key or an argument",
    ),
    "a memo index of 2^31": (b"Nr\xff\xff\xff\x7fh\0.", r"damaged: KeyError"),
    "a text of 2^62 bytes": (b"\x8d" + struct.pack("<Q", 2**62) + b"x.", "ends after"),
    "bytes of 2^62 bytes": (b"\x8e" + struct.pack("<Q", 2**62) + b"x.", "ends after"),
    "a bytearray": (b"\x96" + struct.pack("<Q", 2**40) + b"x.", r"the opcode b'\\x96'"),
    "sets without end": (b"(" + b"\x8f" * 4_000_000 + b"t.", "more than 128 MiB"),
    "dicts without end": (b"(" + b"}" * 4_000_000 + b"t.", "more than 128 MiB"),
    "another memo entry for each byte": (b"N" + b"\x94" * 4_000_000 + b".", "more than 128 MiB"),
    "no end": (b"N", "ends after 1 bytes"),
    "nothing": (b"", "ends after 0 bytes"),
    "an empty stack": (b".", "damaged: IndexError"),
    "no mark": (b"NNt.", "a mark is missing"),
    "a mark as a value": (b"(q\0.", "damaged"),
    "a global": (b"cos\nsystem\n.", r"it asks for os\.system"),
    "a global of protocol 4": (b"\x8c\x02os\x8c\x06system\x93.", r"it asks for os\.system"),
    "a global of a long name": (b"c" + b"x" * 10**6 + b"\nsystem\n.", "damaged"),
    "an extension": (b"\x82\x01.", r"the opcode b'\\x82'"),
    "a persistent id": (b"NQ.", "it has persistent ids"),
    "an object without a class": (b"N)R.", "damaged: TypeError"),
    "attributes of a class": (b"ctorch\nSize\n}b.", "damaged: TypeError"),
    "an instance of protocol 0": (b"(ios\nsystem\n.", r"the opcode b'i'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name: str) -> None:
    content, message = HOSTILE[name]
    with pytest.raises(pickle.UnpicklingError, match=message):
        load(content)


def test_a_list_that_contains_itself_is_not_small() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert not is_small(endless)
    assert not is_small({"key": ({"inner": endless},)})
    assert is_small(("name", torch.Size([1, 2]), None))


def test_code_is_not_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    for protocol in (2, 4):
        with pytest.raises(pickle.UnpicklingError, match="it asks for"):
            load(pickle.dumps(Runs(), protocol))
    assert list(tmp_path.iterdir()) == []
