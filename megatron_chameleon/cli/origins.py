"""Where the pages of a verb come from: its command, and the time."""

import argparse
from datetime import UTC, datetime

from megatron_chameleon.masking import masked_command
from megatron_chameleon.pages.page import Origin


def page_origin(args: argparse.Namespace, name: str = "", seed: int | None = None) -> Origin:
    """The origin of a page that a verb writes now.

    Args:
        args: Of the verb; ``main`` keeps the words of the command in it.
        name: What the page is about, if the verb knows it.
        seed: Of what the verb draws.
    """
    return Origin(masked_command(["chameleon", *args.words]), datetime.now(UTC), name, seed)
