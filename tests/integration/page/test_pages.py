"""Every kind of page in Chromium: on a phone, light and dark, with hostile texts, for everybody."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from megatron_chameleon.cli.main import main
from megatron_chameleon.config.schema import Config
from megatron_chameleon.evaluation.human.questionnaire import read_judgements, read_key
from megatron_chameleon.evaluation.page import evaluation_page, interval, task_section
from megatron_chameleon.evaluation.tasks.results import ScoredItem, TaskResult
from megatron_chameleon.training.samples.sampler import _write_index
from page_driver import OpenPage
from page_origin import ORIGIN
from synthetic_run import write_run

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\x1b[2J " + "ab " * 100 + "x" * 300
STATE = """() => ({
  wide: document.documentElement.scrollWidth - innerWidth,
  lang: document.documentElement.lang,
  viewport: document.querySelector("meta[name=viewport]").content,
  unnamed: [...document.images].filter((image) => !image.alt).length,
  color: getComputedStyle(document.body).backgroundColor,
  origin: document.querySelector(".origin").innerText,
})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Iterator[Path]:
    """A page of each kind, written by the verbs from documents that nobody would write."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _write_documents(Path("in.jsonl"))
        shutil.copytree(tiny_tokenizer, "tokenizer")
        (folder / "train.yaml").write_text(
            yaml.safe_dump(
                {
                    "model": {"seq_length": 64},
                    "tokenizer": {"path": "tokenizer"},
                    "data": {"stage1": [{"prefix": "tokens"}]},
                    "training": {"steps": 5, "global_batch_size": 4},
                    "logging": {"run_dir": "run"},
                }
            )
        )
        main(["preprocess", "in.jsonl", "--output", "tokens", "--tokenizer", "tokenizer"])
        main(["inspect", "tokens", "--html", "tokens.html"])
        main(["inspect", "train.yaml", "--html", "sequences.html"])
        main(["inspect", "in.jsonl", "--html", "documents.html"])
        main(["train", "train.yaml", "--dry-run", "--no-step", "--html", "dry_run.html"])
        words = ["data", "filter", "in.jsonl", "--dry-run", "--min-words", "3"]
        main([*words, "--html", "filter.html"])
        write_run(folder / "run")
        main(["report", "run", "--output", "report.html"])
        main(["compare", "run", str(write_run(folder / "other")), "--output", "compare.html"])
        config = Config()
        _write_index(folder / "run", replace(config, logging=replace(config.logging)))
        shutil.copy("run/samples/index.html", "samples.html")
        _write_evaluation(folder / "evaluation.html")
        for name in ("a", "b"):
            _write_answers(Path(f"{name}.jsonl"), name)
        main(["annotate", "prepare", "pairwise", "a.jsonl", "b.jsonl", "--output", "forms"])
        shutil.copy("forms/form_1.html", "form.html")
        yield folder


def _write_documents(path: Path) -> None:
    Image.new("RGB", (1, 5000), "red").save("tall.png")
    Image.effect_noise((640, 480), 99).save("wide.png")
    contents: list[list[dict[str, str]]] = [
        [{"type": "text", "text": HOSTILE}, {"type": "image", "image": "tall.png"}],
        [{"type": "image", "image": "wide.png"}, {"type": "text", "text": "a wide <b>picture</b>"}],
        [{"type": "text", "text": "two words"}],
    ]
    lines = [
        {"id": f"<i>{n}\u202e" * (1 if n else 200), "content": content, "source": "</title>"}
        for n, content in enumerate(contents)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_answers(path: Path, name: str) -> None:
    image = {"type": "image", "image": "wide.png"}
    contents = [[{"type": "text", "text": HOSTILE}], [], [image, {"type": "text", "text": name}]]
    lines = [
        {"id": str(n), "prompt": [{"type": "text", "text": HOSTILE[:99]}], "content": content}
        for n, content in enumerate(contents)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_evaluation(path: Path) -> None:
    items = [
        ScoredItem(
            f"<b>{n}", [HOSTILE, {"image": "tall.png"}], HOSTILE, ["", HOSTILE], {"m": score}
        )
        for n, score in enumerate((0.0, 1.0, 1.0))
    ]
    graded = [replace(item, scores={"words": n / 7}) for n, item in enumerate(items * 5)]
    results = [
        TaskResult("piqa", "m", 0, items, {"7B": 79.6}),
        TaskResult("<b>", "words", 2, graded),
    ]
    about: dict[str, Any] = {"checkpoint": HOSTILE[:200], "step": None, "tasks": {}}
    about["tasks"] = {result.name: result.summary() for result in results}
    intervals = {result.name: interval(result) for result in results}
    page = evaluation_page(about, intervals, list(map(task_section, results)), ORIGIN)
    assert len(page) < 200_000
    path.write_text(page)


@pytest.fixture
def show(folder: Path, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page as a file; at the end, the console must be empty."""
    opened: list[tuple[Page, list[str]]] = []

    def show(name: str, width: int = 390, scheme: Any = "light", script: str = "") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, accept_downloads=True
        )
        if script:
            context.add_init_script(script)
        page, lines = context.new_page(), list[str]()
        page.on("pageerror", lambda error: lines.append(str(error)))
        page.on("console", lambda line: lines.append(line.text))
        page.goto((folder / name).as_uri())
        opened.append((page, lines))
        return page

    yield show
    for page, lines in opened:
        page.context.close()
        assert lines == []


