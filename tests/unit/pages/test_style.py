"""One set of colours for all pages, the chat page among them."""

import re

from megatron_chameleon.pages.style import CHOSEN_COLOURS, COLOURS, STYLE
from places import REPOSITORY

CHAT_PAGE = REPOSITORY / "megatron_chameleon" / "inference" / "serving" / "page" / "style.css"


def variables(style: str) -> tuple[set[str], set[str]]:
    """Those that a style sheet uses, and those that it defines."""
    used = set(re.findall(r"var\(--([\w-]+)", style))
    return used, set(re.findall(r"(?<!\()--([\w-]+):", style))


def test_every_variable_is_defined() -> None:
    used, defined = variables(STYLE)
    assert used <= defined
    used, defined = variables(CHAT_PAGE.read_text(encoding="utf-8"))
    assert used <= defined | set(COLOURS)
    assert not defined & set(COLOURS), "the chat page has a colour of its own"


def test_the_chat_page_names_no_colour() -> None:
    style = CHAT_PAGE.read_text(encoding="utf-8")
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b(?![^{]*\{)", style) == []


def test_light_and_dark_can_be_chosen() -> None:
    for name, (light, dark) in COLOURS.items():
        assert f"--{name}: light-dark({light}, {dark});" in CHOSEN_COLOURS
        assert STYLE.count(f"--{name}: {light};") >= 1
        assert STYLE.count(f"--{name}: {dark};") >= 1
