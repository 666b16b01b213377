"""Kills sharded preprocessing at random moments, resumes it, and compares with an unbroken run.

    PYTHONPATH=tests/support python tests/support/programs/kill_preprocess.py --kills 20  # minutes

Two workers each write two shards of a corpus with all kinds of input, and the shards are merged.
The commands are started and killed (SIGKILL, which does not reach their workers) after random times
until the requested number of kills has hit a running command. Then the commands run to their end.
A share of the documents is held out, so that each command writes two token files. Each time the
merged files must be byte for byte those of the unbroken run, and no worker may survive.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from mixed_corpus import write_corpus, write_tokenizer
from run_command import command, environment, run_chameleon

SHARDS = 2
HOLDOUT = 0.2


def commands(corpus: list[Path], tokenizer: Path, output: Path) -> list[list[object]]:
    """The arguments of each command; the last one merges."""
    base = ["preprocess", "--output", output]
    inputs = [*base, *corpus, "--tokenizer", tokenizer, "--workers", 2, "--save-every", 0]
    inputs += ["--holdout", HOLDOUT]
    return [
        *([*inputs, "--shard", f"{index}/{SHARDS}"] for index in range(SHARDS)),
        [*base, "--merge"],
    ]


def contents(output: Path) -> dict[str, bytes]:
    return {
        path.name.removeprefix(output.name): path.read_bytes()
        for path in output.parent.glob(f"{output.name}*")
    }


def kill_after(words: list[object], seconds: float) -> bool:
    """Start a command and kill it after some seconds; whether it was still running."""
    process = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(seconds)
        assert process.returncode == 0, process.returncode
        return False
    except subprocess.TimeoutExpired:
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, f"{alive} outlived their parent"
        return True


def seconds_of(words: list[object]) -> float:
    started = time.monotonic()
    run_chameleon(*words)
    return time.monotonic() - started


def kill_and_compare(folder: Path, kills: int, documents: int, seed: int) -> int:
    """Run until ``kills`` kills have hit; returns how many merged results were compared."""
    rng = random.Random(seed)
    corpus = write_corpus(folder / "corpus", documents)
    tokenizer = write_tokenizer(folder / "tokenizer")
    whole = folder / "whole" / "tokens"
    durations = [seconds_of(words) for words in commands(corpus, tokenizer, whole)]
    expected = contents(whole)
    hits = compared = 0
    while hits < kills:
        broken = folder / f"broken-{compared}" / "tokens"
        for words, duration in zip(commands(corpus, tokenizer, broken), durations, strict=True):
            while hits < kills and kill_after(words, rng.uniform(0.2, 1.0) * duration):
                hits += 1
                names = sorted(path.name for path in broken.parent.glob("*"))
                print(f"kill {hits}: {' '.join(names) or 'no files yet'}", flush=True)
                if rng.random() < 0.4:  # otherwise the same command is killed again
                    break
            run_chameleon(*words)
        found = contents(broken)
        assert found == expected, [
            name for name in found | expected if found.get(name) != expected.get(name)
        ]
        compared += 1
        shutil.rmtree(broken.parent)
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--documents", type=int, default=300, help="documents of each input")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compared = kill_and_compare(Path(folder), args.kills, args.documents, args.seed)
    print(f"{args.kills} kills; all {compared} results equal the unbroken run byte for byte")


if __name__ == "__main__":
    main()
