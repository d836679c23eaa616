"""Line charts as inline SVG. Colours are classes, which the page gives a value for light and for dark."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slipstream.report.markup import escape, short, ticks
from slipstream.report.records import Points

MOST_POINTS = 300  # of a line; more become means, with a band from the lowest to the highest
MOST_HINTS = 150  # points that say their value under the pointer
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 40


@dataclass(frozen=True)
class Line:
    """A curve: `style` is its CSS class, `s1` to `s3`."""

    name: str
    points: Points
    style: str = "s1"
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float


def chart(
    title: str, lines: Sequence[Line], unit: str = "", level: Level | None = None, *, from_zero: bool = False
) -> str:
    """A figure with a curve for each of `lines` over steps; empty where none has a point.

    It stands twice in the page, for wide and for narrow screens, so that its text keeps its size.
    """
    return _figure(title, lines, unit, level, from_zero, (("wide", 1080, 320), ("narrow", 360, 260)))


def small_chart(
    title: str, lines: Sequence[Line], unit: str = "", level: Level | None = None, *, from_zero: bool = False
) -> str:
    """The same at a third of the page's width."""
    return _figure(title, lines, unit, level, from_zero, (("", 360, 220),))


def _figure(
    title: str,
    lines: Sequence[Line],
    unit: str,
    level: Level | None,
    from_zero: bool,
    sizes: Sequence[tuple[str, int, int]],
) -> str:
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    keys = [(line.style, line.name) for line in lines] + ([("level", level.name)] if level else [])
    legend = "".join(f'<span class="key {style}">{escape(name)}</span>' for style, name in keys) if keys[1:] else ""
    told = f"{title}: {'; '.join(map(_in_words, lines))}" + (f"; {level.name} {short(level.value)}" if level else "")
    drawn = "".join(
        f'<svg class="{style}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told)}">'
        f"{_plot(lines, level, from_zero, width, height)}</svg>"
        for style, width, height in sizes
    )
    caption = f"{escape(title)}{f' <small>{escape(unit)}</small>' if unit else ''}"
    return f'<figure><figcaption>{caption}<span class="keys">{legend}</span></figcaption>{drawn}</figure>'


def _in_words(line: Line) -> str:
    (first, start), (last, end) = line.points[0], line.points[-1]
    if len(line.points) == 1:
        return f"{line.name} {short(end)} at step {last:g}"
    return f"{line.name} from {short(start)} at step {first:g} to {short(end)} at step {last:g}"


def _plot(lines: Sequence[Line], level: Level | None, from_zero: bool, width: int, height: int) -> str:
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points] + ([level.value] if level else [])
    left, right = min(steps), max(steps)
    if left == right:
        left, right = left - 1, right + 1
    low, high = (min(0.0, *values) if from_zero else min(values)), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = (low if from_zero and low == 0 else low - room), high + room

    def x(step: float) -> float:
        return _LEFT + (step - left) / (right - left) * (width - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (height - _TOP - _BOTTOM)

    out = []
    for value in ticks(low, high, height // 45):
        at = f"{y(value):.1f}"
        out.append(f'<path class="grid" d="M{_LEFT} {at}H{width - _RIGHT}"/>')
        out.append(f'<text x="{_LEFT - 7}" y="{at}" dy=".33em" text-anchor="end">{short(value)}</text>')
    for value in ticks(max(left, 0), right, max(5, width // 110), whole=True):
        at = f"{x(value):.1f}"
        out.append(f'<path class="grid" d="M{at} {height - _BOTTOM}v4"/>')
        out.append(f'<text x="{at}" y="{height - _BOTTOM + 17}" text-anchor="middle">{value:,.0f}</text>')
    out.append(f'<text x="{width - _RIGHT}" y="{height - 4}" text-anchor="end" class="axis">step</text>')
    if level is not None:
        out.append(f'<path class="level" d="M{_LEFT} {y(level.value):.1f}H{width - _RIGHT}"/>')
    hints = []
    for line in lines:
        line, band = _thinned(line)
        if band:
            edge = [f"{x(step):.1f} {y(top):.1f}" for step, _, top in band]
            edge += [f"{x(step):.1f} {y(bottom):.1f}" for step, bottom, _ in reversed(band)]
            out.append(f'<path class="band {line.style}" d="M{"L".join(edge)}z"/>')
        places = [(x(step), y(value)) for step, value in line.points]
        out.append(f'<path class="line {line.style}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in places)}"/>')
        if line.dots or len(places) == 1:
            out += [f'<circle class="dot {line.style}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in places]
        if len(places) <= MOST_HINTS:
            hints += [
                f'<circle class="hint" cx="{a:.1f}" cy="{b:.1f}" r="7">'
                f"<title>{escape(line.name)}, step {step:g}: {short(value)}</title></circle>"
                for (a, b), (step, value) in zip(places, line.points, strict=True)
            ]
    return "".join(out + hints)


def _thinned(line: Line) -> tuple[Line, list[tuple[float, float, float]]]:
    """The line with at most `MOST_POINTS`, and (step, lowest, highest) around each if there were more."""
    if len(line.points) <= MOST_POINTS:
        return line, []
    each = -(-len(line.points) // MOST_POINTS)
    means, band = [], []
    for start in range(0, len(line.points), each):
        part = line.points[start : start + each]
        step, values = sum(step for step, _ in part) / len(part), [value for _, value in part]
        means.append((step, sum(values) / len(values)))
        band.append((step, min(values), max(values)))
    return replace(line, points=means), band
