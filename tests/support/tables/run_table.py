"""Runs every option of every verb and every key of every config with every value of the table.

Numbers are also tried with the two ends of what they may be.

    PYTHONPATH=$PWD:$PWD/tests/support:$PWD/tests/support/programs:$PWD/tests/support/tables \
        python tests/support/tables/run_table.py --folder /tmp/table          # half an hour
    ... run_table.py --folder /tmp/table --only model. --only 'plan --'       # some rows

Each cell is the real command on a tiny project, in a process that the command server forks. A cell
must be refused in one line within ``LIMIT_SECONDS``, or work. A key of the training config is first
tried with ``--dry-run``, and what passes that then trains two steps. Prints the cells that do
neither, and the number of cells of each class; the exit code is 1 if there are any.

Classes: works; refused (exit code 2, one line); lines (exit code 2, several lines, one a problem);
and the faults: traceback, hang (no end within a minute; the largest sizes, such as a billion steps
or 2,000 layers, rightly work for longer), slow (refused, but late), silent (exit code 0, but values
that are not finite), code N (another exit code), unclear (exit code 2 without a line).
"""

import argparse
import json
import math
import os
import resource
import shutil
import sys
import time
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from value_table import VALUES, config_keys, ends, options

import run_command
from megatron_chameleon.cli.options import NumberOption
from megatron_chameleon.config.constraints import Constraint, without_null
from run_command import run_chameleon
from tiny_project import IMAGE_CODES, TinyProject, make_tiny_project

LIMIT_SECONDS = 5.0
HANG_SECONDS = 60
MEMORY_BYTES = 24 << 30
GOOD = {"works", "refused", "lines"}
NEEDED = {
    "fp8.": ["fp8.format=hybrid", "fp8.emulate=true"],
    "checkpoint.": ["checkpoint.every_steps=1"],
    "engine.": ["engine.name=deepspeed"],
    "logging.sample": ["logging.sample_prompts=[{text: a}]", "logging.sample_every_steps=1"],
    "data.reset": ["data.loss_on=all"],
}
"""Without which a key of the training config would not be used."""
STEPS = ("training.steps=2", "optimizer.lr_warmup_steps=0", "training.hang_seconds=50")


@dataclass
class Cell:
    """One row of the table with one value."""

    name: str
    value: str
    words: list[str]
    then: list[str] = field(default_factory=list)
    """What to run after the words have worked; empty for nothing."""
    image: bool = False
    """Whether the weights to look at are an image tokenizer's."""


