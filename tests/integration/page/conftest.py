"""A server of a tiny model, and Chromium with its page."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import forked_command
from command_server import free_port
from page_driver import OpenPage
from tiny_model import (
    PADDED_VOCAB_SIZE,
    model_config,
    random_tensors,
    tiny_tokenizer,  # noqa: F401
    write_checkpoint,
)

CONTEXT_TOKENS = 2048
"""So many that an answer takes seconds, in which it can be stopped."""
END = 2
"""The id of ``</s>``."""
WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI }) =>
  violations.push(`${violatedDirective} ${blockedURI}`));
"""


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Iterator[str]:  # noqa: F811
    """Where a server of a tiny model of random weights listens."""
    folder = tmp_path_factory.mktemp("served")
    model = replace(model_config(), seq_length=CONTEXT_TOKENS)
    checkpoint = folder / "checkpoints" / "step_00000007"
    tensors = random_tensors(model, PADDED_VOCAB_SIZE)
    tensors["output_layer.weight"] *= 4
    tensors["output_layer.weight"][END] = 0  # never likely: a text ends where the test stops it
    write_checkpoint(checkpoint, model, tensors, tiny_tokenizer)
    port = free_port()
    words = ["serve", str(checkpoint), "--port", str(port), "--format", "chat", "--name", "tiny"]
    # a fork, because this process has imported the libraries already
    (process,) = forked_command.start(words, folder / "log")
    address = f"http://127.0.0.1:{port}/"
    try:
        _wait(process, f"{address}health")
        yield address
    finally:
        os.kill(process, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code == 0


def _wait(process: int, address: str) -> None:
    """Wait until a server answers."""
    for _ in range(600):
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "the server has ended"
        with contextlib.suppress(OSError), urlopen(address, timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError("the server does not answer after a minute")


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Browser]:
    """Chromium, for the tests of one file.

    While Playwright runs, an event loop runs in this thread, and ``asyncio.run`` of any other test
    would be refused. So it ends with the file, and not with the session.

    Args:
        address: The server is forked before Playwright starts. Otherwise it would hold Playwright's
            pipes open, and Playwright would wait for their end without end.
    """
    chromium = shutil.which("chromium")
    assert chromium, "chromium is missing, in which the chat page is tested: see .ci/run"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(address: str, browser: Browser) -> Iterator[OpenPage]:
    """Opens the page as somebody who has never been there.

    At the end, the browser's console must have no line but those with the words ``expected``, and
    nothing may have been done that the content security policy forbids.
    """
    opened: list[tuple[Page, list[str], str | None]] = []

    def open_page(
        width: int = 1000,
        height: int = 700,
        before: Callable[[Page], object] = lambda page: None,
        expected: str | None = None,
        **options: Any,
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(20_000)
        context.add_init_script(WATCH)
        page, lines = context.new_page(), list[str]()
        page.on("pageerror", lambda error: lines.append(str(error)))
        page.on("console", lambda line: lines.append(f"{line.type}: {line.text}"))
        before(page)
        page.goto(address)
        opened.append((page, lines, expected))
        return page

    yield open_page
    for page, lines, expected in opened:
        assert page.evaluate("violations") == []
        page.context.close()
        assert [line for line in lines if expected is None or expected not in line] == []
