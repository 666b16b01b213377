"""Charts that look like their numbers, and pages that show any text as text."""

import base64
import hashlib
import re
from datetime import UTC, datetime, timedelta, timezone
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_chameleon.pages.axes import MOST_POINTS, axis_of, thin, tick_label
from megatron_chameleon.pages.charts import MARK_NAMES, Chart, ChartMark, Line
from megatron_chameleon.pages.elements import (
    cards,
    choice,
    folded,
    heading,
    how,
    notes,
    preformatted,
    table,
)
from megatron_chameleon.pages.page import Origin, page
from page_origin import ORIGIN

HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror='a()'>\"&\u202e\x1b[2J\0"


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in ("meta", "img", "input", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.mark.parametrize("seed", range(6))
def test_a_thinned_curve_keeps_the_extremes_of_every_piece(seed: int) -> None:
    """Compared with a search piece by piece, over uneven steps with gaps and equal values."""
    random = np.random.default_rng(seed)
    count, most = int(random.integers(100, 20_000)), int(random.integers(6, 100))
    x = np.sort(random.random(count) ** int(random.integers(1, 5)))
    y = random.choice([random.normal(size=count), np.round(random.normal(size=count))])
    y[random.random(count) < 0.1] = np.nan
    chosen = thin(x, y, most)
    known = np.flatnonzero(np.isfinite(y))
    assert len(chosen) <= most and (np.diff(chosen) > 0).all()
    assert {known[0], known[-1]} <= set(chosen.tolist()) <= set(known.tolist())
    begin, pieces = x[known[0]], most // 2 - 1
    piece = ((x - begin) / (x[known[-1]] - begin) * pieces).clip(0, pieces - 1).astype(int)
    for number in range(pieces):
        inside = [i for i in known.tolist() if piece[i] == number]
        kept = [i for i in chosen.tolist() if piece[i] == number]
        if inside:
            assert y[kept].min() == y[inside].min() and y[kept].max() == y[inside].max()


def test_few_points_are_all_kept_and_nan_is_not() -> None:
    values = np.array([1.0, np.nan, 3.0, np.inf, 2.0])
    assert thin(np.arange(5.0), values).tolist() == [0, 2, 4]
    assert len(thin(np.zeros(10_000), np.arange(10_000.0), 10)) <= 10
    assert thin(np.zeros(0), np.zeros(0)).tolist() == []


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        *([], [0.0], [5.0], [-3.0, -3.0], [1e-300, 1e30], [-1e30, 1e30], [5e-324], [0.0, 5e-324]),
        *([1e15, 1e15 + 0.5], [1.0, 1.0 + 1e-16], [1e-9, 2e-9], [0, 1e-3, 1e6], [7, 7.5], [-2, 5]),
    ],
)
def test_axes_hold_all_values_and_have_a_few_round_ticks(values: list, is_log: bool) -> None:
    found = np.array(values, dtype=float)
    axis = axis_of(found, is_log)
    places = axis.place(found)
    places = places[np.isfinite(places)]
    assert ((places >= 0) & (places <= 1)).all()
    for most in (2, 5):
        ticks = axis.ticks(most)
        assert len(ticks) <= most and ticks == sorted(set(ticks))
        assert all(-1e-6 <= float(axis.place(tick)) <= 1 + 1e-6 for tick in ticks)
        assert all(len(tick_label(tick)) <= 10 for tick in ticks)


