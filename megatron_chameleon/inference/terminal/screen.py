"""Show answers while they grow."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from PIL import Image

from megatron_chameleon.inference.terminal.detection import blocks, find_pictures
from megatron_chameleon.inference.terminal.pictures import Pictures, picture
from megatron_chameleon.masking import mask_secrets
from megatron_chameleon.terminal import escape_line, escape_text


class Screen:
    """Where a conversation is shown.

    What the model wrote is shown without the characters that a terminal would obey; into a pipe it
    goes as it is.

    Args:
        out: For answers.
        errors: For errors, and for notes if nobody sits at a terminal.
        is_interactive: Whether somebody sits at a terminal that both lead to.
        pictures: How to show images; None asks the terminal at the first image.
        environment: The process's.
    """

    def __init__(
        self,
        out: TextIO,
        errors: TextIO,
        is_interactive: bool,
        pictures: Pictures | None,
        environment: Mapping[str, str],
    ) -> None:
        self._out, self._errors, self._is_interactive = out, errors, is_interactive
        self._escape: Callable[[str], str] = escape_text if out.isatty() else str
        self._pictures = pictures if is_interactive or pictures else Pictures.NONE
        self._environment = environment
        self._is_line_open = False
        self._has_progress = False

    def text(self, text: str) -> None:
        """Show the next characters of an answer."""
        self._end_progress()
        self._print(self._escape(text))
        self._is_line_open = not text.endswith("\n")

    def progress(self, share: float) -> None:
        """Show how far an image is drawn, in place of the last such line."""
        if self._is_interactive:
            self._end_line()
            self._print(f"\r[image: {share:.0%}]\x1b[K")
            self._has_progress = True

    def image(self, image: Image.Image, name: Path | None) -> None:
        """Show an image of the answer, and the name of its file."""
        self._end_progress()
        self._end_line()
        size = shutil.get_terminal_size()
        self._print(picture(image, self._how(), size.columns, size.lines))
        if name is not None:
            self._print(f"[image: {escape_line(name)}]\n")

    def end_answer(self) -> None:
        self._end_progress()
        self._end_line()

    def note(self, line: str) -> None:
        """Show a line that is not part of an answer."""
        self.end_answer()
        file = self._out if self._is_interactive else self._errors
        print(escape_text(line), file=file, flush=True)

    def error(self, line: str) -> None:
        """Show an error, as the command shows all of its errors."""
        self.end_answer()
        print(f"error: {escape_line(mask_secrets(line))}", file=self._errors, flush=True)

    def _how(self) -> Pictures:
        if self._pictures is None:
            try:
                descriptor = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
            except OSError:
                return blocks(self._environment)
            try:
                self._pictures = find_pictures(descriptor, self._environment)
            finally:
                os.close(descriptor)
        return self._pictures or blocks(self._environment)

    def _end_line(self) -> None:
        if self._is_line_open:
            self._print("\n")
            self._is_line_open = False

    def _end_progress(self) -> None:
        if self._has_progress:
            self._print("\r\x1b[K")
            self._has_progress = False

    def _print(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
