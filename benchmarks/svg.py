"""Figures as SVG text: dots with intervals, and lines. Equal numbers give equal text, so a test can compare them.

A figure brings its own background and follows the reader's light or dark scheme. Families differ in colour and in
the shape of their marks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_LIGHT = ("#ffffff", "#24292f", "#6e7781", "#d8dee4", "#b42318")
_DARK = ("#0d1117", "#e6edf3", "#9198a1", "#30363d", "#ff7b72")
_LIGHT_COLORS = ("#0969a8", "#2da169", "#b26a00", "#8250df", "#c2437a", "#6b7280")
_DARK_COLORS = ("#58a6ff", "#3fb950", "#e3a341", "#bc8cff", "#f778ba", "#9aa4b0")
_FONT = 13
_ROW = 14
# Of ratios, the most wanted first.
_TICKS = (1, 2, 4, 8, 16, 0.5, 1.5, 3, 6, 1.25, 1.1, 0.9, 1.05, 0.95, 0.8, 0.25)


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One number with its interval.

    Args:
        group: the row that it stands in; in a line its x.
        family: which gives colour and mark.
        value: the number.
        low: end of the interval.
        high: end of the interval.
    """

    group: str
    family: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of several drawings on common axes."""

    title: str
    dots: Sequence[Dot]

    @property
    def groups(self) -> list[str]:
        """Rows, in the order in which they come."""
        return list(dict.fromkeys(dot.group for dot in self.dots))

    def of(self, group: str) -> list[Dot]:
        """The dots of a row."""
        return [dot for dot in self.dots if dot.group == group]


@dataclass(frozen=True)
class Axis:
    """Maps numbers to pixels, and says where ticks go."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = (math.log(max(value, self.low)) if self.log else value) - low
        return self.start + (self.end - self.start) * min(max(place / (high - low), 0.0), 1.0)

    @property
    def ticks(self) -> list[float]:
        """Round numbers inside."""
        if self.log:
            return self._apart([t for t in _TICKS if self.low <= t <= self.high])
        span = self.high - self.low
        step = 10 ** math.floor(math.log10(span / 4))
        step = next(step * k for k in (1, 2, 5, 10) if span / (step * k) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step) + 1)]

    def _apart(self, ticks: Sequence[float]) -> list[float]:
        """Those that leave room for their words; the first ones first."""
        kept: list[float] = []
        for tick in ticks:
            if all(abs(self(tick) - self(other)) >= 30 for other in kept):
                kept.append(tick)
        return sorted(kept)


def dot_panels(
    panels: Sequence[Panel],
    *,
    title: str,
    x_title: str,
    families: Sequence[str],
    limits: dict[str, float] | None = None,
    log: bool = True,
    columns: int = 2,
) -> str:
    """Rows of dots: a row for each group, in it a dot for each family, and dashed lines at limits."""
    limits = limits or {}
    columns = min(columns, len(panels))
    label_width = 12 + 7 * max(len(group) for panel in panels for group in panel.groups)
    plot_width, gap = (360 if columns > 1 else 560), 28
    width = columns * (label_width + plot_width + gap) + gap
    low, high = _range([e for p in panels for d in p.dots for e in (d.low, d.high)], limits.values(), log)
    body, top = _head(title, families, panels, width)
    row_height = 0.0
    for number, panel in enumerate(panels):
        column = number % columns
        if column == 0:
            top, row_height = top + row_height, 0.0
        left = gap + column * (label_width + plot_width + gap) + label_width
        x = Axis(low, high, left, left + plot_width, log)
        height = _dot_panel(body, panel, x, top, label_width, families, limits, x_title)
        row_height = max(row_height, height)
    return _document(body, width, top + row_height + 6)


