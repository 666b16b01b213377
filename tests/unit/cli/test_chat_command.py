"""``chameleon chat``: the lines of a pipe, and somebody at a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_chameleon.cli.chat import _greeting
from megatron_chameleon.cli.console import open_console
from megatron_chameleon.cli.main import main
from megatron_chameleon.inference.chat import PromptFormat


def chat(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, typed: str, *words: object, code: int = 0
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), "utf-8"))
    command = ["chat", str(checkpoint), "--seed", "3", *(str(word) for word in words)]
    if not code:
        main(command)
        return
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == code


def test_each_line_of_a_pipe_is_a_message(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    images, saved = tmp_path / "images", tmp_path / "saved.jsonl"
    typed = f"a\n/set force text\n/image {tmp_path}/red.png\nb\n/save {saved}\n"
    chat(
        monkeypatch,
        tiny_checkpoint,
        typed,
        *("--force", "image", "--output", images, "--format", "chat", "--max-tokens", 18),
    )
    shown = capsys.readouterr()
    assert shown.out.startswith(f"[image: {images}/0001.png]\n")
    assert Image.open(images / "0001.png").size == (8, 8)
    assert "7 updates, a context of 64 tokens. Messages are turns of a conv" in shown.err
    (line,) = map(json.loads, saved.read_text().splitlines())
    assert [message["role"] for message in line["messages"]] == ["user", "assistant"] * 2
    assert shown.out.partition("\n")[2].rstrip("\n") == line["messages"][3]["content"][0]["text"]


def test_the_steps_of_an_adapter_are_not_taken_for_those_of_the_model() -> None:
    session: Any = SimpleNamespace(
        step=4, has_adapter=True, context_tokens=64, prompt_format=PromptFormat.CHAT
    )
    said = _greeting(session, PromptFormat.CHAT)
    assert said.startswith("an adapter trained for 4 steps, a context of 64 tokens. Messages are")


def test_the_first_message_and_errors_on_the_way(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model was not trained on conversations; a command that fails ends with 2, at the end."""
    words = ("--prompt", "one", "--max-tokens", 3, "--force", "text", "--temperature", 0)
    chat(monkeypatch, tiny_checkpoint, "/set x y\none\n/reset\none\n", *words, code=2)
    shown = capsys.readouterr()
    assert "error: /set 'x': there is no such option" in shown.err
    assert "A message is the beginning of a document: the model was not trained on" in shown.err
    lines = shown.out.splitlines()
    assert len(lines) >= 3 and lines[0] == lines[-1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--image", "missing.png"), "error: missing.png: no such image file. Check the path"),
        (("--output", "file/below"), "error: file/below: "),
        (("--format", "talk"), "error: --format: invalid choice: 'talk'"),
        (("--pictures", "ascii"), "error: --pictures: invalid choice: 'ascii'"),
        (("--top-p", "0"), "error: --top-p: '0' is not a number above 0"),
        (("--stop", ""), "error: stop: a stop string is empty"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    chat(monkeypatch, tmp_path / "no model", "", *words, code=2)
    error = capsys.readouterr().err
    assert error.startswith(told) and error.count("\n") == 1


class Typist:
    """Somebody at a terminal, in front of the command, which is forked from this process."""

    def __init__(self, words: list[str], variables: dict[str, str]) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            code = 70
            try:
                os.environ.update(variables)
                torch.set_num_threads(1)
                main_of_process(words)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                os._exit(code)
        self.shown = ""
        self._read = 0

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.shown, self._read)):
            assert select.select([self._end], [], [], max(0, deadline - time.monotonic()))[0], (
                f"no {pattern!r} in {self.shown[self._read :]!r}"
            )
            self.shown += os.read(self._end, 4096).decode(errors="replace")
        self._read = found.end()
        return found

    def type(self, keys: str, after: str = "> $") -> None:
        self.wait_for(after)
        time.sleep(0.05)  # a signal just before the line is read would wait for the next key
        os.write(self._end, keys.encode())

    def end(self) -> int:
        """The exit code, once the command has ended."""
        for _ in range(600):
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"no end: {self.shown[-2000:]!r}")


def main_of_process(words: list[str]) -> None:
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # pytest has replaced them
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    open_console()
    main(words)
    sys.stdout.flush()


def test_somebody_at_a_terminal(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The terminal is asked for sixel once; Ctrl-C drops a line, and Ctrl-D leaves."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm", "INPUTRC": "/dev/null"}
    words = ["chat", str(tiny_checkpoint), "--force", "image", "--output", str(tmp_path / "drawn")]
    typist = Typist(words, state)
    typist.type("draw a\x03")
    typist.type("draw\n", after=r"Ctrl-D or /quit leaves\)\r\n.*> $")
    typist.type("\x1b[?62;4;22c", after=r"\x1b\[c$")
    typist.wait_for(r'\x1bP0;1q"1;1;192;192#[^\x1b]*\x1b\\\r\n\[image: .*/drawn/0001.png\]\r\n')
    typist.type(f"{tmp_path}/red.png\n")
    typist.wait_for(r"\(red.png is sent as an image\)\r\n")
    typist.wait_for(r'\x1bP0;1q"1;1;192;192')
    typist.wait_for(r"0002.png\]\r\n")
    typist.type("/set force text\n")
    typist.type("/set max_tokens\t 9\n")
    typist.type("number\n")
    typist.type("\x04")
    assert typist.end() == 0
    history = (tmp_path / "state/megatron_chameleon/chat_history").read_text().splitlines()
    assert history[0] == "draw" and history[-1] == "number"
    assert oct((tmp_path / "state/megatron_chameleon/chat_history").stat().st_mode)[-3:] == "600"
