"""Gives damaged checkpoints to the real command: each is read, or refused in one line.

    PYTHONPATH=.:tests/support python tests/support/programs/fuzzing/fuzz_checkpoints.py \
        --inputs 2000  # half an hour

A tiny run is trained and converted into every format. ``checkpoint_mutations.py`` then changes one
file of a copy, by a seeded random number generator, and ``convert``, ``verify``, ``generate`` or
``train --resume`` opens it, in a process forked from one that has imported everything. A failure is
an exit code other than 0 and 2, a traceback, no line that begins with "error: ", advice to load
without weights_only, something left behind, more than ``LIMIT_SECONDS`` of processor time, or
memory of 1 GiB beyond the parent's.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoint_mutations import mutate

import megatron_chameleon.training.engines.megatron  # noqa: F401
from command_server import IMPORTS, run_main
from tiny_project import TinyProject, make_tiny_project

LIMIT_SECONDS = 10
LIMIT_BYTES = 1 << 30
LONGEST_WAIT_SECONDS = 120
"""Of a process on a busy machine."""
FORMATS = ("megatron", "hf", "meta", "deepspeed")
VERBS = ("convert", "convert", "convert", "verify", "verify", "generate", "generate", "train")
SMALL_RUN = ("training.global_batch_size=2", "optimizer.lr_warmup_steps=1")
SMALL = (".json", ".yaml", ".metadata", "latest_universal", "SHA256SUMS", ".safetensors", ".pth")


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    output: str
    cpu_seconds: float
    wall_seconds: float
    grown_bytes: int


def run(words: list[str], log: Path) -> Outcome:
    """Run the command in a fork, and kill it if it hangs."""
    started, before = time.monotonic(), _resident_bytes()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            signal.alarm(LONGEST_WAIT_SECONDS)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            code = run_main(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return Outcome(
        os.waitstatus_to_exitcode(status),
        log.read_text(errors="replace"),
        usage.ru_utime + usage.ru_stime,
        time.monotonic() - started,
        max(0, usage.ru_maxrss * 1024 - before),
    )


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def problems(outcome: Outcome) -> list[str]:
    """What is wrong with how a command ended."""
    found = []
    errors = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
    if outcome.code not in (0, 2):
        found.append(f"exit code {outcome.code}")
    if outcome.code == 2 and not errors:
        found.append("no line that begins with error:")
    if outcome.code == 2 and not outcome.output.rstrip().splitlines()[-1].startswith("error: "):
        found.append("something after the error")
    for word in ("Traceback", "weights_only", "internal error", "\x1b["):
        if word in outcome.output:
            found.append(word)
    if any(len(line) > 1500 for line in errors):
        found.append("an endless line")
    if outcome.cpu_seconds > LIMIT_SECONDS:
        found.append(f"{outcome.cpu_seconds:.1f} s")
    if outcome.grown_bytes > LIMIT_BYTES:
        found.append(f"{outcome.grown_bytes >> 20} MiB")
    return found


class Fuzzer:
    """Sound checkpoints of every format, and the commands that open damaged copies of them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._log = folder, folder / "log"
        self._project: TinyProject = make_tiny_project(folder / "project")
        trained = folder / "run"
        small = ["training.steps=2", *SMALL_RUN, f"logging.run_dir={trained}"]
        self._run_soundly(["train", str(self._project.config), *small])
        self.sources = {}
        for name in FORMATS:
            source = folder / "sound" / name / "checkpoint"
            options = ["--shards", "4"] if name == "meta" else []
            words = ["convert", str(trained), str(source), "--to", name, *options]
            self._run_soundly(words)
            (source / "SHA256SUMS").unlink()
            self.sources[name] = source

    def _run_soundly(self, words: list[str]) -> None:
        outcome = run(words, self._log)
        assert outcome.code == 0, outcome.output

    def commands(self, verb: str, copy: Path, name: str, output: Path) -> list[str]:
        """The words of a command that opens a copy."""
        match verb:
            case "convert":
                to = FORMATS[(FORMATS.index(name) + 1) % len(FORMATS)]
                return ["convert", str(copy), str(output), "--to", to]
            case "verify":
                return ["verify", str(copy), str(self.sources[name])]
            case "generate":
                words = ["generate", str(copy), "--prompt", "a", "--max-tokens", "2"]
                return [*words, "--output", str(output)]
            case _:
                overrides = ["training.steps=3", *SMALL_RUN]
                run_dir = f"logging.run_dir={output}"
                config = str(self._project.config)
                return ["train", config, "--resume", str(copy), *overrides, run_dir]

    def fuzz(self, seed: int) -> tuple[str, str, str, Outcome]:
        """Damage one file and open the checkpoint.

        Returns:
            The format, the verb, what was changed and how the command ended.
        """
        rng = random.Random(seed)
        verb = VERBS[seed % len(VERBS)]
        name = "megatron" if verb == "train" else FORMATS[rng.randrange(4)]
        place = self._folder / "copy"
        shutil.rmtree(place, ignore_errors=True)
        copy, output = place / "checkpoint", place / "output"
        shutil.copytree(self.sources[name], copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file())
        small = [path for path in files if path.name.endswith(SMALL)]
        path = rng.choice(small if rng.random() < 0.8 else files)
        changed = f"{path.relative_to(copy)}: {mutate(path, rng)}"
        before = sorted(p.name for p in place.iterdir())
        outcome = run(self.commands(verb, copy, name, output), self._log)
        left = [p.name for p in place.iterdir() if p.name not in before]
        if outcome.code and left and verb == "convert":
            outcome.output += f"\nTraceback: left behind: {left}"
        return name, verb, changed, outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print how each command ended")
    args = parser.parse_args()
    for module in IMPORTS:
        __import__(module)
    torch.set_num_threads(1)
    counts: Counter[tuple[str, str, int]] = Counter()
    slowest = longest = most = 0.0
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for seed in range(args.seed, args.seed + args.inputs):
            name, verb, changed, outcome = fuzzer.fuzz(seed)
            counts[verb, name, outcome.code] += 1
            slowest = max(slowest, outcome.cpu_seconds)
            longest = max(longest, outcome.wall_seconds)
            most = max(most, outcome.grown_bytes)
            found = problems(outcome)
            last = (outcome.output.rstrip().splitlines() or [""])[-1]
            if args.show:
                print(f"{seed} {verb} {name} {changed!r}: {outcome.code} {last[:300]!r}")
            if found:
                wrong += 1
                print(f"seed {seed}, {verb} of {name}, {changed!r}: {', '.join(found)}")
                print("\n".join(outcome.output.splitlines()[-12:]), flush=True)
    for (verb, name, code), count in sorted(counts.items()):
        print(f"{verb:9} {name:10} exit {code}: {count:5}")
    print(
        f"{sum(counts.values())} mutations, {wrong} wrong; at most {slowest:.1f} s of processor "
        f"time, {longest:.1f} s in all, {most / 2**20:.0f} MiB more than before"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
