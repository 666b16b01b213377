"""Write and load megatron-core's distributed checkpoint (``torch_dist``), which fits any layout.

Megatron-core plans what each rank writes and joins the results. Its own writer would start
processes for the writing. Here a thread does it: a thread ends with its process, ignores signals
sent to the job step and does not slow the training down, since almost all of its work is outside
Python's lock.
"""

import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    WriteBucket,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future
from torch.utils.serialization import config as serialization_config

from megatron_chameleon.checkpoint.state.integrity import sha256
from megatron_chameleon.checkpoint.tensor_files.metadata import read_metadata
from megatron_chameleon.checkpoint.tensor_files.torch_pickles import load_without_data
from megatron_chameleon.errors import CheckpointError, first_line
from megatron_chameleon.files import read_json_object


class ShardedSnapshot:
    """Sharded tensors with their global positions, about to be written.

    Args:
        state: Nested dicts that contain megatron-core's ``ShardedTensor``.
        is_replicated: Whether each data-parallel rank holds all tensors that it describes;
            otherwise only the first owner of a tensor holds it.
        is_copy: Whether these tensors are a copy, which the training does not change.
    """

    def __init__(
        self, state: dict[str, Any], *, is_replicated: bool = True, is_copy: bool = False
    ) -> None:
        self._state = state
        self._is_replicated = is_replicated
        self._is_copy = is_copy

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank would write if each tensor were written by its first owner."""
        kinds = (ShardedTensor, ShardedTensorFactory)
        return sum(
            value.data.numel() * value.data.element_size()
            for value in nested_values(self._state)
            if isinstance(value, kinds) and value.data is not None
            if is_main_replica(value.replica_id)
        )

    def stage(self, folder: Path, *, keep: bool) -> "ShardedFiles":
        """Plan the files of a folder, and bring the tensors to the host. A collective.

        Args:
            folder: An existing, empty folder.
            keep: Copy the tensors that training would change before they are written.

        Raises:
            OSError: On every rank, if any of them failed.
        """
        # megatron-core would start a process for this queue, for a writer that we do not use
        filesystem_async._results_queue = queue.Queue()
        strategy = get_default_save_sharded_strategy()
        if self._is_replicated:  # each rank then writes a share
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            strategy = FullyParallelSaveStrategyWrapper(strategy, group)
        try:
            request = dist_checkpointing.save(
                self._state, str(folder), strategy, async_sharded_save=True
            )
        except (Exception, CheckpointException) as error:
            raise OSError(first_line(_root_cause(error))) from error
        assert request is not None
        # one thread while the training continues, several while it waits
        return ShardedFiles(
            request, folder, copy=keep and not self._is_copy, threads=1 if keep else None
        )


class ShardedFiles:
    """This rank's files of a checkpoint, whose tensors are in the host's memory.

    Attributes:
        digests: SHA-256 of each file by its name, once it is written.
    """

    def __init__(
        self, request: AsyncRequest, folder: Path, *, copy: bool, threads: int | None
    ) -> None:
        self._folder = folder
        self._finalize_fns = request.finalize_fns
        self._buckets: list[Any] = []
        self._threads = threads
        self.digests: dict[str, str] = {}
        if request.async_fn is None:  # nothing to write on this rank
            return
        self._transforms = request.async_fn.args[0]
        _, planned, self._results = request.async_fn_args
        self._buckets = request.preload_fn()
        if copy:
            self._buckets = [
                _copied(*buckets) for buckets in zip(planned, self._buckets, strict=True)
            ]

    def write(self) -> None:
        """Write the files and flush them to the disk, in a thread of its own. Not a collective.

        A failure is kept for ``finish``.
        """
        results: dict[int, Any] = {}
        # nothing reads zip's own checksums, and computing them takes three times as long as writing
        crc32 = serialization_config.patch("save.compute_crc32", False)  # type: ignore[attr-defined]
        with crc32, ThreadPoolExecutor(self._threads or max(1, len(self._buckets))) as threads:
            for number, result, digests in threads.map(self._write, range(len(self._buckets))):
                results[number] = result
                self.digests.update(digests)
        failure = next((r for r in results.values() if isinstance(r, BaseException)), None)
        if self._buckets:
            self._results.put(failure or results)
        self._buckets = []  # free their memory

    def _write(self, number: int) -> tuple[int, Any, dict[str, str]]:
        written: queue.Queue = queue.Queue()
        waiting: queue.Queue = queue.Queue()
        waiting.put(number)
        bucket = self._buckets[number]
        FileSystemWriterAsync.write_preloaded_data(
            self._transforms, number, bucket, written, waiting, use_fsync=True
        )
        _, result = written.get()
        name = bucket[1]
        try:
            return number, result, {name: sha256(self._folder / name)}
        except OSError as error:
            return number, error, {}

    def finish(self) -> None:
        """Write the index of all ranks' files. A collective, after ``write``.

        Raises:
            OSError: On every rank, if any of them could not write.
        """
        try:
            for finalize in self._finalize_fns:
                finalize()
        except (Exception, CheckpointException) as error:
            raise OSError(first_line(_root_cause(error))) from error


def _copied(planned: WriteBucket, staged: WriteBucket) -> WriteBucket:
    """Copy a file's tensors, except those that came from a GPU, which are copies already."""
    path, name, (objects, tensors) = staged
    of_model = [tensor for _, tensor in planned[2][1]]
    copies = [
        (item, tensor.clone() if own.device == tensor.device else tensor)
        for own, (item, tensor) in zip(of_model, tensors, strict=True)
    ]
    return path, name, (objects, copies)


