"""Record some steps with torch's profiler, for chrome://tracing or Perfetto."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import TrainingError
from megatron_chameleon.files import make_folder, writing
from megatron_chameleon.parallel import platform


class StepProfiler:
    """Records the steps of ``training.profile_steps`` in ``profile/`` of the run folder.

    Args:
        config: A checked config.
        rank: Rank 0 records; with ``training.profile_all_ranks``, every rank does.
    """

    def __init__(self, config: Config, rank: int) -> None:
        steps, wanted = config.training.profile_steps, config.training.profile_all_ranks
        self._steps = tuple(steps) if steps and (rank == 0 or wanted) else None
        self._folder = Path(config.logging.run_dir) / "profile"
        self._rank = rank
        self._profile: Any = None

    def begin(self, step: int) -> None:
        """Start recording if this step, counted from 1, is the first one to record."""
        if self._steps is None or step != self._steps[0]:
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if platform.has_gpu():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def end(self, step: int) -> Path | None:
        """Write the trace if this step was the last one to record; returns its path.

        Raises:
            TrainingError: The file system refuses it.
        """
        if self._profile is None or self._steps is None or step < self._steps[1]:
            return None
        self._profile.stop()
        profile, self._profile = self._profile, None
        make_folder(self._folder, TrainingError)
        first, last = self._steps
        path = self._folder / f"rank{self._rank:05d}_steps_{first}-{last}.json"
        # A folder of its own, because the profiler follows links.
        with writing(path, TrainingError), tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            trace = Path(scratch) / path.name
            profile.export_chrome_trace(str(trace))
            if not _is_complete(trace):  # it does not say so
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            trace.replace(path)
        return path


def _is_complete(trace: Path) -> bool:
    if not trace.is_file():
        return False
    with trace.open("rb") as file:
        file.seek(-min(16, trace.stat().st_size), os.SEEK_END)
        return file.read().rstrip().endswith(b"}")
