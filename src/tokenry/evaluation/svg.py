"""Plots as inline SVG: a scatter whose labels never overlap, and bars with quartile whiskers."""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

_CHARACTER = 7.1  # width of a character of the labels' font at its size, in pixels; wide fonts reach it
_LINE = 15.0


@dataclass(frozen=True)
class Point:
    """A point of a scatter: position in data units, label, and the CSS class that colours it."""

    x: float
    y: float
    label: str
    kind: str


@dataclass(frozen=True)
class Bar:
    """A bar: its value with quartiles, its label, the text at its end, and the CSS class that colours it."""

    value: float
    lower: float
    upper: float
    label: str
    note: str
    kind: str


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Whether the two share any area."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, other: "Box") -> bool:
        """Whether it lies in the other."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers between `low` and `high`, about `count` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def place_labels(points: Sequence[tuple[float, float]], labels: Sequence[str], frame: Box) -> list[Box | None]:
    """Return a box inside `frame` for each label, none over another or over a point, as near its point as can be.

    A label for which there is no room gets None.
    """
    dots = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    taken: list[Box] = []
    found: list[Box | None] = [None] * len(points)
    # From the top right inwards: what has the least room chooses first.
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        x, y = points[index]
        width = len(labels[index]) * _CHARACTER + 4
        lefts = [x + 10, x - 10 - width, x - width / 2, *(x + shift for shift in range(-450, 451, 30))]
        tops = [y + _LINE * (step - 1) / 2 for step in range(-60, 61)]
        places = [Box(left, top, left + width, top + _LINE) for left in lefts for top in tops]
        for box in sorted(places, key=lambda box: _distance(box, x, y)):
            if box.inside(frame) and not any(box.overlaps(other) for other in itertools.chain(taken, dots)):
                taken.append(box)
                found[index] = box
                break
    return found


def _distance(box: Box, x: float, y: float) -> float:
    """From a point to a label's box; beside the point is better than above or below it."""
    across = max(box.left - x, 0.0, x - box.right)
    down = max(box.top - y, 0.0, y - box.bottom)
    return math.hypot(across, 1.5 * down) + 0.01 * abs(box.top + _LINE / 2 - y)


def scatter(points: Sequence[Point], x_title: str, y_title: str, *, mark_x: float | None = None) -> str:
    """Return a scatter plot whose y is a share, from 0 to 1; `mark_x` draws a dashed line at that x."""
    width, height = 860.0, max(340.0, 120.0 + 26 * len(points))
    frame = Box(58.0, 16.0, width - 20.0, height - 46.0)
    x_low, x_high = _padded([*(point.x for point in points), *([] if mark_x is None else [mark_x])], 0.12)
    y_low, y_high = _padded([point.y for point in points], 0.15)
    if y_high - y_low < 0.3:  # differences of a few hundredths must not look like an abyss
        y_low, y_high = (y_low + y_high) / 2 - 0.15, (y_low + y_high) / 2 + 0.15

    def at_x(x: float) -> float:
        return frame.left + (x - x_low) / (x_high - x_low) * (frame.right - frame.left)

    def at_y(y: float) -> float:
        return frame.top + (y_high - y) / (y_high - y_low) * (frame.bottom - frame.top)

    parts = [_open(width, height, f"{y_title} against {x_title}")]
    for tick in ticks(x_low, x_high, 7):
        parts.append(_line("grid", at_x(tick), frame.top, at_x(tick), frame.bottom))
        parts.append(_words("tick", at_x(tick), frame.bottom + 16, f"{tick:g}", "middle"))
    for tick in ticks(max(0.0, y_low), min(1.0, y_high)):
        parts.append(_line("grid", frame.left, at_y(tick), frame.right, at_y(tick)))
        parts.append(_words("tick", frame.left - 8, at_y(tick) + 4, f"{tick:g}", "end"))
    if mark_x is not None:
        parts.append(_line("mark", at_x(mark_x), frame.top, at_x(mark_x), frame.bottom))
    parts.append(_words("axis", (frame.left + frame.right) / 2, height - 8, x_title, "middle"))
    parts.append(_words("axis", 14, (frame.top + frame.bottom) / 2, y_title, "middle", upright=True))
    places = [(at_x(point.x), at_y(point.y)) for point in points]
    room = Box(frame.left + 2, frame.top, frame.right, frame.bottom - 2)
    boxes = place_labels(places, [point.label for point in points], room)
    for point, (x, y), box in zip(points, places, boxes, strict=True):
        if box is not None:
            parts.append(_leader(x, y, box, point.kind))
    for point, (x, y) in zip(points, places, strict=True):
        title = f"<title>{_text(point.label)}: {point.x:.2f}, {point.y:.2f}</title>"
        parts.append(f'<circle class="{point.kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>')
    for point, box in zip(points, boxes, strict=True):
        if box is not None:
            parts.append(_words("label", box.left + 2, box.bottom - 4, point.label))
    return "".join(parts) + "</svg>"


def _leader(x: float, y: float, box: Box, kind: str) -> str:
    """A line from a point to its label, where they do not touch."""
    end_x, end_y = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
    return "" if math.hypot(end_x - x, end_y - y) <= 12 else _line(f"leader {kind}", x, y, end_x, end_y)


def bars(found: Sequence[Bar], title: str, *, mark: float | None = None) -> str:
    """Return horizontal bars from 0 with whiskers from lower to upper quartile; `mark` draws a dashed line."""
    row, top = 26.0, 8.0
    left = 16 + max(len(bar.label) for bar in found) * _CHARACTER
    right = 16 + max(len(bar.note) for bar in found) * _CHARACTER
    width, base = max(860.0, left + right + 260), top + row * len(found)
    high = max(mark or 0.0, *(value for bar in found for value in (bar.upper, bar.value))) * 1.04 or 1.0

    def at(value: float) -> float:
        return left + value / high * (width - left - right)

    parts = [_open(width, base + 30, title)]
    # The numbers at the ends say it all where there is nothing to compare with.
    for tick in ticks(0, high, 7) if mark is not None else []:
        parts.append(_line("grid", at(tick), top, at(tick), base))
        parts.append(_words("tick", at(tick), base + 17, f"{tick:g}", "middle"))
    for index, bar in enumerate(found):
        y = top + row * index
        middle = y + row / 2
        low, up = at(bar.lower), at(bar.upper)
        length = at(bar.value) - left
        parts.append(_words("label", left - 8, middle + 4, bar.label, "end"))
        parts.append(
            f'<rect class="{bar.kind}" x="{left:.1f}" y="{y + 5}" width="{length:.1f}" height="{row - 10}" rx="2"/>'
        )
        if bar.lower < bar.upper:
            parts.append(_line("whisker", low, middle, up, middle))
            parts += [_line("whisker", end, middle - 5, end, middle + 5) for end in (low, up)]
        parts.append(_words("note", max(at(bar.value), up) + 8, middle + 4, bar.note))
    if mark is not None:
        parts.append(_line("mark", at(mark), top, at(mark), base))
    return "".join(parts) + "</svg>"


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * share or max(abs(high), 1.0) * share
    return low - room, high + room


def _open(width: float, height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{_text(title)}">'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _words(kind: str, x: float, y: float, text: str, anchor: str = "start", upright: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if upright else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{_text(text)}</text>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)