def test_a_chart_draws_points_where_they_are() -> None:
    line = Line("x", np.array([0, 50, 100]), np.array([0.0, 10.0, 5.0]))
    drawn = Chart("t", [line]).html()
    points = re.search(r'class="curve s0" d="M([^"]+)"', drawn)
    assert points is not None
    numbers = [int(word) for word in points[1].split()]
    assert numbers[::2] == [0, 1000, 2000]
    top = 1000 * 0.4 / 10.4  # 4% are left free above the highest value
    assert numbers[1::2] == [1000, round(top), round((1000 + top) / 2)]


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [np.nan], [np.nan, 2.0], [np.inf, -np.inf], [0.0] * 5, [1e30, -1e30], [5e-324]],
)
@pytest.mark.parametrize("logs", [(False, False), (True, True)])
def test_charts_of_odd_numbers_are_whole(values: list, logs: tuple[bool, bool]) -> None:
    x, y = np.arange(len(values)), np.array(values, dtype=float)
    marks = [ChartMark(place, kind, HOSTILE) for kind in MARK_NAMES for place in (-5, 0, 0.5, 1e15)]
    lines = [Line(HOSTILE, x, y, 7, kind) for kind in ("curve", "raw", "dots", "dash")]
    drawn = Chart(HOSTILE, lines, HOSTILE, marks, HOSTILE, *logs).html()
    found = Tags(drawn)
    assert not {"script", "img", "style"} & set(found.tags) and "nan" not in drawn.lower()
    assert "No values" in drawn or "svg" in found.tags


def test_a_chart_of_a_million_points_and_a_thousand_marks_is_small() -> None:
    random = np.random.default_rng(1)
    x = np.arange(1_000_000)
    marks = [ChartMark(step, "alarm", "x") for step in range(0, 1_000_000, 1000)]
    lines = [Line("", x, random.normal(size=len(x)), 0, "raw"), Line("a", x, x / 7.0)]
    drawn = Chart("t", lines, marks=marks).html()
    assert drawn.count('class="mark alarm"') <= 61 and len(drawn) < 30_000
    assert MOST_POINTS <= 2000


def test_a_value_far_above_all_others_is_told_and_not_drawn() -> None:
    values = np.ones(1000)
    values[500] = 1e9
    drawn = Chart("t", [Line("a", np.arange(1000), values)]).html()
    assert "higher values, up to 1e+09, are not shown" in drawn


def test_every_text_of_a_page_is_text() -> None:
    body = [
        heading(HOSTILE),
        how(HOSTILE),
        notes([(HOSTILE, "bad"), (HOSTILE, "")]),
        cards([(HOSTILE, HOSTILE)]),
        table([HOSTILE, "b"], [[HOSTILE, 5]]),
        folded(HOSTILE, preformatted(HOSTILE)),
        choice("a", [(HOSTILE, "x"), ("b", "y")]),
    ]
    origin = Origin(HOSTILE, datetime(2026, 1, 2, tzinfo=UTC), HOSTILE, 7, [(HOSTILE, HOSTILE)])
    text = page(HOSTILE, body, origin)
    found = Tags(text)
    assert not {"script", "img", "link", "iframe"} & set(found.tags)
    assert not [name for name in found.attributes if name.startswith("on")]
    assert found.tags.count("style") == 1 and "\u202e" not in text and "\x1b" not in text
    assert text.startswith('<!doctype html>\n<html lang="en">')
    assert "default-src 'none'" in text and 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert "http" not in text.replace("http-equiv", "")


def test_a_page_says_where_it_comes_from_without_secrets() -> None:
    date = datetime(2026, 1, 2, 5, 4, tzinfo=timezone(timedelta(hours=2)))
    secret = "hf_" + "a1b2c3d4" * 4
    origin = Origin(f"chameleon report run --token {secret}", date, "run", 3, [("folder", "/a/b")])
    text = re.sub("<[^>]+>", " ", page("Run", [], origin).partition("<body>")[2])
    assert secret not in text and "--token hf_***" in text
    assert re.search(r"about +run +folder +/a/b +seed +3 +written +2026-01-02 03:04 UTC", text)


def test_a_script_runs_only_if_the_policy_names_it() -> None:
    assert "script-src" not in page("a", [], ORIGIN)
    digest = base64.b64encode(hashlib.sha256(b"go()").digest()).decode()
    assert f"script-src 'sha256-{digest}'; " in page("a", [], ORIGIN, script="go()")
