"""A conversation in the terminal, with a model that says what it is told to say."""

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.data.documents.parse import read_documents
from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.answers.stream import (
    AnswerEnd,
    AnswerEvent,
    ImageCodes,
    ImageDone,
    ImageStarted,
    TextDelta,
)
from megatron_chameleon.inference.chat import PromptFormat
from megatron_chameleon.inference.conversation import Conversation
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.prompts import encode_prompts
from megatron_chameleon.inference.terminal.chat import COMMANDS, Chat
from megatron_chameleon.inference.terminal.image_files import save_image
from megatron_chameleon.inference.terminal.screen import Screen
from megatron_chameleon.tokenizer.common.grids import Grid
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer

CODES = np.arange(16)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


class StubSession:
    """Answers with the next of ``answers``: texts, codes of images, or an error."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.image_form = tokenizer, tokenizer.image_form
        self.answers: list[list[Any]] = []
        self.prompts: list[list[int]] = []
        self.seeds: list[int] = []
        self.is_complete = True

    def stream(self, prompt: Any, options: GenerationOptions) -> Iterator[AnswerEvent]:
        self.prompts += encode_prompts([prompt], self.tokenizer)
        self.seeds.append(options.seed)
        images = 0
        for part in self.answers.pop(0) if self.answers else ["ok"]:
            if isinstance(part, Exception):
                raise part
            if callable(part):
                part()
            elif isinstance(part, str):
                yield TextDelta(part)
            else:
                yield from (ImageStarted(images), ImageCodes(images, part[:8], Grid(4, 4)))
                yield ImageDone(images, part, Grid(4, 4))
                images += 1
        yield AnswerEnd(self.is_complete)


class Terminal:
    """A chat, what it shows, and the model behind it."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, form: str = "chat", **how: bool) -> None:
        self.session = StubSession(tokenizer)
        self.out, self.errors = io.StringIO(), io.StringIO()
        self.conversation = Conversation(tokenizer, PromptFormat(form))
        screen = Screen(self.out, self.errors, False, None, {})
        options = GenerationOptions(seed=5)
        self.chat = Chat(
            *(self.session, self.conversation, options, screen, folder / "images"),  # type: ignore
            **how,
        )

    def say(self, *lines: str) -> str:
        """Take lines; returns what was shown, notes and errors last."""
        for stream in (self.out, self.errors):
            stream.seek(0)
            stream.truncate()
        for line in lines:
            assert self.chat.take(line)
        return self.out.getvalue() + self.errors.getvalue()


@pytest.fixture
def terminal(tokenizer: Tokenizer, tmp_path: Path) -> Terminal:
    return Terminal(tokenizer, tmp_path)