def serious(page: Page, *rules: str) -> list[tuple[str, str]]:
    """What axe-core finds that keeps somebody from reading a page, by all rules or by some."""
    options = {"runOnly": list(rules)} if rules else {}
    found = Axe().run(page, options=options).response["violations"]
    return [
        (rule["id"], rule["nodes"][0]["html"][:200])
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]


KINDS = (
    *("tokens", "sequences", "documents", "filter", "report", "compare", "samples"),
    *("evaluation", "form", "dry_run"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_can_be_read_by_everybody(kind: str, show: Callable[..., Page]) -> None:
    colors = set()
    for scheme in ("light", "dark"):
        page = show(f"{kind}.html", 390, scheme)
        state = page.evaluate(STATE)
        colors.add(state["color"])
        assert state["wide"] <= 0, "the page scrolls sideways"
        assert state["lang"] == "en" and state["viewport"].startswith("width=device-width")
        assert state["unnamed"] == 0 and "written" in state["origin"]
        assert serious(page, *(["color-contrast"] if scheme == "dark" else [])) == []
    assert len(colors) == 2


def test_the_chat_page_can_be_read_by_everybody(open_page: OpenPage) -> None:
    page = open_page(390, 700)
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()
    assert serious(page) == []


def test_special_tokens_explain_themselves(show: Callable[..., Page]) -> None:
    page = show("tokens.html")
    token = page.locator("abbr.control").first
    assert token.get_attribute("title") == "0  <s>: a document begins"
    token.click()
    content = "getComputedStyle(document.activeElement, '::after').content"
    assert page.evaluate(content) == '"0  <s>: a document begins"'
    page.get_by_text("Special tokens").click()
    expect(page.get_by_role("cell", name="a prompt ends; the answer follows")).to_be_visible()


def test_a_form_is_filled_by_the_keyboard_and_kept(
    show: Callable[..., Page], folder: Path, tmp_path: Path
) -> None:
    page = show("form.html")
    first, second = (page.locator(".answers section").nth(n).bounding_box() for n in (0, 1))
    assert first and second and second["y"] >= first["y"] + first["height"], "below each other"
    expect(page.get_by_role("heading", name="Upper answer")).to_be_visible()
    expect(page.locator("#state")).to_have_text("Item 1 of 3, 0 judged.")
    page.keyboard.press("3")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", name="Item 2 of 3")).to_be_focused()
    page.keyboard.press("2")
    page.reload()
    expect(page.locator("#state")).to_have_text("Item 3 of 3, 2 judged.")
    assert not page.get_by_text("Please judge by yourself").is_visible()

    other = page.context.new_page()  # a second tab, whose answer must survive
    other.goto(page.url)
    other.keyboard.press("1")
    page.keyboard.press("ArrowLeft")
    page.get_by_label("the lower one").check()
    page.keyboard.press("ArrowLeft")  # moves, and chooses nothing
    expect(page.get_by_role("heading", name="Item 1 of 3")).to_be_visible()
    expect(page.locator("#state")).to_contain_text("3 judged. All are judged")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save my answers").click()
    assert download.value.suggested_filename == "judgements_1.json"
    expect(page.locator("#saved")).to_contain_text("Saved as judgements_1.json.")
    download.value.save_as(tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert list(saved) == ["format", "questionnaire", "form", "judgements"]
    assert sorted(saved["judgements"].values()) == ["left", "right", "right"]
    assert len(read_judgements([tmp_path / "saved.json"], read_key(folder / "forms/key.json"))) == 3
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete my answers").click()
    expect(page.locator("#state")).to_have_text("Item 1 of 3, 0 judged.")


FORBIDDEN = """Object.defineProperty(window, "localStorage",
  { get() { throw new DOMException("forbidden", "SecurityError"); } });"""
FULL = (
    """Storage.prototype.setItem = () => { throw new DOMException("", "QuotaExceededError"); };"""
)
DAMAGED = """Storage.prototype.getItem = () => '{"__proto__": 1, "x": "left", "y": [3]';"""
FOREIGN = """Storage.prototype.getItem = () => '[null, {"choice": 7}]';"""


@pytest.mark.parametrize(
    ("script", "is_told"), [(FORBIDDEN, True), (FULL, True), (DAMAGED, False), (FOREIGN, False)]
)
def test_a_browser_that_keeps_nothing_says_so(
    script: str, is_told: bool, show: Callable[..., Page]
) -> None:
    page = show("form.html", 1400, script=script)
    assert page.get_by_role("alert").is_visible() == is_told
    expect(page.get_by_role("heading", name="Left answer")).to_be_visible()
    page.keyboard.press("1")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#state")).to_have_text("Item 2 of 3, 1 judged.")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save my answers").click()
    assert list(json.loads(download.value.path().read_text())["judgements"].values()) == ["left"]
    expect(page.locator("#saved")).to_contain_text("2 of 3 items are not judged yet")
