"""What a user does on the chat page, by Playwright."""

from collections.abc import Callable

from playwright.sync_api import Locator, Page, expect

OpenPage = Callable[..., Page]

DROP = """([element, kind, files]) => {
  const transfer = new DataTransfer();
  for (const [name, type, encoded] of files) {
    const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type }));
  }
  const own = kind === "paste" ? { clipboardData: transfer } : { dataTransfer: transfer };
  const event = kind === "paste" ? ClipboardEvent : DragEvent;
  element.dispatchEvent(new event(kind, { bubbles: true, cancelable: true, ...own }));
}"""


def send(page: Page, text: str, answer_in: str = "Text") -> None:
    """Send a message, and wait for the end of the answer."""
    start(page, text, answer_in)
    finish(page)


def start(page: Page, text: str, answer_in: str = "Text") -> None:
    """Send a message."""
    page.locator("#force").get_by_label(answer_in, exact=True).check()
    field(page).fill(text)
    field(page).press("Enter")


def finish(page: Page) -> None:
    """Wait for the end of the answer."""
    expect(page.get_by_role("button", name="Stop the answer")).to_be_hidden(timeout=30_000)


def field(page: Page) -> Locator:
    """Where a message is written."""
    return page.get_by_role("textbox", name="Message")


def messages(page: Page) -> Locator:
    return page.locator("#log > li")


def hand_over(page: Page, kind: str, *files: tuple[str, str, str]) -> None:
    """Let the browser paste or drag files, each a name, a type and its content in base64.

    Args:
        kind: The event: paste, dragenter, dragleave or drop.
    """
    page.evaluate(DROP, [field(page).element_handle(), kind, list(files)])