def text_ids(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    return [tokenizer.text.encode(text) for text in texts]


def test_the_history_is_the_prompt(terminal: Terminal, tokenizer: Tokenizer) -> None:
    """Images of answers keep the codes that were drawn."""
    terminal.session.answers = [["a", CODES], ["c"]]
    assert terminal.say("one", "two") == (f"a\n[image: {terminal.chat._folder}/0001.png]\nc\n")
    v = tokenizer.vocabulary
    one, a, two = text_ids(tokenizer, "one", "a", "two")
    image = [v.begin_image, *v.codes_to_token_ids(CODES).tolist(), v.end_image]
    first = [v.bos, *one, v.separator]
    assert terminal.session.prompts == [first, [*first, *a, *image, v.eos, *two, v.separator]]
    assert terminal.session.seeds == [5, 6]


def test_a_document_that_was_ended_is_followed_by_a_new_one(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    terminal = Terminal(tokenizer, tmp_path, "document")
    terminal.session.is_complete = False
    terminal.say("one", "two")
    terminal.session.is_complete = True
    terminal.say("three", "four", f"/save {tmp_path / 'all.jsonl'}")
    bos = tokenizer.vocabulary.bos
    one, ok, two, three, four = text_ids(tokenizer, "one", "ok", "two", "three", "four")
    assert terminal.session.prompts[1:] == [
        [bos, *one, *ok, *two],
        [bos, *one, *ok, *two, *ok, *three],
        [bos, *four],
    ]
    saved = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    texts = ["".join(part["text"] for part in line["content"]) for line in saved]
    assert texts == ["oneoktwookthreeok", "fourok"]


def test_undo_retry_and_reset(terminal: Terminal, tokenizer: Tokenizer) -> None:
    terminal.session.answers = [["1"], ["2"], ["3"], ["4"]]
    terminal.say("a", "b")
    assert terminal.say("/retry") == "3\n"
    assert terminal.session.prompts[2] == terminal.session.prompts[1]
    assert terminal.session.seeds == [5, 6, 7], "another seed"
    assert terminal.say("/undo") == "(took back 'b'; 1 exchange left)\n"
    terminal.say("c")
    assert terminal.session.prompts[3][:-2] == terminal.session.prompts[1][:-2]
    assert terminal.say("/reset", "/undo").splitlines() == [
        "(a new conversation)",
        "error: /undo: there is no message yet. Write one.",
    ]


def test_a_retry_that_fails_keeps_the_old_answer(terminal: Terminal, tmp_path: Path) -> None:
    terminal.session.answers = [["1"], [DataError("prompt", "too long", "x")], []]
    terminal.say("a")
    assert "error: the conversation: too long. Write less, take back" in terminal.say("/retry")
    assert terminal.say("/retry") == "(the answer is empty; nothing is kept of it)\n"
    terminal.say(f"/save {tmp_path / 'kept.jsonl'}")
    (saved,) = read_documents([tmp_path / "kept.jsonl"])
    assert [part.text for part in saved.content] == ["a", "1"]  # type: ignore[union-attr]


def test_a_message_without_an_answer_is_taken_back(terminal: Terminal) -> None:
    error = DataError("prompt", "its 90 tokens leave too little room", "Shorten it")
    terminal.session.answers = [[error], []]
    assert terminal.say("a" * 90) == (
        "error: the conversation: its 90 tokens leave too little room. Write less, take back "
        "exchanges with /undo, or begin anew with /reset.\n"
    )
    assert terminal.say("b") == "(the answer is empty; nothing is kept of it)\n"
    assert len(terminal.conversation) == 0 and terminal.chat.failed
    terminal.say("c")
    assert len(terminal.conversation) == 2


def test_a_saved_conversation_is_a_document_of_our_schema(
    terminal: Terminal, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    Image.new("RGB", (30, 8), "red").save(tmp_path / "wide.jpg")
    terminal.session.answers = [["a \ud800b", CODES], ["c"]]
    path = tmp_path / "deep" / "saved.jsonl"
    terminal.say("/system Be brief.", f"/image {tmp_path}/wide.jpg", "one", "two", f"/save {path}")
    (document,) = read_documents([path])
    roles = ["system", "system", "user", "user", "assistant", "assistant", "user", "assistant"]
    assert document.roles == tuple(roles)
    shown = [p.open().size if hasattr(p, "open") else p.text for p in document.content]
    assert shown == ["Be brief.", "\n\n", (30, 8), "one", "a \ufffdb", (8, 8), "two", "c"]
    assert "the file exists. Give another name" in terminal.say(f"/save {path}")


def test_images_wait_for_the_message(terminal: Terminal, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a b.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert terminal.say(f"/image {tmp_path}/a b.png") == "(1 image for the next message)\n"
    assert "error: " in (told := terminal.say(f"/image {tmp_path}/broken.png"))
    assert "broken.png" in told and told.count("\n") == 1
    assert terminal.say("/image missing.png") == (
        "error: missing.png: no such image file. Check the file and its path.\n"
    )
    terminal.say("  ")
    (prompt,) = terminal.session.prompts
    assert len(prompt) == 1 + 18 + 1, "the image alone"
    terminal.say("", "next")
    assert len(terminal.session.prompts) == 2, "an empty line says nothing"


def test_images_that_were_not_sent_are_sent_at_the_end(terminal: Terminal, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    terminal.say(f"/image {tmp_path}/a.png")
    terminal.chat.end()
    assert terminal.out.getvalue() == "ok\n"


def test_paths_become_images_where_somebody_types(
    tokenizer: Tokenizer, tmp_path: Path, terminal: Terminal
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    typed = Terminal(tokenizer, tmp_path, finds_paths=True)
    shown = typed.say(f"{tmp_path}/a.png what is it?")
    assert shown.endswith("is sent as an image)\n") and len(typed.session.prompts[0]) == 20 + len(
        tokenizer.text.encode("what is it?")
    )
    assert "there is no such command" in terminal.say(f"{tmp_path}/a.png what?"), "not in a pipe"
    terminal.say(f"//{tmp_path}/a.png")
    assert terminal.session.prompts == [
        [0, *tokenizer.text.encode(f"/{tmp_path}/a.png"), tokenizer.vocabulary.separator]
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/draw", r"error: '/draw': there is no such command. Write /help"),
        ("/re", "error: '/re': there is no such command"),
        ("/", "error: '/': there is no such command"),
        ("/undo 3", "error: /undo: it takes nothing, but '3' follows. Write it alone."),
        ("/image", "error: /image: no file is named. Write /image FILE."),
        ("/save", "error: /save: no file is named. Write /save FILE."),
        ("/save x.jsonl", "error: /save: there is no message yet"),
        ("/set warmth 3", "error: /set 'warmth': there is no such option. Choose one of temp"),
        (
            "/set temperature hot",
            "error: /set temperature: 'hot' is not a number that is 0 or more",
        ),
        ("/set temperature nan", "error: /set temperature: 'nan' is not a number"),
        ("/set top_p 1.5", "error: /set top_p: '1.5' is not a number above 0 and at most 1"),
        ("/set top-k -1", "error: /set top_k: '-1' is not a whole number that is 0 or more"),
        ("/set max_tokens 0", "error: /set max_tokens: '0' is not a whole number above 0"),
        ("/set images maybe", "error: /set images: 'maybe' is not on or off"),
        ("/set force sound", "error: /set force: 'sound' is not image, text or none"),
        ("/set seed -1", "error: /set seed: -1 is not a whole number from 0 to 9223"),
        ("/seed", "error: /set seed: '' is not a whole number"),
        ("/set max_tokens " + "9" * 5000, "error: /set max_tokens: '999"),
        ("/\x1b[2J", "error: '/\\x1b[2J': there is no such command"),
    ],
)
def test_mistakes_are_one_line(terminal: Terminal, line: str, told: str) -> None:
    shown = terminal.say(line)
    assert shown.startswith(told) and shown.count("\n") == 1 and len(shown) < 400
    assert terminal.say("a") == "ok\n"


def test_settings(terminal: Terminal) -> None:
    for line in (
        *("/set temperature 0.2", "/set top_p=0.5", "/set images off", "/set force text"),
        *("/set stop \\n\\n", "/set max-tokens 9", "/seed 40", "/set guidance_image 1.2"),
    ):
        assert terminal.say(line) == ""
    options = terminal.chat._options
    assert (options.temperature, options.top_p, options.images) == (0.2, 0.5, False)
    assert (options.stop, options.max_tokens) == (("\n\n",), 9)
    assert options.force == "text" and options.guidance_image == 1.2
    assert "  stop                '\\n\\n'\n" in (shown := terminal.say("/set"))
    assert "  images              off\n" in shown and "  force               text\n" in shown
    terminal.say("/set max_tokens none", "/set force none", "/set stop none", "a", "b")
    assert terminal.chat._options.max_tokens is terminal.chat._options.force is None
    assert terminal.chat._options.stop == () and terminal.session.seeds == [40, 41]


def test_help_has_every_command(terminal: Terminal) -> None:
    shown = terminal.say("/help")
    assert all(f"  {name}" in shown for name in COMMANDS)
    assert not terminal.chat.take("/quit") and not terminal.chat.take("/exit")


def test_an_image_that_cannot_be_saved_is_still_part_of_the_conversation(
    terminal: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "images").write_text("a file")
    terminal.session.answers = [[CODES]]
    shown = terminal.say("a")
    assert shown.startswith("error: ") and "images" in shown and "[image:" not in shown
    assert len(terminal.conversation) == 2


def test_no_image_is_overwritten(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0007.png").write_bytes(b"mine")
    terminal.session.answers = [[CODES, CODES]]
    shown = terminal.say("a")
    assert "0008.png]\n" in shown and "0009.png]\n" in shown
    assert (tmp_path / "images/0007.png").read_bytes() == b"mine"


def test_no_image_of_another_process_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes the same number between the look at the folder and our file."""
    (tmp_path / "0001.png").write_bytes(b"theirs")
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert save_image(tmp_path, Image.new("RGB", (1, 1))) == tmp_path / "0002.png"
    assert (tmp_path / "0001.png").read_bytes() == b"theirs"


def test_ctrl_c_stops_the_answer_and_keeps_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    terminal = Terminal(tokenizer, tmp_path, is_interruptible=True)
    press = lambda: os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    terminal.session.answers = [["a", press, "b", "c"], [press, "d"], [press, press, "e"]]
    assert terminal.say("one") == "ab\n(stopped)\n"
    assert len(terminal.conversation) == 2
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        terminal.say("two", "three")
    assert len(terminal.conversation) == 4, "the second press, during the third answer"


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_does_not_obey_the_model() -> None:
    out = FakeTerminal()
    screen = Screen(out, io.StringIO(), True, None, {"TERM": "dumb"})
    for delta in ("a\x1b", "]0;title\x07", "\u202eb\r", "é漢👩‍👩‍👧\n"):
        screen.text(delta)
    screen.progress(0.5)
    screen.text("c")
    screen.end_answer()
    assert out.getvalue() == (
        "a\\x1b]0;title\\x07\\u202eb\\ré漢👩‍👩‍👧\n\r[image: 50%]\x1b[K\r\x1b[Kc\n"
    )
