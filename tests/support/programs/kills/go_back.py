"""Go back to an older checkpoint, kill the run again and again, and compare its end.

    PYTHONPATH=tests/support python tests/support/programs/kills/go_back.py --kills 3

A run with the checkpoints 2, 4, ... 12 goes back to step 4 with another learning rate. Its command
is killed at random moments by SIGKILL, SIGTERM or SIGUSR1, and given again, as it was or with
``--resume auto``. After each kill, what was reported as saved must be there: the newest checkpoints
of the line, and the branch that was set aside. At the end, the metrics have each step once, and are
those of a run that went back and was never killed, bit for bit. This is done on one and on two
processes, with ``keep_last`` 1 and 2, with and without ``keep_every``.
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import forked_command
from megatron_chameleon.checkpoint.state.integrity import find_damage
from megatron_chameleon.checkpoint.state.line import list_line
from tiny_project import make_tiny_project

EXACT = ("step", "loss", "loss_text", "loss_image", "z_loss", "grad_norm", "consumed_samples")
STEPS, BACK_TO, ABANDONED = 20, 4, (6, 8, 10, 12)
SETTINGS = ("checkpoint.every_steps=2", "model.hidden_dropout=0.1", "model.num_layers=2")
CHANGED = (f"training.steps={STEPS}", "optimizer.lr=3e-3")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


class Experiment:
    """The runs of one number of processes.

    Args:
        config: A YAML file.
        folder: The runs' folders are made in it.
        processes: Number of processes per run.
        chance: Chooses moments and signals.
    """

    def __init__(self, config: Path, folder: Path, processes: int, chance: random.Random) -> None:
        self._config, self._folder = config, folder
        self._processes, self._chance = processes, chance
        self._log = folder / "log.txt"
        self.kills = self.kills_before_a_save = 0

    def prepare(self) -> None:
        """The run that goes back, and the end of one that is never killed."""
        self._run("base", "training.steps=12", "checkpoint.keep_last=9")
        shutil.copytree(self._folder / "base", self._folder / "unbroken")
        for step in ABANDONED:
            shutil.rmtree(self._folder / "unbroken" / "checkpoints" / f"step_{step:08d}")
        start = time.monotonic()
        self._run("unbroken", *CHANGED)
        self.seconds = time.monotonic() - start
        self._expected = self._measured("unbroken")

    def break_run(self, name: str, kills: int, restart: str, *overrides: str) -> None:
        """Go back in a copy of the run, with kills and restarts, and check all that was promised.

        Args:
            name: Of the run folder.
            kills: How often the command is killed.
            restart: ``auto``, or ``path`` for the same command.
            overrides: What is to be kept.

        Raises:
            AssertionError: Something that was reported as saved is missing, or differs.
        """
        run = self._folder / name
        shutil.copytree(self._folder / "base", run)
        path = run / "checkpoints" / f"step_{BACK_TO:08d}"
        words = [*self._words(name), *CHANGED, *overrides]
        self._log.write_text("")
        for number in range(kills + 1):
            resume = "auto" if number and restart == "auto" and _went_back(run) else str(path)
            pids = forked_command.start([*words, "--resume", resume], self._log, self._processes)
            if number < kills:
                self._kill(pids, run)
            codes = _wait(pids)
            self._look_at(run, overrides)
            if number == kills:
                assert not any(codes), f"{codes}: {self._log.read_text()[-3000:]}"
        found = self._measured(name)
        assert [line[0] for line in found] == list(range(1, STEPS + 1)), found
        assert found == self._expected, "the losses differ from the unbroken run's"

    def _kill(self, pids: list[int], run: Path) -> None:
        number = self._chance.choice(SIGNALS)
        deadline = time.monotonic() + self._chance.uniform(0.0, 1.0) * self.seconds
        while time.monotonic() < deadline:
            time.sleep(0.002)
        victims = pids if number == signal.SIGKILL else [self._chance.choice(pids)]
        for pid in victims:
            os.kill(pid, number)
        self.kills += 1
        self.kills_before_a_save += "saved " not in self._log.read_text(errors="replace")

    def _look_at(self, run: Path, overrides: tuple[str, ...]) -> None:
        """Check that what was reported as saved is there and sound."""
        folder = run / "checkpoints"
        found = list_line(folder)
        if _went_back(run):
            branch = folder / "branch_0001"
            lines = (branch / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
            there = {path.name for path in (*branch.glob("step_*"), *folder.glob("step_*"))}
            assert {f"step_{step:08d}" for step in ABANDONED} <= there, there
        said = re.findall(r"^saved \S+/step_(\d{8,})$", self._log.read_text(), re.MULTILINE)
        keep_last = next(int(w.split("=")[1]) for w in overrides if w.startswith("checkpoint.ke"))
        steps = [int(path.name[5:]) for path in found]
        saved = sorted({int(step) for step in said})
        newest = [step for step in saved if not steps or step <= steps[-1]]
        assert not saved or steps[-1] >= saved[-1], f"{saved} were reported, found {steps}"
        assert set(newest[-keep_last:]) - set(steps) == set() or steps[-1] > saved[-1], steps
        for checkpoint in found[-2:]:
            damage = find_damage(checkpoint)
            assert damage is None, damage

    def _run(self, name: str, *overrides: str) -> None:
        forked_command.run([*self._words(name), *overrides], self._log, self._processes)

    def _words(self, name: str) -> list[str]:
        run_dir = f"logging.run_dir={self._folder / name}"
        return ["train", str(self._config), run_dir, *SETTINGS]

    def _measured(self, name: str) -> list[list]:
        lines = (self._folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [[json.loads(line)[key] for key in EXACT] for line in lines]


def _wait(pids: list[int]) -> list[int]:
    """The exit codes. When one process has failed, the others get some seconds, as by torchrun."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + 5)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def _went_back(run: Path) -> bool:
    return (run / "checkpoints" / "line.json").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="per run")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        project = make_tiny_project(Path(scratch) / "project")
        for processes in args.processes:
            folder = Path(scratch) / f"on-{processes}"
            folder.mkdir()
            experiment = Experiment(project.config, folder, processes, random.Random(seed))
            experiment.prepare()
            matrix = itertools.product(range(args.rounds), (1, 2), (0, 4), ("auto", "path"))
            for number, last, every, restart in matrix:
                name = f"{restart}-{last}-{every}-{number}"
                keep = (f"checkpoint.keep_last={last}", f"checkpoint.keep_every={every}")
                experiment.break_run(name, args.kills, restart, *keep)
                print(f"{processes} processes, {name}: as the unbroken run", flush=True)
                shutil.rmtree(folder / name)
            print(
                f"{processes} processes: {experiment.kills} kills, "
                f"{experiment.kills_before_a_save} before the first save",
                flush=True,
            )
    print("Nothing that was reported as saved was missing, and all losses are the unbroken run's")


if __name__ == "__main__":
    main()
