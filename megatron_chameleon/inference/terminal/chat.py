"""Talk to a model: messages and commands in, answers out.

    chat = Chat(session, conversation, options, screen, folder=Path("chat-images"))
    for line in lines:
        if not chat.take(line):
            break

An error is one line, and the conversation goes on from where it was.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from megatron_chameleon.data.documents.image_part import ImageError, ImagePart
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import ChameleonError, ConfigError, DataError
from megatron_chameleon.files import write_text
from megatron_chameleon.inference.answers.answer import content_of, decoded
from megatron_chameleon.inference.answers.stream import (
    AnswerEnd,
    AnswerEvent,
    ImageCodes,
    ImageDone,
    ImageStarted,
    TextDelta,
)
from megatron_chameleon.inference.conversation import Conversation, Part
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.prompts import image_tokenizer_of
from megatron_chameleon.inference.session import Session
from megatron_chameleon.inference.terminal.image_files import save_image
from megatron_chameleon.inference.terminal.paths import read_paths, split_images
from megatron_chameleon.inference.terminal.screen import Screen
from megatron_chameleon.inference.terminal.settings import LARGEST_SEED, changed, described
from megatron_chameleon.inference.terminal.stopping import stopping
from megatron_chameleon.terminal import escape_line
from megatron_chameleon.tokenizer.text.tokenizer import without_surrogates
from megatron_chameleon.wording import counted, shown

COMMANDS = {
    "/help": ("", "show this"),
    "/image": ("FILE...", "put images before the next message; alone, send them with Enter"),
    "/retry": ("", "answer the last message again, with the next seed"),
    "/undo": ("", "take back the last message and its answer"),
    "/reset": ("", "begin a new conversation"),
    "/save": ("FILE", "write the conversation as a document of JSON Lines"),
    "/set": ("[NAME VALUE]", "change how answers are drawn, such as temperature 0.2"),
    "/seed": ("N", "draw the next answer with this seed, the one after it with the next"),
    "/system": ("[TEXT]", "begin a new conversation behind this text"),
    "/quit": ("", "leave, as Ctrl-D does"),
}
"""What follows each command, and what it does."""


class Chat:
    """One conversation.

    Args:
        session: The model.
        conversation: Without messages.
        options: How answers are drawn. The seed is that of the first answer, and each further
            answer has the next one, so a conversation can be repeated.
        screen: Where answers are shown.
        folder: Where images of answers are saved.
        finds_paths: Whether image files that a message names become images.
        is_interruptible: Whether Ctrl-C stops an answer instead of the command.

    Attributes:
        failed: Whether there was an error.
    """

    def __init__(
        self,
        session: Session,
        conversation: Conversation,
        options: GenerationOptions,
        screen: Screen,
        folder: Path,
        *,
        finds_paths: bool = False,
        is_interruptible: bool = False,
    ) -> None:
        self._session, self._conversation, self._options = session, conversation, options
        self._screen, self._folder = screen, folder
        self._finds_paths, self._is_interruptible = finds_paths, is_interruptible
        self._images: list[Part] = []
        """For the next message."""
        self._answers = 0
        """Drawn with the seed and those after it."""
        self.failed = False
        self._commands: dict[str, Callable[[str], object]] = {
            "/help": self._help,
            "/image": self._add_images,
            "/retry": self._retry,
            "/undo": self._undo,
            "/reset": lambda _: self._reset(),
            "/save": self._save,
            "/set": self._set,
            "/seed": self._seed,
            "/system": self._system,
        }

    def take(self, line: str) -> bool:
        """Take a message or a command; returns whether the conversation goes on."""
        word, _, rest = line.strip().partition(" ")
        try:
            if word in ("/quit", "/exit", "/bye"):
                return False
            if self._is_command(line):
                self._run(word, rest.strip())
            elif line.strip() or self._images:
                self.ask(self._parts(line))
        except ChameleonError as error:
            self.report(error)
        return True

    def end(self) -> None:
        """The last line has come. Images that wait for a message are sent alone."""
        if self._images:
            self.take("")

    def ask(self, parts: list[Part]) -> None:
        """Send a message, with the images that wait for it, and show the answer.

        Raises:
            ChameleonError: The message is taken back; its images still wait.
        """
        self._conversation.say([*self._images, *parts])
        is_kept = False
        try:
            is_kept = self._answer()
        finally:
            if not is_kept:
                self._conversation.take_back(1)
        self._images = []

    def report(self, error: ChameleonError) -> None:
        """Show an error."""
        self.failed = True
        for line in error.lines():
            self._screen.error(line)

    # -- messages

    def _is_command(self, line: str) -> bool:
        """A path may begin with a slash too, and so may a message, after another one."""
        line = line.lstrip()
        if not line.startswith("/") or line.startswith("//"):
            return False
        return not (self._finds_paths and isinstance(split_images(line)[0], Path))

    def _parts(self, line: str) -> list[Part]:
        line = line.strip("\n")
        line = line[1:] if line.startswith("//") else line
        if not self._finds_paths:
            return [TextPart(line)] if line.strip() else []
        found = split_images(line)
        parts = [ImagePart(str(p)) if isinstance(p, Path) else TextPart(p) for p in found]
        if len(found) == 1 and isinstance(found[0], str):
            return [TextPart(line)]
        for path in found:
            if isinstance(path, Path):
                self._screen.note(f"({escape_line(path.name)} is sent as an image)")
        return list(parts)

    def _answer(self) -> bool:
        """Answer the last message; returns False if there is no answer to keep."""
        options = replace(self._options, seed=(self._options.seed + self._answers) % LARGEST_SEED)
        events: list[AnswerEvent] = []
        images: list[Image.Image] = []
        with stopping(self._is_interruptible) as stop:
            try:
                for event in self._session.stream(self._conversation.prompt(), options):
                    if not isinstance(event, ImageCodes):
                        events.append(event)
                    self._show(event, images)
                    if stop.is_wanted:
                        break
            except DataError as error:
                raise _with_remedy(error) from error
            finally:
                self._screen.end_answer()
        self._answers += 1
        content = content_of(events)
        end = events[-1] if events else None
        is_complete = isinstance(end, AnswerEnd) and end.is_complete
        if content:
            self._conversation.answer(content, images, is_complete)
        if stop.is_wanted or not content:
            what = "stopped" if stop.is_wanted else "the answer is empty"
            self._screen.note(f"({what})" if content else f"({what}; nothing is kept of it)")
        return bool(content)

    def _show(self, event: AnswerEvent, images: list[Image.Image]) -> None:
        if isinstance(event, TextDelta):
            self._screen.text(event.text)
        elif isinstance(event, ImageStarted):
            self._screen.progress(0)
        elif isinstance(event, ImageCodes):
            self._screen.progress(len(event.codes) / event.grid.codes)
        elif isinstance(event, ImageDone):
            images.append(decoded(event.image, self._session.tokenizer))
            name = None
            try:
                name = save_image(self._folder, images[-1])
            except ChameleonError as error:
                self.report(error)
            self._screen.image(images[-1], name)

    # -- commands

    def _run(self, word: str, rest: str) -> None:
        if word not in self._commands:
            near = [name for name in COMMANDS if name.startswith(word)]
            if len(near) != 1 or word == "/":
                remedy = "Write /help for all of them, or // to begin a message with a slash"
                raise ConfigError(shown(word), "there is no such command", remedy)
            word = near[0]
        if COMMANDS[word][0] == "" and rest:
            raise ConfigError(
                word, f"it takes nothing, but {shown(rest)} follows", "Write it alone"
            )
        self._commands[word](rest)

    def _help(self, _: str) -> None:
        lines = [f"  {f'{name} {takes}':<20}{does}" for name, (takes, does) in COMMANDS.items()]
        lines += [
            'A message goes on in the next line behind a backslash, and from """ to """.',
            "Ctrl-C stops an answer and keeps what there is of it.",
        ]
        if self._finds_paths:
            lines.append("Paths of image files in a message become images; drag a file here.")
        self._screen.note("\n".join(lines))

    def _add_images(self, rest: str) -> None:
        paths = list(read_paths(rest))
        if not paths:
            raise ConfigError("/image", "no file is named", "Write /image FILE")
        parts = [ImagePart(path) for path in paths]
        for part in parts:
            try:
                part.open()  # now, and not with the message
            except ImageError as fault:
                raise DataError(part.name, fault.what, "Check the file and its path") from fault
        image_tokenizer_of(self._session.tokenizer)
        self._images += parts
        self._screen.note(f"({counted(len(self._images), 'image')} for the next message)")

    def _retry(self, _: str) -> None:
        self._needs_exchange("/retry")
        old = self._conversation.take_back(1)
        is_kept = False
        try:
            is_kept = self._answer()
        finally:
            if not is_kept:
                self._conversation.put_back(old)

    def _undo(self, _: str) -> None:
        self._needs_exchange("/undo")
        parts = self._conversation.take_back(2)[0].parts
        text = next((part.text for part in parts if isinstance(part, TextPart)), "an image")
        left = len(self._conversation) // 2
        self._screen.note(f"(took back {shown(text)}; {counted(left, 'exchange')} left)")

    def _needs_exchange(self, command: str) -> None:
        if not len(self._conversation):
            raise ConfigError(command, "there is no message yet", "Write one")

    def _reset(self, system: str | None = None) -> None:
        self._conversation.clear(system)
        self._images = []
        self._screen.note("(a new conversation)")

    def _system(self, rest: str) -> None:
        self._reset(rest)

    def _save(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/save", "no file is named", "Write /save FILE")
        self._needs_exchange("/save")
        path = Path(rest).expanduser()
        if path.exists():
            raise ConfigError(f"/save {shown(rest)}", "the file exists", "Give another name")
        lines = [json.dumps(record, ensure_ascii=False) for record in self._conversation.records()]
        write_text(path, "".join(f"{without_surrogates(line)}\n" for line in lines))
        self._screen.note(f"({counted(len(self._conversation), 'message')} in {path})")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            self._screen.note(described(self._options))
        elif name.partition("=")[1]:
            self._set(rest.replace("=", " ", 1))
        else:
            options = changed(self._options, name, value.strip())
            self._session.image_form.grid_of_size(options.size)
            self._options = options
            self._answers = 0 if name == "seed" else self._answers

    def _seed(self, rest: str) -> None:
        self._set(f"seed {rest}")


def _with_remedy(error: DataError) -> DataError:
    """The error; one about the length of the prompt says what helps in a conversation.

    The oldest messages are not left out by themselves: the answer would come from a conversation
    that nobody had, and nobody would see why it forgot something.
    """
    if error.where != "prompt":
        return error
    remedy = "Write less, take back exchanges with /undo, or begin anew with /reset"
    return DataError("the conversation", error.what, remedy)
