"""Tensors staged for an asynchronous save do not change when training continues."""

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_chameleon.checkpoint.state.integrity import sha256
from megatron_chameleon.checkpoint.state.torch_dist import ShardedSnapshot, load_sharded

pytestmark = pytest.mark.usefixtures("topology")


def sharded(tensor: torch.Tensor) -> dict[str, ShardedTensor]:
    return {"weight": ShardedTensor.from_rank_offsets("weight", tensor)}


@pytest.mark.parametrize("keep", [True, False])
def test_staged_tensors_keep_their_values(tmp_path: Path, keep: bool) -> None:
    weight = torch.arange(6.0)
    files = ShardedSnapshot(sharded(weight)).stage(tmp_path, keep=keep)
    weight += 100  # the next update
    files.write()
    files.finish()
    loaded = load_sharded(tmp_path, sharded(torch.zeros(6)))["weight"]
    # without a copy the training waits, so no update happens before the write
    assert loaded.tolist() == (weight - 100 if keep else weight).tolist()
    assert files.digests == {name: sha256(tmp_path / name) for name in ("__0_0.distcp",)}


def test_finish_reports_a_write_that_failed(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    files = ShardedSnapshot(sharded(torch.ones(3))).stage(folder, keep=True)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    files.write()
    with pytest.raises(OSError, match="No such file or directory"):
        files.finish()
