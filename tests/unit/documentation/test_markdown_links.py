"""Every link of the Markdown files leads somewhere, and every page has its place in the site."""

import re
from pathlib import Path

import pytest
import yaml

from places import REPOSITORY
from tools.documentation import navigation
from tools.documentation.site_links import broken_links, foreign_sources
from tools.documentation.staging import in_site, links_in, page_of

MARKDOWN = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for folder in (".", "docs", "benchmarks", "examples", ".github")
    for path in (REPOSITORY / folder).glob("*.md" if folder == "." else "**/*.md")
)


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as both GitHub and the site make them."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower())
        if not re.search(r"[\s-]{2}", words):  # GitHub and the site differ in those
            found.add(re.sub(r"\s", "-", words.strip()))
    return found


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def dead_links(name: str, text: str) -> list[str]:
    dead = []
    for link in links_in(name, text):
        target = REPOSITORY / link.target
        if not target.exists():
            dead.append(f"{link.written}: there is no {link.target}")
        elif link.anchor and link.anchor not in anchors(target.read_text(encoding="utf-8")):
            dead.append(f"{link.written}: there is no heading #{link.anchor}")
    return dead


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_lead_somewhere(name: str) -> None:
    assert dead_links(name, (REPOSITORY / name).read_text(encoding="utf-8")) == []


def test_dead_links_are_found() -> None:
    text = "[a](data.md#no-such) [b](gone.md) ![c](gone.png) [d](#here) `[e](code.md)`\n\n# Here\n"
    found = dead_links("docs/data.md", text)
    assert [line.split(":")[0] for line in found] == [
        "data.md#no-such",
        "gone.md",
        "gone.png",
        "#here",
    ]


def test_there_are_links_to_look_at() -> None:
    texts = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in MARKDOWN}
    assert sum(len(list(links_in(name, text))) for name, text in texts.items()) > 150


def test_links_of_the_site() -> None:
    def site(source: str, text: str) -> str:
        return in_site(source, text, {"data.md": "Data"})

    text = "[a](../README.md) [b](../examples/sft/lora.yaml) [c](data.md#epochs) [d](#x)"
    expected = "[a](index.md) [b](files/examples/sft/lora-yaml.md) [c](data.md#epochs) [d](#x)"
    assert site("docs/x.md", text) == expected
    assert site("docs/tutorials/x.md", "[a](../data.md)") == "[a](../data.md)"
    assert site("CHANGELOG.md", "[docs/data.md](docs/data.md#a)") == "[Data](data.md#a)"
    assert (
        site("docs/x.md", "[data.md](data.md) [runs.md](data.md)")
        == "[Data](data.md) [runs.md](data.md)"
    )


def test_pages_have_the_names_of_the_navigation() -> None:
    names = dict(navigation.names_in(navigation.site_config()["nav"]))
    assert names["data.md"] == "Data" and names["reference/cli/train.md"] == "train"


@pytest.mark.parametrize(
    "text",
    ["```bash\n[a](x)\n```", "`[b](x)`", "`` [b](x) ``", "~~~\n[a](x)\n~~~", "a [b](HTTPS://x)"],
)
def test_code_and_the_web_are_not_searched_for_links(text: str) -> None:
    assert list(links_in("docs/x.md", text)) == []


@pytest.mark.parametrize(
    "text", ['[a](x.md "title")', "[a]: x.md", "![a](x.md)", "[b](c)[a](x.md)"]
)
def test_links_have_several_forms(text: str) -> None:
    assert "docs/x.md" in [link.target for link in links_in("docs/y.md", text)]
    assert "](../x.md" in in_site("docs/t/y.md", text.replace("x.md", "../x.md"), {}).replace(
        ": ", "("
    )


def test_every_page_has_its_place_in_the_navigation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = navigation.site_config()
    assert "reference/cli/train.md" in navigation.pages_in(config["nav"])
    monkeypatch.setattr(navigation, "page_of", lambda: {**page_of(), "docs/new.md": "new.md"})
    with pytest.raises(ValueError, match=r"mkdocs.yml has no place in `nav` for new.md"):
        navigation.site_config()
    monkeypatch.undo()
    config["nav"][1]["Tutorials"].clear()
    navigation._add_tutorials(config["nav"], {"tutorials/cluster.md", "data.md"})
    assert config["nav"][1]["Tutorials"] == [{"Train on a cluster": "tutorials/cluster.md"}]
    written = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    written["nav"].append({"Gone": "gone.md"})
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(written), encoding="utf-8")
    monkeypatch.setattr(navigation, "REPOSITORY", tmp_path)
    with pytest.raises(ValueError, match=r"pages that do not exist: gone.md"):
        navigation.site_config()


def test_what_is_wrong_with_a_built_site_is_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "index.html").write_text('<h2 id="there">', encoding="utf-8")
    (tmp_path / "index.html").write_text(
        '<a href="sub/">1</a><a href="sub/index.html#there">2</a><a href="https://a.b/">3</a>'
        '<a href="sub/#gone">4</a><a href="gone.html">5</a><img src="gone.png">'
        '<script src="https://cdn.b/x.js"></script><link rel="stylesheet" href="//cdn.b/x.css">',
        encoding="utf-8",
    )
    assert [line.split()[1] for line in broken_links(tmp_path)] == [
        "sub/#gone",
        "gone.html",
        "gone.png",
    ]
    assert [line.split()[1] for line in foreign_sources(tmp_path)] == [
        "https://cdn.b/x.js",
        "//cdn.b/x.css",
    ]
