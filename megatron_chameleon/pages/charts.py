"""Line charts as SVG inside a page.

The curves are stretched to the width of the page, while lines keep their width and labels, which
are HTML, their size: a chart is as readable on a phone as on a wide screen. Colours come from the
style sheet, so they follow light and dark.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.pages.axes import MOST_POINTS, Axis, axis_of, thin, tick_label
from megatron_chameleon.pages.elements import escape

COLORS = 6
_WIDTH, _HEIGHT = 2000, 1000
_MOST_MARKS = 60
"""Of one kind; more could not be told apart."""
_OUTLIER = 8.0
"""Values above so many times nearly all others do not stretch the axis."""

MARK_NAMES = {
    "restart": "restart",
    "alarm": "alarm",
    "checkpoint": "checkpoint",
    "stage": "stage 2 begins",
    "lowest": "held-out loss is lowest",
}


@dataclass(frozen=True)
class Line:
    """A curve."""

    name: str
    """For the legend; empty: it has no entry, as the pale curve behind a smoothed one."""
    x: np.ndarray
    """Ascending, [points]."""
    y: np.ndarray
    """NaN is not drawn, [points]."""
    color: int = 0
    kind: str = "curve"
    """curve; raw: thin and pale; dots: with a dot at each point; dash: broken, as of plans."""


@dataclass(frozen=True)
class ChartMark:
    """A place on the axis of steps at which something happened."""

    x: float
    kind: str
    """A key of ``MARK_NAMES``."""
    text: str
    """Appears when the mouse rests on it."""


@dataclass(frozen=True)
class Chart:
    """What a chart shows."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    marks: Sequence[ChartMark] = ()
    x_label: str = "step"
    log_x: bool = False
    log_y: bool = False
    is_tall: bool = False

    def html(self) -> str:
        """The chart as HTML; a sentence if nothing can be drawn."""
        lines = [line for line in self.lines if np.isfinite(line.y).any()]
        unit = f' <span class="unit">{escape(self.unit)}</span>' if self.unit else ""
        caption = f"<figcaption>{escape(self.title)}{unit}</figcaption>"
        if not lines:
            return f'<figure class="chart">{caption}<p class="pale">No values.</p></figure>'
        return _Drawing(self, lines).html(caption)


