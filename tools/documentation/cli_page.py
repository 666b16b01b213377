"""The command reference: every verb, action and option, from the parsers themselves."""

import argparse
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_chameleon.cli.examples import examples_text
from megatron_chameleon.cli.main import VERBS, build_parser
from megatron_chameleon.cli.options import add_common_options
from tools.documentation.text import block, code, escaped, prose

_COMMON_PAGE = "index"


@dataclass(frozen=True)
class Command:
    """A verb, or an action of one."""

    words: str
    """Behind ``chameleon``, such as ``tokenizer text``."""
    parser: argparse.ArgumentParser

    @property
    def arguments(self) -> list[argparse.Action]:
        """What the command takes, without ``--help`` and what all commands take."""
        common = _common_options()
        return [
            action
            for action in self.parser._actions
            if not isinstance(action, argparse._SubParsersAction)
            and action.help != argparse.SUPPRESS
            and not common & set(action.option_strings)
        ]


def cli_pages() -> dict[str, str]:
    """The text of each page by its name: ``index``, and one for each verb."""
    return {_COMMON_PAGE: _index(), **{verb: _page(verb) for verb in VERBS}}


def commands_of(verb: str) -> list[Command]:
    """The verb and its actions, in the order of its help."""
    return list(_commands(verb, _parser_of(verb)))


def _commands(words: str, parser: argparse.ArgumentParser) -> Iterator[Command]:
    yield Command(words, parser)
    for name, inner in _actions(parser).items():
        yield from _commands(f"{words} {name}", inner)


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _parser_of(verb: str) -> argparse.ArgumentParser:
    return _actions(build_parser(verb))[verb]


def _common_options() -> set[str]:
    parser = argparse.ArgumentParser()
    add_common_options(parser)
    return {option for action in parser._actions for option in action.option_strings}


def _index() -> str:
    rows = [f"| [{verb}]({verb}.md) | {escaped(summary)} |" for verb, summary in VERBS.items()]
    common = argparse.ArgumentParser()
    add_common_options(common)
    options = [line for action in common._actions for line in argument_lines(action)]
    return "\n".join(
        [
            "# Commands",
            "",
            "`chameleon VERB --help` prints what these pages say. The exit code is 0 after "
            "success, 2 after a mistake of yours or a fault of the machine, which is reported in "
            "one line, 1 after a bug of ours, and 128 + the signal's number after a signal.",
            "",
            "| verb | what it does |",
            "|---|---|",
            *rows,
            "",
            "## Options of every verb",
            "",
            *options,
        ]
    )


def _page(verb: str) -> str:
    lines = [f"# chameleon {verb}", ""]
    for command in commands_of(verb):
        if command.words != verb:
            lines += [f"## chameleon {command.words}", ""]
        lines += [prose(command.parser.description or ""), "", block(_usage(command)), ""]
        for action in command.arguments:
            lines += argument_lines(action)
        lines += _notes(command.parser.epilog or "")
        lines += _examples(command)
    lines += ["[Options of every verb](index.md#options-of-every-verb)"]
    return "\n".join(lines)


def _notes(epilog: str) -> list[str]:
    """The paragraphs below the options; an indented one is code."""
    lines = []
    for paragraph in re.split(r"\n{2,}", epilog.strip("\n")):
        if paragraph:
            is_code = paragraph.startswith("  ")
            lines += [block(textwrap.dedent(paragraph)) if is_code else prose(paragraph), ""]
    return lines


def _examples(command: Command) -> list[str]:
    text = examples_text(f"chameleon {command.words}")
    examples = textwrap.dedent(text.partition("examples:\n")[2])
    return ["Examples:", "", block(examples, "bash"), ""] if examples else []


def _usage(command: Command) -> str:
    """``chameleon train CONFIG [--dry-run] ...`` in lines of at most 88 characters."""
    formatter = argparse.HelpFormatter(f"chameleon {command.words}", width=88)
    arguments = [*command.arguments]
    arguments += [a for a in command.parser._actions if isinstance(a, argparse._SubParsersAction)]
    formatter.add_usage(None, arguments, command.parser._mutually_exclusive_groups, prefix="")
    return re.sub(r"^-h ", "", formatter.format_help()).strip()


def argument_lines(action: argparse.Action) -> list[str]:
    """A definition: the argument's names, then what it is."""
    text = action.help or ""
    parts = [prose(text % _values(action)) if text else ""]
    if action.choices is not None and not _names_choices(action):
        parts.append("One of " + ", ".join(code(str(choice)) for choice in action.choices) + ".")
    if (default := _default(action)) and "default" not in text:
        parts.append(f"Default: {code(default)}.")
    name = argument_name(action)
    body = " ".join(_sentence(part, name) for part in parts if part)
    return [f"**{code(name)}**", f":   {body}", ""]


def _sentence(text: str, name: str) -> str:
    """The text with a capital letter, unless its first word is a value of the argument."""
    first = re.split(r"[\s:,]", text)[0]
    begins = text[0] if first in re.split(r"[^\w-]+", name) else text[0].upper()
    return begins + text[1:] + ("" if text.endswith((".", "?")) else ".")


def argument_name(action: argparse.Action) -> str:
    """``--shards N``, ``source`` or ``-o DIR, --output DIR``."""
    value = argparse.HelpFormatter("")._format_args(
        action, action.metavar if isinstance(action.metavar, str) else action.dest
    )
    if not action.option_strings:
        return value
    return ", ".join(
        f"{option} {value if action.nargs != 0 else ''}".strip() for option in action.option_strings
    )


def _values(action: argparse.Action) -> dict[str, object]:
    values = {name: value for name, value in vars(action).items() if value is not argparse.SUPPRESS}
    if action.choices is not None:
        values["choices"] = ", ".join(map(str, action.choices))
    return {**values, "prog": "chameleon"}


def _names_choices(action: argparse.Action) -> bool:
    """Whether the help or the metavar has all choices already."""
    told = f"{action.help} {argument_name(action)}"
    return all(str(choice) in told for choice in action.choices or ())


def _default(action: argparse.Action) -> str:
    if action.default in (None, argparse.SUPPRESS, False, True, "", ()) or action.default == []:
        return ""
    if isinstance(action.default, list | tuple):
        return " ".join(map(str, action.default))
    return str(action.default)
