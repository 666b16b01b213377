"""The chat page in Chromium, against the real server with a tiny model of random weights."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.parse import read_documents
from megatron_chameleon.data.documents.schema import TextPart
from page_driver import OpenPage, field, finish, hand_over, messages, send, start

FOCUSED = "document.activeElement.innerText || document.activeElement.id"
WIDTHS = """[document.documentElement.scrollWidth, scroller.scrollWidth - scroller.clientWidth]"""
FONT_SIZES = """[...document.querySelectorAll("input, textarea")].map((field) =>
  parseFloat(getComputedStyle(field).fontSize))"""
SLOW_NETWORK = """
const quick = fetch;
fetch = async (...words) => {
  const response = await quick(...words);
  const drip = new TransformStream({ async transform(chunk, controller) {
    for (let start = 0; start < chunk.length; start += 1000) {
      controller.enqueue(chunk.slice(start, start + 1000));
      await new Promise((go) => setTimeout(go, 30));
    }
  } });
  return new Response(response.body.pipeThrough(drip), response);
};
"""
MARKUP = "<img src=x onerror=alert(1)>\n  **two**\n```\n<b>code</b>\n```"


def picture(size: tuple[int, int] = (16, 16), color: str = "red") -> str:
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, "png")
    return base64.b64encode(content.getvalue()).decode()


def copied(page: Page, path: Path) -> list:
    """The parts of the conversation that the page copies, as our reader reads them."""
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_text("The conversation was copied.")).to_be_visible()
    path.write_text(page.evaluate("navigator.clipboard.readText()") + "\n")
    (document,) = read_documents([path])
    assert document.roles is not None
    return list(zip(document.roles, document.content, strict=True))


def test_text_and_images_go_both_ways(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(
        permissions=["clipboard-read", "clipboard-write"],
        before=lambda page: page.add_init_script(SLOW_NETWORK),
    )
    hand_over(page, "paste", ("red.png", "image/png", picture()))
    hand_over(page, "drop", ("blue.png", "image/png", picture((40, 20), "blue")))
    expect(page.get_by_role("button", name="Remove image 2")).to_be_visible()
    page.evaluate(
        "window.progress = []; new MutationObserver(() => document.querySelectorAll("
        "'figure.growing progress').forEach((bar) => progress.push(bar.value)))"
        ".observe(log, { subtree: true, childList: true, attributes: true })"
    )
    send(page, "draw [image 2] as this", "Image")
    drawn = messages(page).last.get_by_role("img")
    expect(drawn).to_have_js_property("naturalWidth", 8)
    assert drawn.bounding_box()["width"] == 192, "tiny images are enlarged"  # type: ignore[index]
    seen = page.evaluate("progress")
    assert any(0 < value < 1 for value in seen) and seen == sorted(seen)

    first, second, third, fourth, answer = copied(page, tmp_path / "talk.jsonl")
    assert [role for role, _ in (first, second, third, fourth)] == ["user"] * 4
    assert second[1] == TextPart("draw ") and fourth[1] == TextPart(" as this")
    assert all(isinstance(part, ImagePart) for _, part in (first, third, answer))
    assert [part.open().size for _, part in (first, third, answer)] == [(16, 16), (40, 20), (8, 8)]
    assert third[1].open().convert("RGB").getpixel((3, 3)) == (0, 0, 255)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert len(list(read_documents([download.value.path().rename(tmp_path / "a.jsonl")]))) == 1


def test_a_growing_answer_is_stopped_and_the_next_one_begins(open_page: OpenPage) -> None:
    page = open_page()
    start(page, "tell")
    answer = messages(page).nth(1).locator(".body")
    for length in (1, 20, 60):  # it is seen to grow
        expect(answer).to_have_text(re.compile(f".{{{length}}}", re.DOTALL))
    page.keyboard.press("Escape")
    expect(page.get_by_text("You stopped this answer.")).to_be_visible()
    stopped = answer.inner_text()
    send(page, "again", "Image")
    assert answer.inner_text() == stopped
    expect(messages(page)).to_have_count(4)


def test_answers_again_are_kept_with_their_seeds(open_page: OpenPage) -> None:
    page = open_page()
    send(page, "draw", "Image")
    again = page.get_by_role("button", name="Answer again with another seed")
    seeds = [page.locator(".seed").inner_text()]
    for count in (2, 3):
        again.click()
        expect(page.get_by_text(f"{count}/{count}")).to_be_visible()
        finish(page)
        seeds.append(page.locator(".seed").inner_text())
    assert len(set(seeds)) == 3
    page.get_by_role("button", name="Version before").click()
    expect(page.locator(".seed")).to_have_text(seeds[1])
    expect(page.get_by_role("button", name="Version before")).to_be_focused()
    image = messages(page).last.get_by_role("img").get_attribute("src")

    page.locator(".seed").click()  # the same seed and settings give the same answer
    send(page, "something else", "Image")
    assert page.locator(".seed").last.inner_text() == seeds[1]
    messages(page).first.hover()
    page.get_by_role("button", name="Edit this message").first.click()
    send(page, "draw", "Image")
    expect(messages(page)).to_have_count(2)
    assert messages(page).last.get_by_role("img").get_attribute("src") == image
    expect(page.get_by_role("group", name="Version 2 of 2")).to_be_visible()


def test_the_conversation_survives_a_reload(open_page: OpenPage) -> None:
    page = open_page()
    hand_over(page, "drop", ("red.png", "image/png", picture()))
    send(page, "draw this", "Image")
    sources = "[...log.querySelectorAll('img')].map((image) => image.src)"
    before = page.evaluate(sources), messages(page).first.inner_text()
    start(page, "tell")
    expect(messages(page).last.locator(".body")).not_to_be_empty()
    page.wait_for_timeout(1600)  # an answer that grows is kept every 1.5 s
    field(page).fill("half a thought")
    page.reload()
    expect(page.get_by_text("This answer was interrupted")).to_be_visible()
    assert (page.evaluate(sources), messages(page).first.inner_text()) == before
    assert messages(page).last.locator(".body").inner_text()
    expect(field(page)).to_have_value("half a thought")

    page.get_by_role("button", name="New", exact=True).click()
    expect(messages(page)).to_have_count(0)
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("dialog").get_by_text("draw this").click()
    expect(messages(page)).to_have_count(4)


def test_files_are_dropped_and_removed(open_page: OpenPage) -> None:
    page = open_page()
    hand_over(page, "dragenter", ("a.png", "image/png", ""))
    expect(page.get_by_text("Drop images to add them")).to_be_visible()
    wide, broken = picture((3000, 1000)), base64.b64encode(b"no image").decode()
    hand_over(page, "drop", ("wide.png", "image/png", wide), ("a.txt", "text/plain", broken))
    expect(page.get_by_text("Drop images to add them")).to_be_hidden()
    expect(page.get_by_text("“a.txt” is not an image that this browser can read.")).to_be_visible()
    size = page.locator("#thumbnails img").evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert size == [1024, 341], "a large image is made smaller before it is sent"
    page.get_by_role("button", name="Image 1, wide.png").click()
    expect(field(page)).to_have_value("[image 1]")
    page.get_by_role("button", name="Remove image 1").click()
    expect(field(page)).to_have_value("")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()


def test_the_keyboard_is_enough(open_page: OpenPage) -> None:
    page = open_page()
    expect(page.locator("#model")).to_have_text("tiny")
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.innerText || document.activeElement.id")
        )
    assert {"Conversations", "New", "Settings", "text", "Add image"} <= set(reached)
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("/")
    expect(field(page)).to_be_focused()
    page.keyboard.type("tell")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("more")
    field(page).dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(messages(page)).to_have_count(0)
    page.keyboard.press("Enter")
    expect(messages(page)).to_have_count(2)
    expect(messages(page).first.locator(".body")).to_have_text("tell\nmore", use_inner_text=True)
    page.keyboard.press("Escape")
    finish(page)
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Control+k")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_text("Editing an earlier message.")).to_be_visible()
    expect(field(page)).to_have_value("tell\nmore")
    page.keyboard.press("Escape")
    expect(field(page)).to_have_value("")


def test_settings_reach_the_server_and_go_back(open_page: OpenPage) -> None:
    page = open_page(1200)
    asked: list[dict] = []
    page.on("request", lambda r: asked.append(json.loads(r.post_data)) if r.post_data else None)
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("0.7")
    page.get_by_label("Temperature", exact=True).fill("0")
    page.get_by_label("Longest answer (tokens)", exact=True).fill("5")
    page.get_by_label("Top p", exact=True).fill("7")
    expect(page.get_by_text("Enter a number, above 0 and at most 1.")).to_be_visible()
    send(page, "tell")
    expect(page.get_by_label("Top p", exact=True)).to_be_focused()
    expect(field(page)).to_have_value("tell")
    assert not asked
    page.get_by_label("Top p", exact=True).fill("0.5")
    send(page, "tell")
    expect(page.get_by_text("The answer ended at 5 tokens")).to_be_visible()
    page.get_by_role("button", name="Reset to the server's defaults").click()
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("0.7")
    send(page, "draw", "Image")
    sent = [{k: v for k, v in body.items() if k not in ("messages", "seed")} for body in asked]
    fixed = {
        "model": "tiny",
        "stream": True,
        "stream_images": True,
        "stream_options": {"include_usage": True},
    }
    assert sent[0] == fixed | {"temperature": 0, "max_tokens": 5, "top_p": 0.5, "force": "text"}
    assert sent[1] == fixed | {"force": "image"}


@pytest.mark.parametrize(
    ("status", "body", "heading", "button"),
    [
        (429, {"error": {"message": "queue: it is full"}}, "The server is busy", "Try again"),
        (500, "oops", "The server could not answer", "Try again"),
        (0, "", "No connection", "Try again"),
        (200, 'data: {"choices": []}\n\n', "No connection", "Try again"),
    ],
)
def test_an_error_says_what_to_do_and_the_next_try_answers(
    open_page: OpenPage, status: int, body: dict | str, heading: str, button: str
) -> None:
    def refuse(route: Route) -> None:
        if not status:
            return route.abort("connectionreset")
        text = body if isinstance(body, str) else json.dumps(body)
        return route.fulfill(status=status, body=text, content_type="text/event-stream")

    page = open_page(
        before=lambda page: page.route("**/v1/chat/completions", refuse, times=1),
        expected="Failed to load resource",
    )
    send(page, "draw", "Image")
    expect(page.get_by_role("alert")).to_contain_text(heading)
    page.get_by_role("button", name=button).click()
    expect(messages(page).last.get_by_role("img")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(messages(page)).to_have_count(2)


def test_a_key_is_asked_for(open_page: OpenPage) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            return route.continue_()
        error = {"error": {"message": "Authorization: the key is wrong"}}
        return route.fulfill(status=401, json=error)

    page = open_page(
        before=lambda page: page.route("**/v1/**", guard), expected="Failed to load resource"
    )
    for key in ("wrong", "right"):
        page.get_by_label("Key", exact=True).fill(key)
        page.get_by_role("button", name="Use this key").click()
        if key == "wrong":
            expect(page.get_by_text("the key is wrong")).to_be_visible()
    send(page, "draw", "Image")
    expect(messages(page).last.get_by_role("img")).to_be_visible()


def test_what_a_model_writes_is_text(open_page: OpenPage) -> None:
    chunk = json.dumps({"choices": [{"delta": {"content": MARKUP}, "finish_reason": "stop"}]})
    page = open_page(
        before=lambda page: page.route(
            "**/v1/chat/completions",
            lambda r: r.fulfill(body=f"data: {chunk}\n\n", content_type="text/event-stream"),
        )
    )
    send(page, MARKUP)
    for message in messages(page).all():
        assert message.locator("p").inner_text() == "<img src=x onerror=alert(1)>\n  **two**"
        assert message.locator("code").inner_text() == "<b>code</b>"


def test_a_browser_that_keeps_nothing_still_talks(open_page: OpenPage) -> None:
    refuse = "IDBFactory.prototype.open = () => { throw new DOMException('no', 'SecurityError') }"
    page = open_page(before=lambda page: page.add_init_script(refuse))
    expect(page.get_by_text("This browser keeps nothing for this page")).to_be_visible()
    send(page, "draw", "Image")
    expect(messages(page).last.get_by_role("img")).to_be_visible()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 480), (640, 400)])
def test_nothing_is_wider_than_a_small_screen(open_page: OpenPage, width: int, height: int) -> None:
    page = open_page(width, height, color_scheme="dark", has_touch=True)
    hand_over(page, "drop", *[(f"{n}.png", "image/png", picture()) for n in range(9)])
    expect(page.get_by_role("button", name="Remove image 9")).to_be_visible()
    send(page, "W" * 500 + " and [image 3] " + "w" * 300, "Image")
    for name in ("Settings", "Conversations"):
        page.get_by_role("button", name=name).click()
        wide = page.evaluate(
            "[document.documentElement.scrollWidth, scroller.scrollWidth - scroller.clientWidth]"
        )
        assert wide == [width, 0]
        page.get_by_role("dialog").get_by_role("button", name="Close").first.click()
    sizes = page.evaluate(FONT_SIZES)
    assert min(sizes) >= 16, "a phone zooms in on a smaller field"


def test_the_end_is_followed_until_the_user_scrolls_up(open_page: OpenPage) -> None:
    page = open_page(600, 400)
    send(page, "draw", "Image")
    send(page, "draw", "Image")
    start(page, "tell")
    near = "scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 70"
    expect(messages(page).last).to_have_text(re.compile(".{300}", re.DOTALL))
    assert page.evaluate(near)
    page.locator("#scroller").hover()
    page.mouse.wheel(0, -400)
    expect(page.get_by_role("button", name="To the end")).to_be_visible()
    assert not page.evaluate(near)
    page.get_by_role("button", name="To the end").click()
    assert page.evaluate(near)
    page.keyboard.press("Escape")
    finish(page)
