"""The generated reference has every config key, verb and option, each with an explanation."""

import argparse
import dataclasses
import re
import typing
from collections.abc import Iterator

import pytest

import megatron_chameleon
from megatron_chameleon.cli.examples import EXAMPLES
from megatron_chameleon.cli.main import VERBS, build_parser
from megatron_chameleon.config.schema import Config
from tools.documentation.api_page import PAGES
from tools.documentation.cli_page import argument_name, cli_pages, commands_of
from tools.documentation.config_page import FILES, ConfigFile, anchor, config_pages, keys_of

TEXTS = config_pages()
COMMANDS = cli_pages()


def fields_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key by the value that it has, found in another way than the page's."""
    for field in dataclasses.fields(cls):
        hint = str(typing.get_type_hints(cls)[field.name])
        inner = [c for c in known_dataclasses() if f"{c.__module__}.{c.__qualname__}" in hint]
        if not inner or "list" in hint:
            yield f"{prefix}{field.name}"
        for one in inner:
            yield from fields_of(one, f"{prefix}{field.name}{'[]' if 'list' in hint else ''}.")


def known_dataclasses() -> set[type]:
    modules = {file.cls.__module__ for file in FILES} | {"megatron_chameleon.config.finetuning"}
    modules.add("megatron_chameleon.tokenizer.image.vqgan")
    found = set()
    for name in modules:
        module = __import__(name, fromlist=["_"])
        found |= {c for c in vars(module).values() if dataclasses.is_dataclass(c)}
    return {c for c in found if isinstance(c, type)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_key_is_there_once(file: ConfigFile) -> None:
    listed = re.findall(r"^### `([^`]+)`", TEXTS[file.name], re.MULTILINE)
    assert sorted(listed) == sorted(fields_of(file.cls))
    assert len(listed) == len(set(map(anchor, listed)))  # no two share an anchor
    assert [key.name for key in keys_of(file.cls) if not key.explanation] == []


def test_the_config_has_the_keys_that_everybody_needs() -> None:
    names = {key.name for key in keys_of(Config)}
    assert {"optimizer.lr", "data.stage1[].weight", "adapter.rank", "dpo.beta"} <= names
    assert len(names) > 120


def test_a_key_says_what_it_may_be_and_where_it_comes_from() -> None:
    entry = TEXTS["config"].split("### `model.norm_order`")[1].split("###")[0]
    for words in (
        'default `"pre"`',
        "one of pre, swin",
        "paper: pre (7B), swin (34B)",
        "f(norm(x))",
    ):
        assert words in entry
    assert "whole number or null · default `null`" in TEXTS["config"]
    assert "0 or more and below 1" in TEXTS["config"]


def actions_of(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, str]]:
    """Every option and argument of a parser and of those inside of it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from actions_of(inner, f"{words} {name}")
        elif action.help != argparse.SUPPRESS and action.dest != "help":
            yield words, argument_name(action)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_is_there(verb: str) -> None:
    subparsers = build_parser(verb)._subparsers
    assert subparsers is not None
    (group,) = subparsers._group_actions
    assert isinstance(group.choices, dict)
    page, common = COMMANDS[verb], COMMANDS["index"]
    sections = dict(re.findall(r"^##? chameleon ([^\n]+)\n(.*?)(?=^##? |\Z)", page, re.M | re.S))
    assert list(sections) == [command.words for command in commands_of(verb)]
    for words, name in actions_of(group.choices[verb], verb):
        assert f"**`{name}`**\n:   " in sections[words] or f"**`{name}`**\n:   " in common, name


def test_every_verb_is_in_the_table_and_every_argument_is_explained() -> None:
    for verb, summary in VERBS.items():
        assert f"| [{verb}]({verb}.md) | {summary[:10]}" in COMMANDS["index"]
    unexplained = re.findall(r"\*\*`([^`]+)`\*\*\n:  *\n", "\n".join(COMMANDS.values()))
    assert unexplained == []


def test_the_examples_of_the_help_are_there() -> None:
    joined = {verb: re.sub(r" \\\n +", " ", page) for verb, page in COMMANDS.items()}
    for words, examples in EXAMPLES.items():
        for what, command in examples if words else ():
            assert f"# {what}\nchameleon {command}\n" in joined[words.split()[0]]
    assert "\n```\nbash, ~/.bashrc " in COMMANDS["completion"]  # an indented note is code


def test_help_is_not_read_as_markup() -> None:
    assert r"step\_..." in COMMANDS["convert"]
    assert not re.search(r"%\(\w+\)s", "\n".join(COMMANDS.values()))


def test_the_python_reference_has_all_public_names() -> None:
    (page,) = PAGES.values()
    shown = [name for group in page.groups for name in group.names]
    assert sorted(shown) == megatron_chameleon.__all__
    assert shown[0] == "Session" and {"convert", "train"} <= set(shown)