def main() -> None:
    args = _arguments()
    # The server inherits it: a cell that would fill the memory of the machine fails instead.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    run_command.TIMEOUT_SECONDS = HANG_SECONDS
    folder = Path(args.folder).resolve()
    project = _make_project(folder)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    os.chdir(work)  # a value that is a name makes a file of that name
    run_chameleon("doctor")  # starts the server
    classes: Counter[str] = Counter()
    for cell in _cells(project, folder):
        if args.only and not any(part in f"{cell.name} {cell.value}" for part in args.only):
            continue
        if args.ends and cell.value in VALUES:
            continue
        found, detail = _run(cell, folder)
        classes[found] += 1
        if found not in GOOD or args.all:
            print(f"{found}: {cell.name} = {cell.value}: {detail}", flush=True)
    print(f"{sum(classes.values()):,} cells: {dict(classes.most_common())}")
    sys.exit(any(name not in GOOD for name in classes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, help="for the project; reused if it is there")
    parser.add_argument("--only", action="append", default=[], help="rows with this text")
    parser.add_argument("--ends", action="store_true", help="only the ends of the numbers' limits")
    parser.add_argument("--all", action="store_true", help="print every cell")
    return parser.parse_args()


def _make_project(folder: Path) -> TinyProject:
    """The tiny project with a run, an export, answers and forms, made once."""
    done = folder / "done"
    if done.exists():
        tokens, config = folder / "tokens", folder / "train.yaml"
        return TinyProject(folder, folder / "documents.jsonl", folder / "tokenizer", tokens, config)
    project = make_tiny_project(folder)
    project.train("run", *STEPS)
    run_chameleon("convert", folder / "run", folder / "exported", "--to", "hf")
    prompts = [{"id": str(i), "content": [{"type": "text", "text": f"item {i}"}]} for i in range(2)]
    _write_lines(folder / "prompts.jsonl", prompts)
    words = (folder / "exported", folder / "prompts.jsonl", "--max-tokens", 4, "--force", "text")
    run_chameleon("annotate", "answer", *words, "--output", folder / "answers")
    answers = folder / "answers" / "documents.jsonl"
    run_chameleon("annotate", "prepare", "absolute", answers, "--output", folder / "forms")
    table = "item,annotator,label\n" + "".join(f"{i},a,fully\n{i},b,partially\n" for i in range(3))
    (folder / "judgements.csv").write_text(table)
    (folder / "task.yaml").write_text(
        "name: t\ndata: asked.jsonl\nmetric: contains\nmax_tokens: 3\n"
    )
    asked = [{"content": [{"type": "text", "text": "say a"}], "answers": ["a"]}] * 2
    _write_lines(folder / "asked.jsonl", asked)
    done.touch()
    return project


def _write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _bases(project: TinyProject, folder: Path) -> dict[tuple[str, ...], list[str]]:
    """A command of each verb that works. OUT stands for a folder that does not exist yet."""
    small = ["training.steps=2", "training.batch_size=2", "training.log_every_steps=1"]
    checkpoint = str(folder / "exported")
    prompts, answers = folder / "prompts.jsonl", folder / "answers" / "documents.jsonl"
    bases: dict[tuple[str, ...], list[object]] = {
        ("tokenizer", "text"): [
            *(project.documents, "--output", "OUT"),
            *("--vocab-size", 352, "--image-codes", IMAGE_CODES),
        ],
        ("tokenizer", "image"): [
            *(project.documents, "--output", "OUT"),
            *("--config", folder / "image.yaml", "--seed", 1, *small),
        ],
        ("preprocess",): [
            *(project.documents, "--tokenizer", project.tokenizer),
            *("--output", "OUT/tokens"),
        ],
        ("inspect",): [project.tokens, "--html", "OUT/page.html", "--documents", 2],
        ("data", "audit"): [project.config, "--step", 1],
        ("config", "check"): ["chameleon_7b"],
        ("plan",): ["chameleon_7b", "--gpus", 64, "--gpu", "h100"],
        ("train",): [project.config, *STEPS, "logging.run_dir=OUT/run"],
        ("convert",): [checkpoint, "OUT", "--to", "meta", "--no-verify"],
        ("verify",): [checkpoint, folder / "run"],
        ("generate",): [
            *(checkpoint, "--prompt", "a", "--max-tokens", 3),
            *("--force", "text", "--output", "OUT"),
        ],
        ("evaluate",): [
            *(checkpoint, "--tasks", folder / "task.yaml", "--data", folder),
            *("--output", "OUT", "--limit", 1),
        ],
        ("annotate", "answer"): [
            *(checkpoint, prompts, "--output", "OUT", "--max-tokens", 3, "--force", "text"),
        ],
        ("annotate", "prepare"): ["absolute", answers, "--output", "OUT"],
        ("annotate", "score"): [folder / "judgements.csv", "--kind", "absolute"],
        ("plot",): [folder / "run", "--output", "OUT/x.png"],
    }
    return {verb: [str(word) for word in words] for verb, words in bases.items()}


def _cells(project: TinyProject, folder: Path) -> Iterator[Cell]:
    bases = _bases(project, folder)
    for verb, base in bases.items():
        yield Cell(f"{' '.join(verb)} (as it is)", "", [*verb, *base], image="image" in verb)
    for option in options():
        base = bases.get(option.verb)
        if base is None:  # doctor and others without values to set
            continue
        kind = option.action.type
        limits = ends(kind.constraint) if isinstance(kind, NumberOption) else []
        for value in (*VALUES, *limits):
            yield Cell(str(option), value, [*option.verb, *_replace(base, option, value)])
    yield from _config_cells(project)
    yield from _image_cells(bases)


def _replace(base: list[str], option: "object", value: str) -> list[str]:
    """The command with an option's value replaced or added, or with its first argument replaced."""
    strings = option.action.option_strings  # type: ignore[attr-defined]
    if not strings:
        if option.action.dest == "overrides":  # type: ignore[attr-defined]
            return [*base, value]
        return [value, *base[1:]]
    words = list(base)
    for name in strings:
        if name in words:
            at = words.index(name)
            del words[at : at + 2]
    return [*words, f"{strings[-1]}={value}"]


def _config_cells(project: TinyProject) -> Iterator[Cell]:
    from megatron_chameleon.config.schema import Config

    base = ["train", str(project.config), *STEPS, "logging.run_dir=OUT/run"]
    for key, hint in config_keys(Config):
        extra = next((words for start, words in NEEDED.items() if key.startswith(start)), [])
        for value in (*VALUES, *_ends(hint)):
            word = f"{key}=OUT/{value}" if key == "logging.run_dir" else f"{key}={value}"
            if typing.get_origin(hint) is list:
                word = f"{key}=[{value},{value}]"
            words = [*base, *extra, word]
            yield Cell(key, value, [*words, "--dry-run"], then=words)
    for key, _ in config_keys(Config):
        if "[0]" not in key:
            listed = [*base, f"{key}=[0,-1]"]
            yield Cell(key, "[0,-1]", [*listed, "--dry-run"], then=listed)


def _image_cells(bases: dict[tuple[str, ...], list[str]]) -> Iterator[Cell]:
    from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig

    verb = ("tokenizer", "image")
    for key, hint in config_keys(ImageTokenizerConfig):
        extra = ["training.discriminator_weight=1"] if "discriminator" in key else []
        extra += ["training.discriminator_layers=0"] if key.endswith("_weight") else []
        for value in (*VALUES, *_ends(hint)):
            word = f"{key}=[{value}]" if key == "model.ch_mult" else f"{key}={value}"
            words = [*verb, *bases[verb], *extra, word]
            yield Cell(f"image {key}", value, words, image=True)


def _ends(hint: Any) -> list[str]:
    """The ends of the constraint in a field's type hint."""
    for found in (hint, without_null(hint), *typing.get_args(hint)):
        for note in getattr(found, "__metadata__", ()):
            if isinstance(note, Constraint):
                return ends(note)
    return []


def _run(cell: Cell, folder: Path) -> tuple[str, str]:
    """The class of a cell, and what it printed."""
    found, detail = _run_words(cell.words, folder, cell.image)
    if found == "works" and cell.then:
        found, detail = _run_words(cell.then, folder, cell.image)
        detail = f"after --dry-run: {detail}"
    return found, detail


def _run_words(words: list[str], folder: Path, image: bool) -> tuple[str, str]:
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    words = [word.replace("OUT", str(output)) for word in words]
    start = time.monotonic()
    try:
        result = run_chameleon(*words, succeeds=False)
    except AssertionError as error:
        if _trains_on(output):
            return "works", "it was still training"
        return "hang", str(error)[-300:].replace("\n", " | ")
    seconds = time.monotonic() - start
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    shown = " | ".join(errors or lines[-3:])[:300]
    if "Traceback" in result.stderr:
        return "traceback", " | ".join(lines[-3:])[:500]
    if result.returncode == 0:
        bad = _not_finite(output, image)
        return ("silent", bad) if bad else ("works", "")
    if result.returncode != 2:
        return f"code {result.returncode}", shown
    if not errors:
        return "unclear", shown
    if seconds > LIMIT_SECONDS and "step" not in errors[0]:
        return "slow", f"{seconds:.1f} s: {shown}"
    return ("refused" if len(errors) == 1 else "lines"), shown


def _trains_on(output: Path) -> bool:
    """Whether a command that was killed had done more than two steps."""
    metrics = output / "run" / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_text().splitlines()) > 2


def _not_finite(output: Path, image: bool) -> str:
    """The first value of the run or the weights that is not finite; empty if there is none."""
    for path in output.glob("run/metrics.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            for key in ("loss", "grad_norm", "learning_rate"):
                if not math.isfinite(record.get(key) or 0.0):
                    return f"{key} is {record[key]} at step {record.get('step')}"
    if image and (output / "image.safetensors").exists():
        from safetensors.numpy import load_file

        for name, tensor in load_file(output / "image.safetensors").items():
            if not bool((abs(tensor) < math.inf).all()):
                return f"{name} is not finite"
    return ""


if __name__ == "__main__":
    main()
