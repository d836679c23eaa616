"""The parts of the step side by side, as an SVG that reads on light and dark pages."""

from html import escape
from typing import Any

from slipstream.bench.measure import PARTS

_COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "optimizer": "#54a24b"}
_LEFT, _WIDTH, _BAR, _ROW, _TOP = 210, 560, 20, 30, 56
_STYLE = "text{font:13px system-ui,sans-serif;fill:#222}@media(prefers-color-scheme:dark){text{fill:#ddd}}"


def step_plot(report: dict[str, Any]) -> str:
    """Stacked bars, one for each contender and gate; beside each its milliseconds and its ratio to the first."""
    rows = report["rows"]
    longest = max([row["step"]["median"] for row in rows if "error" not in row], default=1.0)
    height = _TOP + _ROW * len(rows) + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 {height}" width="920" height="{height}">',
        f"<style>{_STYLE}</style>",
        f'<text x="10" y="20" font-weight="bold">{escape(_title(report))}</text>',
    ]
    for index, part in enumerate(PARTS):
        left = _LEFT + 120 * index
        out.append(f'<rect x="{left}" y="32" width="12" height="12" fill="{_COLOURS[part]}"/>')
        out.append(f'<text x="{left + 18}" y="43">{part}</text>')
    for number, row in enumerate(rows):
        y = _TOP + _ROW * number
        middle = y + _BAR * 0.72
        name = escape(f"{row['contender']} · {row['gate']}")
        out.append(f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end">{name}</text>')
        if "error" in row:
            out.append(f'<text x="{_LEFT}" y="{middle}" font-style="italic">{escape(row["error"][:70])}</text>')
            continue
        x = float(_LEFT)
        for part in PARTS:
            width = row[part]["median"] / longest * _WIDTH
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{_COLOURS[part]}"/>')
            x += width
        label = f"{row['step']['median']:.1f} ms" + (f" · {row['speedup_step']:.2f} x" if "speedup_step" in row else "")
        out.append(f'<text x="{x + 6:.1f}" y="{middle}">{label}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _title(report: dict[str, Any]) -> str:
    options = report["options"]
    return (
        f"{options['model']}, {report['model']['layers']} layers, {options['micro_batch']} x {options['seq_len']} "
        f"tokens, {report['device']}, ms a step"
    )
