"""What torch wrote is found where torch finds it; archives that are bombs are refused."""

import os
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chameleon.checkpoint.tensor_files.pth import PthFile, create_pth
from megatron_chameleon.checkpoint.tensor_files.raw import as_bytes
from megatron_chameleon.checkpoint.tensor_files.torch_pickles import load_without_data
from megatron_chameleon.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


def test_tensors_are_those_that_torch_loads(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    tensors = {str(dtype): base.to(dtype) for dtype in DTYPES}
    tensors |= {"view": base[1], "scalar": torch.tensor(3.0), "empty": torch.empty(0, 5)}
    tensors |= {"parameter": torch.nn.Parameter(base), "float8": base.to(torch.float8_e4m3fn)}
    tensors["boolean"] = base > 3
    torch.save(tensors, tmp_path / "x.pth")
    file, expected = PthFile(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth")
    assert file.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert as_bytes(found) == as_bytes(tensor)


def test_a_state_dict_of_a_module_and_other_values(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    content = {
        "module": module.state_dict(),  # an OrderedDict with an attribute
        "shapes": [OrderedDict(weight=module.weight.shape)],
        "names": {"a", "b"},
        "step": 3,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "raw": b"\xff\0",
        "nothing": None,
    }
    torch.save(content, tmp_path / "x.pt")
    found = load_without_data(tmp_path / "x.pt")
    assert torch.equal(found["module"]["weight"].read("weight"), module.weight)
    assert found["shapes"] == [{"weight": (2, 3)}] and found["names"] == {"a", "b"}
    assert (found["step"], found["dtype"], found["raw"]) == (3, torch.bfloat16, b"\xff\0")


def test_an_archive_with_a_huge_directory_is_refused(tmp_path: Path) -> None:
    """Otherwise each of its entries becomes an object of half a kilobyte."""
    torch.save(torch.arange(5.0), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        for number in range(300):
            archive.writestr(zipfile.ZipInfo(f"{number}/" + "n" * 60_000), b"")
    with pytest.raises(CheckpointError, match=r"a part of 18,\d+,\d+ bytes should have 16,777,216"):
        load_without_data(tmp_path / "x.pt")


def test_an_archive_inside_a_larger_file(tmp_path: Path) -> None:
    torch.save(torch.arange(5.0), tmp_path / "x.pt")
    archive = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "y").write_bytes(b"before" + archive + b"after")
    found = load_without_data(tmp_path / "y", start=6, size=len(archive))
    assert found.read("x").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(CheckpointError, match=r"ends at byte [\d,]+, before byte"):
        load_without_data(tmp_path / "y", start=6, size=len(archive) + 6)


def rewrite(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive again, each record as ``change(name, content)`` says."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in records.items():
            if (changed := change(name, content)) is not None:
                new.writestr(name, changed)


def replace_pickle(content: bytes) -> Any:
    return lambda name, old: content if name.endswith("data.pkl") else old


def call(name: str, arguments: bytes) -> bytes:
    """A pickle that calls a function of torch's list of safe ones."""
    module, _, function = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + function.encode() + b"\n(" + arguments + b"tR."


def integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu" + integer(4) + b"tQ"


def rebuild(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    numbers = [b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, stride)]
    return call("torch._utils._rebuild_tensor_v2", STORAGE + integer(offset) + b"".join(numbers))


HOSTILE = {
    "memory by bytearray": (call("builtins.bytearray", integer(10**12)), "would run code"),
    "memory by a storage": (call("torch.storage.UntypedStorage", integer(10**12)), "damaged"),
    "memory by a tensor": (call("torch.FloatTensor", integer(10**12)), "would run code"),
    "a shape beyond the storage": (rebuild(0, (2**40,), (1,)), "reaches beyond its storage"),
    "a shape that overflows": (rebuild(0, (2**40, 2**40), (2**40, 1)), "an impossible shape"),
    "a negative shape": (rebuild(0, (-1,), (1,)), "an impossible shape"),
    "an offset beyond the storage": (rebuild(4, (1,), (1,)), "reaches beyond its storage"),
    "a negative offset": (rebuild(-4, (1,), (1,)), "reaches beyond its storage"),
    "a tensor that repeats itself": (rebuild(0, (2**30,), (0,)), "is not contiguous"),
    "another storage": (rebuild(0, (4,), (1,)).replace(b"\x000X", b"\x007X"), "damaged: KeyError"),
    "code": (b"cposix\nsystem\nX\4\0\0\0true\x85R.", "would run code .*posix.system"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_is_refused(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "x.pth"
    torch.save({"x": torch.arange(4.0)}, path)
    rewrite(path, replace_pickle(content[:-1] + b"q\0}X\1\0\0\0xh\0s."))
    with pytest.raises(CheckpointError, match=message) as error:
        PthFile(path)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_the_hostile_pickles_are_close_to_a_sound_one(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.arange(4.0)}, path)
    rewrite(path, replace_pickle(rebuild(1, (3,), (1,))[:-1] + b"q\0}X\1\0\0\0xh\0s."))
    assert PthFile(path).read("x").tolist() == [1, 2, 3]


def test_compressed_and_foreign_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.zeros(10**5)}, path)
    rewrite(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        PthFile(path)
    torch.save({"x": torch.zeros(3)}, path)
    rewrite(path, lambda name, content: None if name.endswith("data.pkl") else content)
    with pytest.raises(CheckpointError, match=r"it has 0 records data\.pkl"):
        PthFile(path)
    torch.save({"x": torch.zeros(3)}, path)
    rewrite(path, lambda name, content: b"big" if name.endswith("byteorder") else content)
    with pytest.raises(CheckpointError, match="not little-endian"):
        PthFile(path)


def test_a_storage_shorter_than_its_pickle_says(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.zeros(30)}, path)
    rewrite(path, lambda name, content: content[:16] if "/data/" in name else content)
    with pytest.raises(CheckpointError, match="storage 0 has 16 bytes, its pickle says 120"):
        PthFile(path)


def test_special_files_and_folders_end_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "folder.pth").mkdir()
    for name in ("pipe", "folder", "missing"):
        with pytest.raises(CheckpointError, match=rf"{name}\.pth: (cannot be read|no such file)"):
            PthFile(tmp_path / f"{name}.pth")


def test_a_file_without_data_is_read_as_one_with_data(tmp_path: Path) -> None:
    file = create_pth(tmp_path / "x.pth", {"a": ((2, 3), torch.bfloat16), "b": ((4,), torch.float)})
    file.write("a", torch.ones(2, 3, dtype=torch.bfloat16))
    file.write("b", torch.arange(4.0))
    assert torch.load(tmp_path / "x.pth")["b"].tolist() == [0, 1, 2, 3]
    assert PthFile(tmp_path / "x.pth").read("a").tolist() == [[1, 1, 1], [1, 1, 1]]
