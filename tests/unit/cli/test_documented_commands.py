"""Every ``chameleon`` command in README, docs, ``--help`` and the comments of examples parses.

Its options exist, its config keys are known, and the project's files that it names exist. ``...``
and CONFIG stand for the reader's own files.
"""

import os
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_chameleon.checkpoint.formats import FORMATS
from megatron_chameleon.cli.examples import EXAMPLES
from megatron_chameleon.cli.main import OVERRIDE, VERBS, build_parser
from megatron_chameleon.cli.main import commands as commands_of
from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.names import find_config
from megatron_chameleon.evaluation.tasks.catalogue import find_task
from places import REPOSITORY

PAGES = [
    *(REPOSITORY / "docs").rglob("*.md"),
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *(REPOSITORY / "slurm").glob("*.sbatch"),
    *(REPOSITORY / "examples").glob("*/*.yaml"),
    *(REPOSITORY / "examples").glob("*/*.sh"),
]
# what a script of slurm/ puts in front of the words that it is given
SCRIPTS = {
    "pretrain_7b": ["train", "CONFIG"],
    "pretrain_34b": ["train", "CONFIG"],
    "sft": ["train", "CONFIG"],
    "convert": ["convert"],
    "preprocess_array": ["preprocess"],
    "serve": ["serve"],
}
NUMBERS = {"N": "1", "X": "1"}  # of a synopsis; of hf|meta, the first
VARIABLES = {
    "SLURM_ARRAY_TASK_ID": "0",
    "RUN": "runs/digits",
    "SEED": "1",
    "HERE": "examples/digits",
}


def lines_of(page: Path) -> list[str]:
    """The lines of code blocks, or all lines of scripts and YAML; continued lines are joined."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        indented = re.findall(r"^    (.*)$", text, re.MULTILINE)
        lines = "\n".join([*(block for kind, block in fenced if kind in ("", "bash")), *indented])
    else:
        lines = re.sub(r"^#(?!SBATCH|!) ?", "", text, flags=re.MULTILINE)
    return lines.replace("\\\n", " ").splitlines()


def commands(page: Path) -> list[list[str]]:
    """The words after ``chameleon`` in each command, with shell variables filled in."""
    found, variables = [], dict(VARIABLES)
    for line in lines_of(page):
        if assigned := re.fullmatch(r'(\w+)=(?:"([^"]*)"|(\S*))', line.strip()):
            variables[assigned[1]] = assigned[2] or assigned[3] or ""
        line = re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], ""), line)
        line = re.sub(r'\s*(["\s])\S*\[@\]\S*', r"\1", line)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # prose with an apostrophe
        if words := _behind_chameleon(words):
            end = next((i for i, word in enumerate(words) if word in ("|", ">", "&&")), len(words))
            dots = [word == "..." and before[:2] != "--" for before, word in pairwise(["", *words])]
            words = [
                word.strip("[]") for word, dot in zip(words[:end], dots, strict=False) if not dot
            ]
            found.append([NUMBERS.get(word, word.split("|")[0]) for word in words])
    return found


def _behind_chameleon(words: list[str]) -> list[str]:
    for index, word in enumerate(words):
        script = re.fullmatch(r"slurm/(\w+)\.sbatch", word)
        if script and "sbatch" in words[:index]:
            return [*SCRIPTS[script[1]], *words[index + 1 :]]
        starts = index == 0 or words[0] in ("torchrun", "srun", "mpiexec", "deepspeed", "python")
        starts |= all("=" in before for before in words[:index])
        if word in ("chameleon", "megatron_chameleon") and starts:
            rest = words[index + 1 :]
            return rest if rest and rest[0] in VERBS else []
    return []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(page):
        check_parses(words, capsys)


def check_parses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Raise an error if the command line ``words`` behind ``chameleon`` would be refused."""
    parser = build_parser(words[0])
    try:
        args, rest = parser.parse_known_args(words)
    except SystemExit:
        raise AssertionError(f"{shlex.join(words)}\n{capsys.readouterr().err}") from None
    overrides = [word for word in rest if OVERRIDE.fullmatch(word)]
    assert rest == overrides, f"{shlex.join(words)}: unknown {rest}"
    overrides += getattr(args, "overrides", [])
    if words[0] in ("train", "plan", "config"):  # the other verbs' keys are not the run's
        load_config(_config_of(args.config), overrides)
    if words[0] == "evaluate":
        names = re.findall(r"(?:^|,)([a-z0-9_]+)(?=,|$)", args.tasks)
        assert names == ["list"] or all(find_task(name) for name in names), names
    if words[0] == "convert":
        assert args.to in (*FORMATS, "FORMAT"), args.to


def _config_of(name: str) -> Path:
    """The named file or preset, or one in place of the reader's own."""
    if name.startswith("examples/"):
        return REPOSITORY / name
    return find_config(name if name.startswith("chameleon_") else "chameleon_7b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_of_the_project_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"\b(?:examples|slurm|benchmarks|tests|tools|docs)/[\w/]+\.\w+", text)
    missing = [name for name in names if not os.path.lexists(REPOSITORY / name)]
    assert [name for name in missing if "NAME" not in name] == []  # NAME is the reader's


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_each_help_ends_with_two_examples(
    verb: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    for parser in commands_of(build_parser(verb)):
        name = parser.prog.removeprefix("chameleon").strip()
        if verb is not None and not name.startswith(verb):
            continue  # another verb, whose arguments this parser does not have
        if verb is None and name:
            continue
        assert name in EXAMPLES, f"cli/examples.py has no examples of `{parser.prog}`"
        text = parser.format_help()
        shown = text[text.rindex("\nexamples:\n") :].replace("\\\n", " ").splitlines()
        lines = [line.split(">")[0] for line in shown if line.startswith("  chameleon ")]
        found = [shlex.split(line) for line in lines]
        assert len(found) == 2 and found[0] != found[1]
        for words in found:
            if name:
                assert words[1 : 1 + len(name.split())] == name.split()
            if "--help" not in words:
                check_parses(words[1:], capsys)
        assert all(len(line) <= 88 for line in text[text.rindex("\nexamples:\n") :].splitlines())


def test_no_examples_are_left_of_a_command_that_is_gone() -> None:
    names = {
        parser.prog.removeprefix("chameleon").strip()
        for verb in VERBS
        for parser in commands_of(build_parser(verb))
    }
    assert set(EXAMPLES) == names


def test_there_are_commands_to_look_at() -> None:
    verbs = [words[0] for page in PAGES for words in commands(page)]
    assert len(verbs) > 60 and verbs.count("train") > 15
    assert {"preprocess", "convert", "plan", "plot", "generate", "tokenizer"} <= set(verbs)
