"""An index that leads elsewhere, contradicts its files or would run code is refused in one line."""

import pickle
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_chameleon.checkpoint.state.torch_dist import ShardedSnapshot, load_sharded
from megatron_chameleon.checkpoint.tensor_files.metadata import read_metadata
from megatron_chameleon.errors import CheckpointError

NAME = "output_layer.weight"


def replace_places(metadata: Any, **values: Any) -> None:
    for info in metadata.storage_data.values():
        for name, value in values.items():
            setattr(info, name, value)


def replace_chunk(metadata: Metadata, offsets: tuple, sizes: tuple) -> None:
    item: Any = metadata.state_dict_metadata[NAME]
    item.chunks[0] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def replace_size(metadata: Metadata, size: Any) -> None:
    item: Any = metadata.state_dict_metadata[NAME]
    item.size = size


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a path above": (
        lambda m: replace_places(m, relative_path="../x"),
        r"names the file '\.\./x', which is not in the folder",
    ),
    "an absolute path": (
        lambda m: replace_places(m, relative_path="/etc/passwd"),
        "names the file '/etc/passwd', which is not in the folder",
    ),
    "a name of two lines": (lambda m: replace_places(m, relative_path="x\ny"), r"'x\\ny'"),
    "a name that is a number": (lambda m: replace_places(m, relative_path=3), "names the file 3"),
    "a negative offset": (lambda m: replace_places(m, offset=-1), "a chunk is at -1"),
    "an endless chunk": (
        lambda m: replace_places(m, length=2**62),
        r"distcp: has [\d,]+ bytes, but a chunk of it ends at",
    ),
    "a chunk outside": (
        lambda m: replace_chunk(m, (10**6, 0), (1, 48)),
        "a chunk of 'output_layer.weight' lies outside it",
    ),
    "a chunk without a place": (
        lambda m: replace_chunk(m, (7, 0), (1, 48)),
        r"does not say where the chunk of 'output_layer.weight' at \[7, 0\] is",
    ),
    "a chunk of another rank": (lambda m: replace_chunk(m, (0,), (1,)), "lies outside it"),
    "a size that is text": (lambda m: replace_size(m, "many"), "has an impossible shape or dtype"),
    "a negative size": (lambda m: replace_size(m, torch.Size([-3])), "has an impossible shape"),
    "no places": (lambda m: setattr(m, "storage_data", None), "not the index of a checkpoint"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", [1]), "has no list of tensors"),
    "a tensor that is text": (
        lambda m: m.state_dict_metadata.update({NAME: "text"}),
        "'output_layer.weight' is 'text', not a tensor",
    ),
    "a name of three lines": (
        lambda m: m.state_dict_metadata.update({"a\nb\nc": m.state_dict_metadata[NAME]}),
        "the name of a tensor is not a line of text",
    ),
}


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "step_00000007"))


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_that_cannot_be_is_refused(copy: Path, name: str) -> None:
    change, message = CHANGES[name]
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    change(metadata)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=message) as error:
        read_metadata(copy)
    assert "\n" not in str(error.value)


def test_more_bytes_than_the_files_have_are_refused(copy: Path) -> None:
    """One chunk in a file can stand for any number of tensors."""
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    item: Any = metadata.state_dict_metadata[NAME]
    index, info = next((i, p) for i, p in metadata.storage_data.items() if i.fqn == NAME)
    for number in range(200):
        metadata.state_dict_metadata[f"{NAME}{number}"] = item
        for chunk in item.chunks:
            metadata.storage_data[type(index)(f"{NAME}{number}", chunk.offsets)] = info
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"its tensors have [\d,]+ bytes, the files [\d,]+"):
        read_metadata(copy)


def test_127_bytes_do_not_take_forever(tmp_path: Path) -> None:
    tuples = b")" + b"".join(b"\x94h%c\x86" % level for level in range(60))
    (tmp_path / ".metadata").write_bytes(b"\x80\x04}" + tuples + b"Ns.")
    with pytest.raises(CheckpointError, match=r"\.metadata: .* a key or an argument of more than"):
        read_metadata(tmp_path)


class _Runs:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


def saved(folder: Path) -> Path:
    """A checkpoint of a tensor and of an object, which may be any Python object."""
    folder.mkdir()
    state = {
        "weight": ShardedTensor.from_rank_offsets("weight", torch.arange(6.0)),
        "object": ShardedObject("object", [_Runs(folder.parent / "ran")], (1,), (0,)),
    }
    files = ShardedSnapshot(state).stage(folder, keep=True)
    files.write()
    files.finish()
    return folder


def wanted() -> dict[str, Any]:
    return {
        "weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(6)),
        "object": ShardedObject("object", None, (1,), (0,)),
    }


@pytest.mark.usefixtures("topology")
def test_no_code_is_run_when_a_run_resumes(tmp_path: Path) -> None:
    """megatron-core and torch would load both as plain pickles."""
    folder = saved(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"distcp: would run code .*it asks for"):
        load_sharded(folder, wanted())
    (folder / ".metadata").write_bytes(pickle.dumps(_Runs(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"\.metadata: .*which no checkpoint needs"):
        load_sharded(folder, wanted())
    torch.save(_Runs(tmp_path / "ran"), folder / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: would run code"):
        load_sharded(folder, wanted())
    (folder / "metadata.json").write_text("[" * 10**5)
    with pytest.raises(CheckpointError, match=r"metadata\.json: has JSON values nested deeper"):
        load_sharded(folder, wanted())
    assert not (tmp_path / "ran").exists()


class OldPickler(pickle.Pickler):
    """Stores enumerations as Python 3.11.2 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


@pytest.mark.usefixtures("topology")
def test_an_index_written_by_an_older_python(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint")
    metadata = read_metadata(folder)
    metadata.planner_data = WriteItemType.TENSOR
    with (folder / ".metadata").open("wb") as file:
        OldPickler(file).dump(metadata)
    assert b"getattr" in (folder / ".metadata").read_bytes()
    assert read_metadata(folder).planner_data is WriteItemType.TENSOR


@pytest.mark.parametrize(
    "asked", [(torch.Size, "__init__"), (WriteItemType, "mro"), (WriteItemType, "__class__")]
)
def test_getattr_gives_members_of_enumerations_only(tmp_path: Path, asked: tuple) -> None:
    class Asks:
        def __reduce__(self) -> Any:
            return getattr, asked

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Asks()))
    with pytest.raises(CheckpointError, match=r"'builtins\.getattr' of what is no enumeration"):
        read_metadata(tmp_path)
