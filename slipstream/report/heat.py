"""A value of every layer over the steps, as a map of colours in inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.report.markup import escape, short

LEVELS = 7  # colours, classes h0 to h6
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 4, 36

Cells = list[list[float | None]]


@dataclass(frozen=True)
class HeatMap:
    """What to draw.

    Attributes:
        layers: their names, from the input on.
        steps: of the columns.
        values: `[layers][steps]`; None: not known.
        breaks: `LEVELS - 1` rising numbers; a value gets a darker colour for each that it reaches.
    """

    title: str
    layers: Sequence[str]
    steps: Sequence[int]
    values: Cells
    breaks: Sequence[float]


def heat_map(found: HeatMap) -> str:
    """The figure, for wide and for narrow screens."""
    known = [value for row in found.values for value in row if value is not None]
    if not known:
        return ""
    worst = max(known)
    row = next(number for number, values in enumerate(found.values) if worst in values)
    told = (
        f"{found.title}, {len(found.layers)} layers over steps {found.steps[0]} to {found.steps[-1]}: at most "
        f"{short(worst)}, in layer {found.layers[row]} at step {found.steps[found.values[row].index(worst)]}"
    )
    edges = ["", *(f"{number:g}" for number in found.breaks)]
    names = [f"under {edges[1]}", *(f"{edge} and more" if edge == edges[-1] else edge for edge in edges[1:])]
    used = range(_level(max(known), found.breaks) + 1)
    legend = "".join(f'<span class="key block h{level}">{names[level]}</span>' for level in used)
    drawn = "".join(
        f'<svg class="{style}" viewBox="0 0 {width} {_height(found, style)}" role="img" aria-label="{escape(told)}">'
        f"{_draw(found, width, columns, style)}</svg>"
        for style, width, columns in (("wide", 1080, 120), ("narrow", 360, 50))
    )
    return (
        f'<figure><figcaption>{escape(found.title)}<span class="keys">{legend}</span></figcaption>{drawn}'
        f"<p>{escape(told.removeprefix(found.title + ', ').capitalize())}.</p></figure>"
    )


def _row_height(found: HeatMap) -> float:
    return max(5.0, min(22.0, 420 / len(found.layers)))


def _height(found: HeatMap, style: str) -> int:
    return round(_TOP + _row_height(found) * len(found.layers) + _BOTTOM)


def _draw(found: HeatMap, width: int, most: int, style: str) -> str:
    """Cells of a colour are one path, which keeps the file small; of steps that share a column the worst counts."""
    each = -(-len(found.steps) // most)
    starts = range(0, len(found.steps), each)
    wide, high = (width - _LEFT - _RIGHT) / len(starts), _row_height(found)
    paths: dict[str, list[str]] = {}
    for number, values in enumerate(found.values):
        y = _TOP + number * high
        runs = _runs([_worst(values[start : start + each], found.breaks) for start in starts])
        for kind, begin, length in runs:
            at = f"M{_LEFT + begin * wide:.1f} {y:.1f}h{length * wide:.1f}v{high:.1f}h{-length * wide:.1f}z"
            paths.setdefault(kind, []).append(at)
    out = [f'<path class="{kind}" d="{"".join(parts)}"/>' for kind, parts in sorted(paths.items())]
    for number in range(0, len(found.layers), math.ceil(16 / high)):
        y = _TOP + (number + 0.5) * high
        name = found.layers[number] if len(found.layers[number]) <= 6 else f"{found.layers[number][:5]}…"
        out.append(f'<text x="{_LEFT - 7}" y="{y:.1f}" dy=".33em" text-anchor="end">{escape(name)}</text>')
    bottom = _TOP + high * len(found.layers)
    for index in range(0, len(starts), math.ceil(len(starts) * 90 / width)):
        x = _LEFT + (index + 0.5) * wide
        out.append(
            f'<text x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{found.steps[starts[index]]:,}</text>'
        )
    out.append(f'<text x="{_LEFT - 7}" y="{bottom + 31:.1f}" text-anchor="end" class="axis">layer</text>')
    out.append(f'<text x="{width - _RIGHT}" y="{bottom + 31:.1f}" text-anchor="end" class="axis">step</text>')
    return "".join(out)


def _level(value: float, breaks: Sequence[float]) -> int:
    return sum(value >= limit for limit in breaks)


def _worst(values: Sequence[float | None], breaks: Sequence[float]) -> str:
    known = [value for value in values if value is not None]
    return f"h{_level(max(known), breaks)}" if known else "unknown"


def _runs(kinds: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, begin, length) of neighbours that are alike."""
    found: list[tuple[str, int, int]] = []
    for index, kind in enumerate(kinds):
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1], found[-1][2] + 1)
        else:
            found.append((kind, index, 1))
    return found
