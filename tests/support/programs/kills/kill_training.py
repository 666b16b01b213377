"""SIGKILL a run at random moments, also during saves, resume it each time, and compare its end.

    PYTHONPATH=tests/support python tests/support/programs/kills/kill_training.py --kills 50

Add ``--async-save`` to write checkpoints while training goes on.

A run that has reached its end is compared with the unbroken one, bit for bit. New runs follow until
there were enough kills. After each kill, every checkpoint is verified by its checksums.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import forked_command
from megatron_chameleon.checkpoint.state.integrity import find_damage
from megatron_chameleon.checkpoint.state.line import list_line
from tiny_project import make_tiny_project

EXACT = ("step", "loss", "loss_text", "loss_image", "z_loss", "grad_norm", "consumed_samples")
STEPS = 24
# Saves take longer than the steps between them, so most signals come during a save.
SETTINGS = (
    *(f"training.steps={STEPS}", "checkpoint.every_steps=2", "checkpoint.keep_last=2"),
    *("model.hidden_size=128", "model.ffn_hidden_size=256", "model.hidden_dropout=0.1"),
    "training.global_batch_size=4",
)


class Killer:
    """Runs of one config that are killed.

    Args:
        config: A YAML file.
        folder: The runs' folders are made in it.
        overrides: Config overrides of all runs.
        processes: Number of processes per run.
    """

    def __init__(
        self, config: Path, folder: Path, overrides: Sequence[str], processes: int
    ) -> None:
        self._words = ["train", str(config), *overrides]
        self._folder = folder
        self._processes = processes
        self._log = folder / "log.txt"
        self.kills = self.kills_in_saves = 0

    def unbroken(self) -> tuple[list[list], float]:
        """The metrics of each step of an unbroken run, and its time in seconds."""
        start = time.monotonic()
        forked_command.run(self._run_words("unbroken"), self._log, self._processes)
        return self._measured("unbroken"), time.monotonic() - start

    def break_run(self, name: str, kills: int, seconds: float, chance: random.Random) -> int:
        """Kill a run up to ``kills`` times until it ends by itself; returns the number of kills."""
        done = 0
        while True:
            begin = time.monotonic()
            pids = forked_command.start(self._run_words(name), self._log, self._processes)
            wait = chance.uniform(0.1, 1.0) * seconds if done < kills else 600.0
            while time.monotonic() - begin < wait and not self._has_ended(pids):
                time.sleep(0.002)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            if self._is_finished(name, pids):
                return done
            done += 1
            self._look_at(self._folder / name / "checkpoints")

    def _has_ended(self, pids: list[int]) -> bool:
        return os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _is_finished(self, name: str, pids: list[int]) -> bool:
        """Wait for the processes; returns whether the run is finished."""
        for pid in pids:
            os.waitpid(pid, 0)
        last = self._folder / name / "checkpoints" / f"step_{STEPS:08d}"
        return last.is_dir()

    def _look_at(self, checkpoints: Path) -> None:
        self.kills += 1
        self.kills_in_saves += any(checkpoints.glob(".step_*.saving"))
        for checkpoint in list_line(checkpoints):
            damage = find_damage(checkpoint)
            assert damage is None, damage

    def compare(self, name: str, unbroken: list[list]) -> None:
        """Check that a finished run has the metrics of the unbroken one.

        Raises:
            AssertionError: With the first step that differs.
        """
        found = self._measured(name)
        assert len(found) == len(unbroken), f"{len(found)} steps"
        for own, expected in zip(found, unbroken, strict=True):
            assert own == expected, f"{own} is not {expected}"

    def _run_words(self, name: str) -> list[str]:
        return [*self._words, f"logging.run_dir={self._folder / name}"]

    def _measured(self, name: str) -> list[list]:
        lines = (self._folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [[json.loads(line)[key] for key in EXACT] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        project = make_tiny_project(folder / "project")
        overrides = [*SETTINGS, f"checkpoint.async_save={str(args.async_save).lower()}"]
        killer = Killer(project.config, folder, overrides, args.processes)
        unbroken, seconds = killer.unbroken()
        seed = args.seed if args.seed is not None else random.SystemRandom().randrange(2**32)
        print(f"seed {seed}; {STEPS} steps take {seconds:.1f} s", flush=True)
        chance, runs = random.Random(seed), 0
        while killer.kills < args.kills:
            name = f"killed-{runs}"
            killer.break_run(name, args.kills - killer.kills, seconds, chance)
            killer.compare(name, unbroken)
            runs += 1
            print(f"{killer.kills} kills, {killer.kills_in_saves} in a save", flush=True)
    print(
        f"{killer.kills} kills in {runs} runs, {killer.kills_in_saves} of them in a save: every "
        "run ended with the unbroken one's losses"
    )


if __name__ == "__main__":
    main()
