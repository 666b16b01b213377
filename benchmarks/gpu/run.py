"""Check the numerics on one GPU, then measure what it trains, generates and encodes.

    python -W ignore -m benchmarks.gpu.run --output runs/gpu                  # an H100 or H200
    python -W ignore -m benchmarks.gpu.run --output runs/gpu --only train,loss --seconds 300
    python -W ignore -m benchmarks.gpu.run --output /tmp/dry --device cpu --tiny   # a dry run

Each part runs in its own process within its own time limit. If a part fails, crashes, or runs out
of memory or time, its rows are kept and the other parts still run. A row that this machine cannot
measure says so, and nothing is measured in its place. Rows are appended to OUTPUT/rows.jsonl as
they are measured. ``results.json`` and ``results.md`` are written after every part. The ceilings
(matrix products, memory) are always measured first, because figures are given as shares of them.
The exit code is 1 if a row failed.
"""

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu.child import NEEDS, PARTS, Job, report_machine, run_job
from benchmarks.gpu.report import write_results

PACKAGES = ("megatron-core", "transformer-engine", "transformers", "triton", "numpy")
BAD_STATES = ("failed", "out of memory", "crashed", "out of time", "interrupted")
CHOICES = [name for name in PARTS if name not in NEEDS.values()]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="use tiny sizes, to check that everything runs"
    )
    parser.add_argument(
        "--only", metavar="NAME,...", help=f"run only these parts of {', '.join(CHOICES)}"
    )
    parser.add_argument(
        "--seconds", type=float, help="time limit of each part (default: each part has its own)"
    )
    args = parser.parse_args()
    args.parts = args.only.split(",") if args.only else CHOICES
    if unknown := [name for name in args.parts if name not in CHOICES]:
        fail(
            "--only", f"no part is called {', '.join(unknown)}", f"Choose from {', '.join(CHOICES)}"
        )
    if args.seconds is not None and args.seconds <= 0:
        fail("--seconds", f"{args.seconds:g} is not above 0", "Give each part some time")
    if args.device == "cpu" and not args.tiny:
        fail("--device", "on a CPU the real sizes take days", "Add --tiny")
    return args


def fail(where: str, what: str, remedy: str) -> NoReturn:
    print(f"error: {where}: {what}. {remedy}.", file=sys.stderr)
    sys.exit(2)


def prepare_device(device: str) -> Any:
    """Choose how processes start.

    With a GPU they start afresh, because a forked process cannot use it. On a CPU they are forked,
    so that imports are done once.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for module, _, _ in PARTS.values():
            importlib.import_module(f"benchmarks.gpu.{module}")
        return multiprocessing.get_context("fork")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    if not torch.cuda.is_available():
        fail("--device", "cuda has no usable GPU here", "Use --device cpu --tiny for a dry run")
    return multiprocessing.get_context("spawn")


def run_process(start: Any, target: Callable[[Any], None], argument: Any, seconds: float) -> str:
    """Run a function in its own process, and return ok, crashed or out of time."""
    process = start.Process(
        target=target, args=(argument,)
    )  # not a daemon: compilers start worker processes
    process.start()
    try:
        process.join(seconds)
        if process.is_alive():
            return "out of time"
    finally:
        process.kill()
        process.join()
    return "ok" if process.exitcode == 0 else f"crashed with exit code {process.exitcode}"


def describe_machine(start: Any, work: Path) -> dict[str, Any]:
    path = work / "machine.json"
    run_process(start, report_machine, path, 120)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    if found.get("device") != "CPU":
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            found["nvidia-smi"] = answer.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            found["nvidia-smi"] = "did not answer"
    return found


class Run:
    """The rows and states of the parts, which are written after every part.

    Args:
        args: From ``read_arguments``.
        start: From ``prepare_device``.
        work: A folder for files that parts leave for each other.
    """

    def __init__(self, args: argparse.Namespace, start: Any, work: Path) -> None:
        self._args, self._start, self._work = args, start, work
        self._rows = args.output / "rows.jsonl"
        self._head: dict[str, Any] = {
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "tiny": args.tiny,
            "machine": describe_machine(start, work),
            "parts": {},
        }

    def rows(self) -> list[dict[str, Any]]:
        if not self._rows.exists():
            return []
        lines = self._rows.read_text(encoding="utf-8").splitlines()
        return [row for line in lines if (row := read_row(line)) is not None]

    def run(self, part: str) -> None:
        """Run a part within its time limit, after the part that it needs."""
        if needed := NEEDS.get(part):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            try:
                self._run_alone(needed)
            finally:
                if visible is None:
                    del os.environ["CUDA_VISIBLE_DEVICES"]
                else:
                    os.environ["CUDA_VISIBLE_DEVICES"] = visible
        self._run_alone(part)

    def _run_alone(self, part: str) -> None:
        ceilings = {r["name"]: r["figures"] for r in self.rows() if r["part"] == "ceilings"}
        job = Job(part, self._args.tiny, self._rows, self._work, ceilings)
        limit = self._args.seconds or PARTS[part][2]
        begin, state = time.perf_counter(), "interrupted"
        try:
            state = run_process(self._start, run_job, job, limit)
        finally:
            seconds = time.perf_counter() - begin
            if state != "ok":
                note = f"its process ended ({state}) after {seconds:.1f} s of {limit:g}"
                self._add_row(part, state, note)
            self._head["parts"][part] = {"state": state, "seconds": seconds}
            write_results(self._args.output, self._head, self.rows())

    def _add_row(self, part: str, state: str, note: str) -> None:
        row = {"part": part, "name": "the rest of the part", "state": state.split(" with")[0]}
        row |= {"figures": {}, "peak_gib": None, "seconds": 0.0, "note": note}
        # begin a new line, because the process may have been killed in the middle of one
        with self._rows.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(row) + "\n")
        print(f"{part:10} {row['name']}: {row['note']}", flush=True)

    def print_head(self) -> None:
        for name, value in self._head["machine"].items():
            print(f"{name}: {value}")
        print(f"command: {self._head['command']}", flush=True)


def read_row(line: str) -> dict[str, Any] | None:
    """A row; None for an empty line and for half of one."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def main() -> None:
    args = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was measured is written
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(
            "--output", f"{args.output} cannot be created ({error.strerror})", "Name another folder"
        )
    if (args.output / "rows.jsonl").exists():
        fail("--output", f"{args.output} has the rows of another run", "Name another folder")
    start = prepare_device(args.device)
    with tempfile.TemporaryDirectory() as work:
        run = Run(args, start, Path(work))
        run.print_head()
        for part in CHOICES:
            if part in args.parts or part == "ceilings":
                run.run(part)
        rows = run.rows()
    bad = [row for row in rows if row["state"] in BAD_STATES]
    states = {row["state"]: 0 for row in rows}
    for row in rows:
        states[row["state"]] += 1
    print(", ".join(f"{count} {state}" for state, count in states.items()))
    print((args.output / "results.md").read_text(encoding="utf-8"))
    print(f"The figures are in {args.output / 'results.md'} and results.json")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