def _dot_panel(
    body: list[str],
    panel: Panel,
    x: Axis,
    top: float,
    label_width: float,
    families: Sequence[str],
    limits: dict[str, float],
    x_title: str,
) -> float:
    """Draws one panel; its height."""
    y0 = top + 44
    heights = [max(2, len(panel.of(group))) * _ROW + 10 for group in panel.groups]
    y1 = y0 + sum(heights)
    body.append(_text(x.start - label_width + 4, top + 14, panel.title, "b"))
    for tick in x.ticks:
        body.append(_line(x(tick), y0, x(tick), y1, "grid"))
        body.append(_text(x(tick), y1 + 15, f"{tick:g}", "s m"))
    for place, (name, limit) in enumerate(sorted(limits.items(), key=lambda item: item[1])):
        body.append(_line(x(limit), y0 - 4, x(limit), y1, "limit"))
        # The lower limit's words end at its line, the higher one's begin there if there is room.
        room = x(limit) + 6.4 * len(name) < x.end + 24
        anchor = "w" if room and (place or len(limits) == 1) else "e"
        body.append(_text(x(limit) + (-3 if anchor == "e" else 3), y0 - 8, name, f"s red {anchor}"))
    y = y0
    for group, height in zip(panel.groups, heights, strict=True):
        body.append(_line(x.start, y, x.end, y, "grid"))
        body.append(_text(x.start - 8, y + height / 2 + 4, group, "e"))
        dots = sorted(panel.of(group), key=lambda dot: families.index(dot.family))
        for place, dot in enumerate(dots):
            center = y + height / 2 + (place - (len(dots) - 1) / 2) * _ROW
            body.append(_dot(x, center, dot, families.index(dot.family)))
        y += height
    body.append(_line(x.start, y1, x.end, y1, "axis"))
    body.append(_text((x.start + x.end) / 2, y1 + 32, x_title, "s m"))
    return y1 + 50 - top


def _dot(x: Axis, y: float, dot: Dot, family: int) -> str:
    words = f"{dot.family}, {dot.group}: {dot.value:.3f} ({dot.low:.3f} to {dot.high:.3f})"
    line = _line(x(dot.low), y, x(dot.high), y, f"f{family}")
    return f"<g><title>{escape(words)}</title>{line}{_mark(x(dot.value), y, family)}</g>"


def line_panels(
    panels: Sequence[Panel],
    *,
    title: str,
    y_title: str,
    families: Sequence[str],
    limits: dict[str, float] | None = None,
) -> str:
    """Lines over groups, which are evenly spaced; whiskers are intervals, dashed lines limits."""
    limits = limits or {}
    plot_width, plot_height, gap, left0 = 250, 230, 24, 62
    width = left0 + len(panels) * (plot_width + gap) + (110 if limits else 10)
    low, high = _range([e for p in panels for d in p.dots for e in (d.low, d.high)], limits.values(), True)
    body, top = _head(title, families, panels, width)
    y = Axis(low, high, top + 34 + plot_height, top + 34, True)
    for number, panel in enumerate(panels):
        left = left0 + number * (plot_width + gap)
        body.append(_text(left, top + 14, panel.title, "b"))
        for tick in y.ticks:
            body.append(_line(left, y(tick), left + plot_width, y(tick), "grid"))
            if number == 0:
                body.append(_text(left - 6, y(tick) + 4, f"{tick:g}", "s e"))
        for place, (name, limit) in enumerate(sorted(limits.items(), key=lambda item: item[1])):
            body.append(_line(left, y(limit), left + plot_width, y(limit), "limit"))
            if number == len(panels) - 1:
                # Lines may lie close together, so their words are moved apart.
                body.append(_text(left + plot_width + 6, y(limit) + 6 - 5 * place, name, "s red"))
        places = {
            group: left + plot_width * (i + 0.5) / len(panel.groups) for i, group in enumerate(panel.groups)
        }
        for group, x in places.items():
            body.append(_text(x, y.start + 16, group, "s m"))
        body.append(_line(left, y.start, left + plot_width, y.start, "axis"))
        for family, name in enumerate(families):
            body += _curve([dot for dot in panel.dots if dot.family == name], family, places, y)
    body.append(_text(left0 - 44, top + 14, y_title, "s"))
    return _document(body, width, y.start + 30)


