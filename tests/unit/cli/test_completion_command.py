"""What shells complete command lines with, and the scripts that ask for it."""

import argparse
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_chameleon.checkpoint.formats import FORMATS
from megatron_chameleon.cli.completing import Finder, complete
from megatron_chameleon.cli.completion import SHELLS
from megatron_chameleon.cli.main import VERBS, build_parser, commands, main
from megatron_chameleon.config.keys import config_keys
from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.names import find_config
from megatron_chameleon.config.schema import Config
from places import REPOSITORY

FP8 = ("e4m3", "hybrid", "null")
Words = Callable[[str], list[str]]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """What a line is completed with, in a folder with a few files of each kind."""
    folder = tmp_path / "work"
    (folder / "runs" / "mine").mkdir(parents=True)
    for name in ("train.yaml", "notes.txt", ".hidden", "tokens.idx", "tokens.bin", "a b.jsonl"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    answer = tmp_path / "answer"
    # by itself it takes and closes file descriptor 9, whatever that is here
    monkeypatch.setattr(Finder, "_init_debug_stream", lambda self: None)
    monkeypatch.setattr("argcomplete.io.debug_stream", io.StringIO())

    def ask(line: str) -> list[str]:
        monkeypatch.setenv("_ARGCOMPLETE", "1")
        monkeypatch.setenv("_ARGCOMPLETE_SUPPRESS_SPACE", "1")
        monkeypatch.setenv("_ARGCOMPLETE_IFS", "\n")
        monkeypatch.setenv("_ARGCOMPLETE_STDOUT_FILENAME", str(answer))
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        codes: list[int] = []
        complete(build_parser, VERBS, codes.append)
        assert codes == [0]
        return answer.read_text(encoding="utf-8").splitlines()

    return ask


def test_verbs_are_completed(words: Words) -> None:
    assert words("chameleon ") == list(VERBS)
    assert words("chameleon evaluate") == ["evaluate", "evaluate-loss", "evaluate-modalities"]
    assert words("chameleon nothing") == []


@pytest.mark.parametrize("verb", VERBS)
def test_all_options_actions_and_choices_of_a_verb_are_completed(verb: str, words: Words) -> None:
    for parser in commands(build_parser(verb)):
        if not f"{parser.prog} ".startswith(f"chameleon {verb} "):
            continue
        options = {name for action in parser._actions for name in action.option_strings}
        assert set(words(f"{parser.prog} -")) == options
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                assert words(f"{parser.prog} ") == list(action.choices)
            elif action.choices and action.option_strings:
                line = f"{parser.prog} {action.option_strings[-1]} "
                assert set(words(line)) == set(map(str, action.choices))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("train ", ["chameleon_34b", "chameleon_7b", "runs/", "train.yaml"]),
        ("train chameleon_7", ["chameleon_7b"]),
        ("train --resume ", ["auto", "never", "runs/"]),
        ("train --resume=n", ["--resume=never"]),
        ("tokenizer image --config d", ["digits"]),
        ("tokenizer image runs/ training.ste", ["training.steps="]),
        ("inspect tok", ["tokens"]),
        ("evaluate-loss runs/mine --data ", ["runs/", "tokens"]),
        ("preprocess a", ["a\\ b.jsonl"]),
        ("preprocess .h", [".hidden"]),
        ("report runs/", ["runs/mine/"]),
        ("report nothing/here", []),
        ("report ~nobody-of-that-name/", []),
        ("plan chameleon_7b --gpus ", []),
        ("serve runs/mine --host ", []),
        ("generate runs/mine --device ", ["cpu", "cuda"]),
        ("convert runs/mine out --to ", sorted(FORMATS)),
        ("evaluate runs/mine --tasks piqa,boo", ["piqa,boolq"]),
        ("evaluate runs/mine --tasks piqa,piq", []),
        ("plot runs/mine --keys loss_text,grad_n", ["loss_text,grad_norm"]),
        ("train train.yaml model.norm_o", ["model.norm_order="]),
        ("train train.yaml model.norm_order=", ["model.norm_order=pre", "model.norm_order=swin"]),
        ("train train.yaml --dry-run model.norm_order=s", ["model.norm_order=swin"]),
        ("train train.yaml --dry-run model.no", ["model.norm_order="]),
        (
            "config check train.yaml parallel.sequence_parallel=t",
            ["parallel.sequence_parallel=true"],
        ),
        ("data audit train.yaml --step 3 tokenizer.pa", ["tokenizer.path="]),
        ("plan train.yaml tokenizer.path=ru", ["tokenizer.path=runs/"]),
        ("train train.yaml optimizer.lr=", []),
        ("train train.yaml no.such=", []),
    ],
)
def test_values_are_completed(line: str, found: list[str], words: Words) -> None:
    assert words(f"chameleon {line}") == found


def test_each_key_of_a_config_is_completed_and_its_values_are_valid(words: Words) -> None:
    keys = config_keys(Config)
    assert words("chameleon train train.yaml optimizer.") == [
        f"{key}=" for key in sorted(keys) if key.startswith("optimizer.")
    ]
    path = find_config("chameleon_7b")
    values = [(key, value) for key, known in keys.items() for value in known.values]
    assert len(keys) > 100 and len(values) > 50
    for number in range(max(len(known.values) for known in keys.values())):
        chosen = {k: v.values[number] for k, v in keys.items() if number < len(v.values)}
        load_config(path, [f"{key}={value}" for key, value in chosen.items()])


def run_shell(program: str, *words: str) -> str:
    """What bash prints, with a ``chameleon`` on its PATH."""
    result = subprocess.run([program, *words], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_bash_completes_by_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "bin" / "chameleon"
    command.parent.mkdir()
    command.write_text(
        f"#!/bin/sh\nPYTHONPATH={shlex.quote(str(REPOSITORY))} "
        f'exec {shlex.quote(sys.executable)} -m megatron_chameleon "$@"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    script = """
        eval "$(chameleon completion bash)"
        read -ra registered <<< "$(complete -p chameleon)"
        for COMP_LINE in "chameleon tokeni" "chameleon plan x --gpu h" \\
                "chameleon train chameleon_7b model.norm_order="; do
            COMP_POINT=${#COMP_LINE} COMP_TYPE=9 COMPREPLY=()
            ${registered[-2]} chameleon
            echo "${COMPREPLY[*]}"
        done
    """
    found = run_shell("bash", "--noprofile", "--norc", "-c", script).splitlines()
    words = [sorted(line.split()) for line in found]
    assert words == [["tokenizer"], ["h100", "h200"], ["pre", "swin"]]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_registers_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", shell])
    script = capsys.readouterr().out
    assert {"bash": "complete -o", "zsh": "compdef", "fish": "complete --command"}[shell] in script
    assert "chameleon" in script


def test_without_the_library_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    with pytest.raises(SystemExit) as caught:
        main(["completion", "bash"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: completion: the package argcomplete is not installed. Run: pip install "
        "argcomplete.\n"
    )