def load_sharded(
    checkpoint: Path, state: dict[str, Any], *, is_whole: bool = True
) -> dict[str, Any]:
    """Load the tensors that ``state`` describes from a checkpoint of any layout. A collective.

    Args:
        checkpoint: A whole checkpoint.
        state: Nested dicts that contain megatron-core's ``ShardedTensor``, with memory for the
            data.
        is_whole: Whether the ranks together ask for every part of the tensors that they name.

    Raises:
        CheckpointError: A file is missing, damaged or of another shape.
    """
    read_json_object(checkpoint / "metadata.json", CheckpointError)
    load_without_data(checkpoint / "common.pt")
    strategies._get_filesystem_reader = _CheckedReader
    try:
        folder = str(checkpoint)
        return dict(dist_checkpointing.load(state, folder, validate_access_integrity=is_whole))
    except (Exception, CheckpointException) as error:
        cause = _root_cause(error)
        if isinstance(cause, CheckpointError):
            raise cause from error
        what = f"cannot be loaded ({first_line(cause)})"
        raise CheckpointError(str(checkpoint), what, "Use an older checkpoint") from error


class _CheckedReader(FileSystemReader):
    """torch's reader, for files that someone else may have written.

    torch and megatron-core load ``.metadata`` and the objects beside the tensors as plain pickles,
    which could run any code. Here all of them are read within bounds first, by a reader that runs
    none and refuses what no checkpoint needs.
    """

    def __init__(self, folder: str | Path, cache_metadata: bool = False) -> None:
        super().__init__(str(folder))
        self._folder = Path(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_metadata(self._folder)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            path = self._folder / place.relative_path
            load_without_data(path, {"_io.BytesIO": bytes}, place.offset, place.length)
        return super().read_data(plan, planner)


def _root_cause(error: BaseException) -> BaseException:
    """The innermost cause of megatron-core's nested checkpoint errors."""
    failures = getattr(error, "failures", None)
    if failures:
        return _root_cause(next(iter(failures.values()))[0])
    if error.__cause__ is not None and not isinstance(error, CheckpointError):
        return _root_cause(error.__cause__)
    return error
