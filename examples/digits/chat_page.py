"""The report's section about conversations: figures and some of the conversations themselves."""

from collections.abc import Sequence

from chat_figures import ChatFigures, Talk, Turn

from megatron_chameleon.images.png import png_bytes
from megatron_chameleon.pages.elements import cards, escape, heading, how, image

SHOWN = 12
"""Conversations on the page."""
STYLE = """
.chats { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.chats div { display: flex; flex-direction: column; gap: .3rem; font-size: .85rem; }
.chats p { margin: 0; padding: .3rem .6rem; border: 1px solid; border-radius: .6rem; }
.chats p.user { align-self: flex-end; border-style: dashed; }
.chats p.model { align-self: flex-start; }
.chats img { width: 40px; height: 40px; image-rendering: pixelated; vertical-align: middle; }
"""


def chat_sections(chats: ChatFigures) -> list[str]:
    """The elements of the section."""
    found = (
        (chats.drawings.right, "of requested drawings right"),
        (chats.second_drawings.right, "of second drawings right"),
        (chats.readings.right, "of held-out digits named"),
        (chats.recalled.right, "of drawings remembered"),
        (chats.sums.right, "of sums right"),
    )
    return [
        heading("In conversations"),
        how(
            "The same model was asked as users ask, in many phrasings, and chose by itself whether",
            "to write or to draw. An SVM reads the drawings. `chameleon serve` has a page to try",
            "it. A user's messages have dashed borders.",
        ),
        cards((f"{share:.1%}", name) for share, name in found),
        f'<div class="chats">{"".join(_conversation(c) for c in _examples(chats))}</div>',
    ]


def _examples(chats: ChatFigures) -> list[list[Turn]]:
    """Conversations of each kind in turn, evenly spread over the digits."""
    kinds = (chats.second_drawings, chats.readings, chats.recalled, chats.sums)
    each = SHOWN // len(kinds)
    spread = [_spread(talk, each) for talk in kinds]
    return [turns for row in zip(*spread, strict=True) for turns in row]


def _spread(talk: Talk, count: int) -> list[list[Turn]]:
    step = max(1, len(talk.turns) // count)
    return talk.turns[step // 2 :: step][:count]


def _conversation(turns: Sequence[Turn]) -> str:
    who = ("user", "model")
    messages = (f'<p class="{who[i % 2]}">{_message(turn)}</p>' for i, turn in enumerate(turns))
    return f"<div>{''.join(messages)}</div>"


def _message(turn: Turn) -> str:
    parts = []
    for part in turn:
        if isinstance(part, str):
            parts.append(escape(part))
            continue
        parts.append(image(png_bytes(part), "a digit"))
    return " ".join(parts) or "(nothing)"
