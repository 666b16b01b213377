"""megatron-core's distributed checkpoint (``torch_dist``), which any layout can load."""

import queue
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_chameleon.errors import CheckpointError


class ShardedSnapshot:
    """Sharded tensors with global positions, ready to be written.

    Args:
        state: Nested dicts with megatron-core's ``ShardedTensor`` in them.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    @property
    def local_bytes(self) -> int:
        """What this rank will write."""
        kinds = (ShardedTensor, ShardedTensorFactory)
        return sum(
            value.data.numel() * value.data.element_size()
            for value in nested_values(self._state)
            if isinstance(value, kinds) and value.data is not None
            if is_main_replica(value.replica_id)
        )

    def write(self, folder: Path) -> None:
        """Write into a folder that is there. A collective.

        Raises:
            OSError: On every rank, if one of them could not write.
        """
        # megatron-core would start a process for this queue, for a writer that is not used here: it
        # takes seconds and 270 MB, outlives a run that is killed, and where a signal to a whole
        # job kills it first, the save waits for ever.
        filesystem_async._results_queue = queue.Queue()
        try:
            dist_checkpointing.save(self._state, str(folder))
        except (Exception, CheckpointException) as error:
            raise OSError(_root_cause(error)) from error


def load_sharded(
    checkpoint: Path, state: dict[str, Any], *, is_whole: bool = True
) -> dict[str, Any]:
    """The tensors that ``state`` describes, from a checkpoint of any layout. A collective.

    Args:
        checkpoint: A whole checkpoint.
        state: Nested dicts with megatron-core's ``ShardedTensor`` in them, with room for the data.
        is_whole: Whether the ranks ask for every part of the tensors that they name.

    Raises:
        CheckpointError: A file is missing, damaged or of another shape.
    """
    try:
        folder = str(checkpoint)
        return dict(dist_checkpointing.load(state, folder, validate_access_integrity=is_whole))
    except (Exception, CheckpointException) as error:
        what = f"cannot be loaded ({_root_cause(error)})"
        raise CheckpointError(str(checkpoint), what, "Use an older checkpoint") from error


def _root_cause(error: BaseException) -> str:
    """The innermost reason of megatron-core's nested checkpoint errors, in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        return _root_cause(next(iter(failures.values()))[0])
    if error.__cause__ is not None:
        return _root_cause(error.__cause__)
    return (str(error).strip() or type(error).__name__).splitlines()[0]
