"""A trace of some steps by torch's profiler, for chrome://tracing or Perfetto."""

from pathlib import Path
from typing import Any

from megatron_chameleon.config.schema import Config
from megatron_chameleon.parallel import platform


class StepProfiler:
    """Traces the steps of ``training.profile_steps`` into ``profile/`` of the run folder.

    Args:
        config: A checked config.
        rank: Rank 0 traces, and with ``training.profile_all_ranks`` every rank.
    """

    def __init__(self, config: Config, rank: int) -> None:
        steps, wanted = config.training.profile_steps, config.training.profile_all_ranks
        self._steps = tuple(steps) if steps and (rank == 0 or wanted) else None
        self._folder = Path(config.logging.run_dir) / "profile"
        self._rank = rank
        self._profile: Any = None

    def begin(self, step: int) -> None:
        """Before step ``step``, counted from 1."""
        if self._steps is None or step != self._steps[0]:
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if platform.has_gpu():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def end(self, step: int) -> Path | None:
        """After step ``step``; the trace's path if it was the last one traced."""
        if self._profile is None or self._steps is None or step < self._steps[1]:
            return None
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        first, last = self._steps
        path = self._folder / f"rank{self._rank:05d}_steps_{first}-{last}.json"
        partial = path.with_suffix(".partial.json")
        self._profile.export_chrome_trace(str(partial))
        partial.replace(path)
        self._profile = None
        return path