def _curve(dots: Sequence[Dot], family: int, places: dict[str, float], y: Axis) -> list[str]:
    out = []
    # A few pixels apart, so that families that agree are all seen.
    points = [(places[dot.group] + 3 * family - 6, y(dot.value), dot) for dot in dots]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
    out.append(f'<polyline class="f{family} thin" points="{path}"/>')
    for px, py, dot in points:
        words = f"{dot.family}, {dot.group}: {dot.value:.3f} ({dot.low:.3f} to {dot.high:.3f})"
        whisker = _line(px, y(dot.low), px, y(dot.high), f"f{family}")
        out.append(f"<g><title>{escape(words)}</title>{whisker}{_mark(px, py, family)}</g>")
    return out


# -------------------------------------------------------------------------------- pieces


def _range(ends: Sequence[float], limits: object, log: bool) -> tuple[float, float]:
    values = [*ends, *limits]  # type: ignore[misc]
    if not log:
        return min(0.0, *values), max(values) * 1.08
    return min(0.95, *values) / 1.02, max(1.15, *values) * 1.04


def _head(
    title: str, families: Sequence[str], panels: Sequence[Panel], width: float
) -> tuple[list[str], float]:
    """Title, and a legend of the families there are; where panels begin."""
    present = {dot.family for panel in panels for dot in panel.dots}
    body = [_text(16, 28, title, "t")]
    if len(present) < 2:
        return body, 46
    x, y = 20.0, 52.0
    for number, name in enumerate(families):
        if name not in present:
            continue
        step = 34 + 7.2 * len(name)
        if x + step > width:
            x, y = 20.0, y + 20
        body.append(_mark(x, y - 4, number))
        body.append(_text(x + 12, y, name, ""))
        x += step
    return body, y + 18


def _mark(x: float, y: float, family: int) -> str:
    shapes: tuple[Callable[[], str], ...] = (
        lambda: f'<circle class="f{family} fill" cx="{x:.1f}" cy="{y:.1f}" r="4.6"/>',
        lambda: f'<rect class="f{family} fill" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>',
        lambda: _path(family, x, y, ((0, -5), (5, 4), (-5, 4))),
        lambda: _path(family, x, y, ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0))),
        lambda: _path(family, x, y, ((0, 5), (5, -4), (-5, -4))),
        lambda: f'<circle class="f{family} hollow" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
    )
    return shapes[family % len(shapes)]()


def _path(family: int, x: float, y: float, corners: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="f{family} fill" points="{points}"/>'


def _line(x0: float, y0: float, x1: float, y1: float, cls: str) -> str:
    return f'<line class="{cls}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _text(x: float, y: float, words: str, cls: str) -> str:
    return f'<text class="{cls}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _document(body: Sequence[str], width: float, height: float) -> str:
    names = ("bg", "fg", "dim", "line", "red")

    def variables(base: Sequence[str], colors: Sequence[str]) -> str:
        named = [f"--{name}:{value}" for name, value in zip(names, base, strict=True)]
        return ";".join([*named, *(f"--c{i}:{color}" for i, color in enumerate(colors))])

    families = "".join(
        f".f{i}{{stroke:var(--c{i});fill:none;stroke-width:1.8}}.f{i}.fill{{fill:var(--c{i});stroke:none}}"
        f".f{i}.hollow{{fill:var(--bg)}}"
        for i in range(len(_LIGHT_COLORS))
    )
    style = (
        f"svg{{{variables(_LIGHT, _LIGHT_COLORS)}}}"
        f"@media (prefers-color-scheme:dark){{svg{{{variables(_DARK, _DARK_COLORS)}}}}}"
        f"text{{font:{_FONT}px system-ui,sans-serif;fill:var(--fg)}}"
        ".t{font-size:16px;font-weight:600}.b{font-weight:600}.s{font-size:11.5px;fill:var(--dim)}"
        ".m{text-anchor:middle}.e{text-anchor:end}.red{fill:var(--red)}"
        ".grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--dim)}"
        ".limit{stroke:var(--red);stroke-width:1.4;stroke-dasharray:5 4}"
        f"{families}.thin{{stroke-width:1.2;opacity:.7}}"
    )
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><style>{style}</style>\n'
        f'<rect width="100%" height="100%" rx="6" fill="var(--bg)"/>\n' + "\n".join(body) + "\n</svg>\n"
    )
