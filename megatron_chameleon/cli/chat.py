"""``chameleon chat CHECKPOINT``: talk to a model in the terminal, in text and images.

chameleon chat runs/digits
chameleon chat exported/digits --image three.png --prompt "Which digit is this?"
echo "a handwritten three" | chameleon chat exported/digits --force image --output drawn
"""

import argparse
import io
import os
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.cli.asked import (
    add_device_option,
    add_prompt_options,
    check_device,
    prompt_parts,
)
from megatron_chameleon.cli.logs import progress, show
from megatron_chameleon.cli.options import (
    add_checkpoint_argument,
    add_ema_option,
    add_sampling_options,
    add_tokenizer_option,
    generation_options,
)
from megatron_chameleon.cli.ranks import follows

if TYPE_CHECKING:
    from megatron_chameleon.data.documents.image_part import ImagePart
    from megatron_chameleon.data.documents.schema import TextPart
    from megatron_chameleon.inference.chat import PromptFormat
    from megatron_chameleon.inference.engine.options import GenerationOptions
    from megatron_chameleon.inference.session import Session
    from megatron_chameleon.inference.terminal.chat import Chat
    from megatron_chameleon.inference.terminal.lines import Lines

PICTURES = ("auto", "sixel", "kitty", "blocks", "blocks256", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    add_prompt_options(parser, "the first message")
    parser.add_argument(
        "--system", metavar="TEXT", default="", help="text before the first message"
    )
    parser.add_argument(
        "--format",
        choices=("chat", "document"),
        help="chat: messages are the turns of a conversation; document: they are the beginning of "
        "a document, which the model continues (default: what the model was trained on)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="chat-images",
        help="folder for the images of answers (default: chat-images)",
    )
    parser.add_argument(
        "--pictures",
        choices=PICTURES,
        default="auto",
        help="how to show images in the terminal (default: ask it what it can do)",
    )
    add_ema_option(parser)
    add_sampling_options(parser)
    add_tokenizer_option(parser)
    add_device_option(parser)


def run(args: argparse.Namespace) -> None:
    """Answer the messages that somebody types, or the lines of a pipe."""
    if follows(args):
        return
    from megatron_chameleon.images.options import ImageOptions
    from megatron_chameleon.inference.job import open_session
    from megatron_chameleon.inference.terminal.chat import COMMANDS
    from megatron_chameleon.inference.terminal.lines import Lines, line_editing
    from megatron_chameleon.outputs import check_output_folder

    options = generation_options(args)
    check_device(args)
    check_output_folder("--output", args.output)
    first = prompt_parts(args, ImageOptions(), args.prompt)
    source = sys.stdin or io.StringIO()  # it may have been closed
    is_interactive = source.isatty() and sys.stdout.isatty()
    with closing(
        open_session(args.checkpoint, args.device, args.tokenizer, ema=args.ema)
    ) as session:
        chat = _open(args, session, options, is_interactive)
        lines = Lines(source, is_interactive)
        if first:
            _ask(chat, first)
        if is_interactive:
            with line_editing(list(COMMANDS), os.environ):
                _talk(chat, lines)
            return
        while (line := lines.read()) is not None and chat.take(line):
            pass
        chat.end()
    if chat.failed:
        sys.exit(2)


def _open(
    args: argparse.Namespace,
    session: "Session",
    options: "GenerationOptions",
    is_interactive: bool,
) -> "Chat":
    from megatron_chameleon.inference.chat import PromptFormat
    from megatron_chameleon.inference.conversation import Conversation
    from megatron_chameleon.inference.terminal.chat import Chat
    from megatron_chameleon.inference.terminal.pictures import Pictures
    from megatron_chameleon.inference.terminal.screen import Screen

    form = PromptFormat(args.format) if args.format else session.prompt_format
    pictures = None if args.pictures == "auto" else Pictures(args.pictures)
    screen = Screen(sys.stdout, sys.stderr, is_interactive, pictures, os.environ)
    progress(_greeting(session, form))
    return Chat(
        session,
        Conversation(session.tokenizer, form, args.system),
        options,
        screen,
        Path(args.output),
        finds_paths=is_interactive,
        is_interruptible=is_interactive,
    )


def _greeting(session: "Session", form: "PromptFormat") -> str:
    """What the model takes a message for."""
    from megatron_chameleon.inference.chat import PromptFormat
    from megatron_chameleon.wording import counted

    trained = f"{session.step:,} updates"
    if session.has_adapter:
        trained = f"an adapter trained for {counted(session.step, 'step')}"
    context = f"{trained}, a context of {session.context_tokens:,} tokens"
    if form is PromptFormat.CHAT:
        return f"{context}. Messages are turns of a conversation (/help shows the commands)"
    reason = ""
    if session.prompt_format is PromptFormat.DOCUMENT:
        reason = ": the model was not trained on conversations"
    return f"{context}. A message is the beginning of a document{reason} (/help)"


def _ask(chat: "Chat", parts: "list[TextPart | ImagePart]") -> None:
    from megatron_chameleon.errors import ChameleonError

    try:
        chat.ask(parts)
    except ChameleonError as error:
        chat.report(error)


def _talk(chat: "Chat", lines: "Lines") -> None:
    """Take messages until the end; Ctrl-C while somebody types drops the line."""
    while True:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            line = lines.read()
        except KeyboardInterrupt:
            show("\n(Ctrl-D or /quit leaves)")
            continue
        finally:
            signal.signal(signal.SIGINT, before)
        if line is None:
            show("")
            return
        if not chat.take(line):
            return