class _Drawing:
    def __init__(self, chart: Chart, lines: Sequence[Line]) -> None:
        self.chart, self.lines = chart, lines
        finite = [np.isfinite(line.y) for line in lines]
        xs = np.concatenate([line.x[known] for line, known in zip(lines, finite, strict=True)])
        ys = np.concatenate([line.y[known] for line, known in zip(lines, finite, strict=True)])
        shown = ys if chart.log_y else _without_outliers(ys)
        self.is_cut = len(shown) < len(ys)
        self.highest = float(ys.max())
        self.x = axis_of(xs.astype(np.float64), chart.log_x, is_tight=True)
        self.y = axis_of(shown, chart.log_y)

    def html(self, caption: str) -> str:
        chart = self.chart
        marks = self._marks()
        curves = "".join(self._curve(line) for line in self.lines)
        svg = (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(self._alt())}">{self._grid()}{marks}{curves}</svg>'
        )
        kind = "plot tall" if chart.is_tall else "plot"
        hidden = ""
        if self.is_cut:
            hidden = f"higher values, up to {self.highest:.4g}, are not shown · "
        return (
            f'<figure class="chart">{caption}<div class="{kind}">{svg}{self._labels()}</div>'
            f'<div class="axis">{escape(hidden + chart.x_label)}</div>{self._legend()}</figure>'
        )

    def _grid(self) -> str:
        paths = [f"M0 {_row(self.y, value)}H{_WIDTH}" for value in self.y.ticks(5)]
        return f'<path class="grid" d="{"".join(paths)}"/>'

    def _labels(self) -> str:
        found = [
            f'<span class="y" style="bottom:{100 * float(self.y.place(value)):.2f}%">'
            f"{escape(tick_label(value))}</span>"
            for value in self.y.ticks(5)
        ]
        for value in self.x.ticks(5):
            place = float(self.x.place(value))
            kind = "x first" if place < 0.04 else "x end" if place > 0.96 else "x"
            found.append(
                f'<span class="{kind}" style="left:{100 * place:.2f}%">'
                f"{escape(tick_label(value))}</span>"
            )
        return "".join(found)

    def _curve(self, line: Line) -> str:
        x, y = self.x.place(line.x), self.y.place(line.y)
        most = MOST_POINTS // 2 if line.kind == "raw" else MOST_POINTS // 4
        chosen = thin(x, y, most)
        columns = np.rint(x[chosen] * _WIDTH).astype(int).tolist()
        rows = np.rint((1 - y[chosen].clip(-0.02, 1.02)) * _HEIGHT).astype(int).tolist()
        if not columns:
            return ""
        points = " ".join(f"{column} {row}" for column, row in zip(columns, rows, strict=True))
        color = f"s{line.color % COLORS}"
        kind = {"raw": "raw", "dash": "curve dash"}.get(line.kind, "curve")
        drawn = f'<path class="{kind} {color}" d="M{points}"/>' if len(columns) > 1 else ""
        if len(columns) == 1 or (line.kind == "dots" and len(columns) <= 60):
            dots = "".join(f"M{c} {r}h0" for c, r in zip(columns, rows, strict=True))
            drawn += f'<path class="dot {color}" d="{dots}"/>'
        return drawn

    def _marks(self) -> str:
        drawn = []
        for mark in self._visible_marks():
            column = round(float(self.x.place(mark.x)) * _WIDTH)
            top = _HEIGHT - 40 if mark.kind == "checkpoint" else 0
            drawn.append(
                f'<path class="mark {mark.kind}" d="M{column} {top}V{_HEIGHT}">'
                f"<title>{escape(mark.text)}</title></path>"
            )
        return "".join(drawn)

    def _visible_marks(self) -> list[ChartMark]:
        """The marks within the axis; of many of one kind, some at even distances and the last."""
        found: list[ChartMark] = []
        for kind in MARK_NAMES:
            marks = [
                mark
                for mark in self.chart.marks
                if mark.kind == kind and -1e-9 <= float(self.x.place(mark.x)) <= 1 + 1e-9
            ]
            stride = -(-len(marks) // _MOST_MARKS) or 1
            found += marks[::-1][::stride][::-1]
        return found

    def _legend(self) -> str:
        entries = []
        for line in self.lines:
            if line.name:
                dash = " dash" if line.kind == "dash" else ""
                entries.append(_sample(f"curve{dash} s{line.color % COLORS}", line.name))
        kinds = {mark.kind for mark in self._visible_marks()}
        for kind, name in MARK_NAMES.items():
            if kind in kinds:
                entries.append(_sample(f"mark {kind}", name, is_upright=True))
        return f'<div class="legend">{"".join(entries)}</div>' if entries else ""

    def _alt(self) -> str:
        words = []
        for line in self.lines:
            if line.name:
                known = line.y[np.isfinite(line.y)]
                words.append(f"{line.name} from {known[0]:.4g} to {known[-1]:.4g}")
        return f"{self.chart.title} by {self.chart.x_label}: {', '.join(words)}"


def _row(axis: Axis, value: float) -> int:
    return round((1 - float(axis.place(value))) * _HEIGHT)


def _sample(kind: str, name: str, is_upright: bool = False) -> str:
    path = "M12 0V10" if is_upright else "M0 5H24"
    return (
        f'<span><svg viewBox="0 0 24 10" aria-hidden="true"><path class="{kind}" d="{path}"/></svg>'
        f"{escape(name)}</span>"
    )


def _without_outliers(values: np.ndarray) -> np.ndarray:
    """Leave out the few values that would press all others against the axis."""
    usual = float(np.quantile(np.abs(values), 0.995))
    kept = values[np.abs(values) <= _OUTLIER * usual] if len(values) >= 50 and usual > 0 else values
    return kept if len(kept) else values
