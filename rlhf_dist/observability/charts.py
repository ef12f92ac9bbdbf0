"""Charts as inline SVG for the report: axes with round numbers, gridlines, values on hover."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from rlhf_dist.observability.formats import human

Points = Sequence[tuple[float, float | None]]

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 30
MAX_SERIES = 6
MAX_POINTS = 200
SMOOTH_FROM = 40
#: Of the bars in a calibration chart, as a share of the plot.
BAR_HEIGHT = 0.25


def chart(
    title: str,
    unit: str,
    series: Mapping[str, Points],
    x_name: str = "step",
    marks_at: Mapping[str, float] | None = None,
) -> str:
    """A ``<figure>`` with one line per series, or "" if no series has a finite point.

    A series is a list of (step, value), drawn in its order; a value of None or one that is not finite breaks the line.
    Where there are one or two, a long series is drawn faintly with its moving average over it. Quantities with a unit
    are shown from zero. Of more than six series the smallest share the last colour.

    Args:
        marks_at: labels, and where on the axis of ``x_name`` each has its upright line.
    """
    lines = {name: _thinned(points) for name, points in series.items()}
    finite = [(x, y) for points in lines.values() for x, y in points if y is not None]
    if not finite:
        return ""
    if len(lines) > MAX_SERIES:
        lines = dict(sorted(lines.items(), key=lambda item: -max((y for _, y in item[1] if y is not None), default=0)))
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    x_ticks = ticks(x_low, x_high, 5, whole=x_name == "step")
    lowest = min(y for _, y in finite)
    y_ticks = ticks(min(lowest, 0) if unit else lowest, max(y for _, y in finite), 4)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return _on_paper(across, up)

    marks = []
    for tick in y_ticks:
        _, py = place(x_low, tick)
        marks.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}"/>')
        marks.append(f'<text x="{LEFT - 7}" y="{py + 4}" text-anchor="end">{human(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            px, _ = place(tick, y_low)
            marks.append(f'<text x="{px}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{human(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks.append(f'<text x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_name)}</text>')
    for label, x in (marks_at or {}).items():
        px, _ = place(x, y_low)
        marks.append(f'<line class="m" x1="{px}" x2="{px}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        side = f'x="{px - 4:.1f}" text-anchor="end"' if px > middle else f'x="{px + 4:.1f}"'
        marks.append(f'<text {side} y="{HEIGHT - BOTTOM - 5}">{escape(label)}</text>')
    for i, (name, points) in enumerate(lines.items()):
        colour = f"var(--s{min(i, MAX_SERIES - 1)})"
        smooth = len(lines) <= 2 and len(points) >= SMOOTH_FROM
        marks.append(_path(points, place, f'class="l{" raw" if smooth else ""}" style="stroke:{colour}"'))
        if smooth:
            marks.append(_path(_averaged(points), place, f'class="l" style="stroke:{colour}"'))
        for x, y in points:
            if y is not None:
                px, py = place(x, y)
                hint = escape(f"{name}, {x_name} {x:g}: {human(y)}")
                marks.append(f'<circle class="h" cx="{px}" cy="{py}" r="4"><title>{hint}</title></circle>')
    return _figure(title, unit, marks, _legend(list(lines)) if len(lines) > 1 else "")


def calibration_chart(
    title: str, note: str, predicted: Sequence[float], observed: Sequence[float], sides: Sequence[int]
) -> str:
    """A ``<figure>`` of observed frequency against predicted probability, both from 0 to 1, around their diagonal.

    One point for each bin; the bar below it shows how many responses are in the bin.
    """
    (left, bottom), (right, top) = _on_paper(0, 0), _on_paper(1, 1)
    marks = [f'<line class="g" x1="{left}" x2="{right}" y1="{bottom}" y2="{top}"/>']
    for tick in ticks(0, 1, 4):
        px, py = _on_paper(tick, tick)
        marks.append(f'<line class="g" x1="{left}" x2="{right}" y1="{py}" y2="{py}"/>')
        marks.append(f'<text x="{left - 7}" y="{py + 4}" text-anchor="end">{human(tick)}</text>')
        marks.append(f'<text x="{px}" y="{bottom + 15}" text-anchor="middle">{human(tick)}</text>')
    label = "predicted win probability (line: observed; bars: responses)"
    marks.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 2}" text-anchor="middle">{label}</text>')
    for x, count in zip(predicted, sides, strict=True):
        px, py = _on_paper(x, BAR_HEIGHT * count / max(sides))
        marks.append(f'<line class="b" x1="{px}" x2="{px}" y1="{bottom}" y2="{py}"/>')
    points = list(zip(predicted, observed, strict=True))
    marks.append(_path(points, _on_paper, 'class="l" style="stroke:var(--s0)"'))
    for (x, y), count in zip(points, sides, strict=True):
        px, py = _on_paper(x, y)
        hint = f"predicted {x:.3f}, observed {y:.3f}, {count} responses"
        marks.append(f'<circle class="p" cx="{px}" cy="{py}" r="4"><title>{hint}</title></circle>')
    return _figure(title, note, marks)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About ``count`` + 1 round numbers (steps of 1, 2 or 5 times a power of ten) that enclose [low, high]."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _on_paper(across: float, up: float) -> tuple[float, float]:
    """Where a point of the plot lies in the figure; both shares are from 0 to 1."""
    x, y = LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
    return round(x, 1), round(y, 1)


def _figure(title: str, note: str, marks: Sequence[str], legend: str = "") -> str:
    caption = escape(title) + (f' <span class="dim">{escape(note)}</span>' if note else "")
    return (
        f'<figure class="card"><figcaption>{caption}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>'
        f"{legend}</figure>"
    )


def _thinned(points: Points) -> list[tuple[float, float | None]]:
    """At most ``MAX_POINTS`` points: means of neighbours, so that a spike of one step still moves its point."""
    cleaned = [(x, y if y is not None and math.isfinite(y) else None) for x, y in points]
    size = math.ceil(len(cleaned) / MAX_POINTS)
    if size <= 1:
        return cleaned
    thinned: list[tuple[float, float | None]] = []
    for i in range(0, len(cleaned), size):
        bucket = [(x, y) for x, y in cleaned[i : i + size] if y is not None]
        x = cleaned[min(i + size, len(cleaned)) - 1][0]
        thinned.append((x, sum(y for _, y in bucket) / len(bucket) if bucket else None))
    return thinned


def _averaged(points: Points) -> list[tuple[float, float | None]]:
    """Mean over a centred window of a tenth of the points; gaps stay gaps."""
    half = max(1, len(points) // 20)
    averaged: list[tuple[float, float | None]] = []
    for i, (x, y) in enumerate(points):
        window = [v for _, v in points[max(0, i - half) : i + half + 1] if v is not None]
        averaged.append((x, None if y is None else sum(window) / len(window)))
    return averaged


def _path(points: Points, place: Callable[[float, float], tuple[float, float]], attributes: str) -> str:
    pieces, pen_up = [], True
    for x, y in points:
        if y is not None:
            px, py = place(x, y)
            # A line back to the same point gives a lone point a visible dot.
            pieces.append(f"M{px} {py}L{px} {py}" if pen_up else f"L{px} {py}")
        pen_up = y is None
    return f'<path {attributes} d="{"".join(pieces)}"/>'


def _legend(names: list[str]) -> str:
    prefix = names[0].split("/")[0] + "/"
    short = [name.removeprefix(prefix) if all(n.startswith(prefix) for n in names) else name for name in names]
    items = "".join(
        f'<span><i style="background:var(--s{min(i, MAX_SERIES - 1)})"></i>{escape(name)}</span>'
        for i, name in enumerate(short)
    )
    return f'<div class="legend">{items}</div>'
