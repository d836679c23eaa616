"""Text and numbers as HTML: everything that is not ours is escaped here."""

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence


def escape(value: object) -> str:
    """`value` as text that is safe inside an element and inside a quoted attribute.

    >>> escape('<b title="x">')
    '&lt;b title=&quot;x&quot;&gt;'
    """
    text = str(value).encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be written
    # Control characters are not allowed in HTML; a visible sign stands for them.
    return html.escape("".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text))


def short(value: float) -> str:
    """A number in a few characters, for an axis or a tile.

    >>> [short(x) for x in (0, 2e-05, 0.25, 1.23456, 63.12, 61240, 1_200_000)]
    ['0', '2e-05', '0.25', '1.235', '63.1', '61.2k', '1.2M']
    """
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{exponent}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{float(f'{value / scale:.3g}'):g}{unit}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}' if size >= 10 else f'{value:.4g}'):g}"


def duration(seconds: float) -> str:
    """
    >>> [duration(x) for x in (4.2, 75, 7322)]
    ['4 s', '1 min 15 s', '2 h 2 min']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers within [low, high], at most `most` of them, 1, 2 or 5 times a power of ten apart.

    >>> ticks(0, 12, 5, whole=True)
    [0.0, 5.0, 10.0]
    """
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10, 20, 50):
        apart = power * factor
        if whole and apart < 1:
            continue
        first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
        if last - first + 1 <= most:
            return [number * apart for number in range(first, last + 1)]
    return [low]


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of cells that are HTML already; the first of a row is its heading. Narrow screens scroll it."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    top = f"<thead><tr>{columns}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def section(name: str, title: str, *content: str) -> str:
    """A part of the page with a heading that can be linked to."""
    inside = "\n".join(part for part in content if part)
    return f'<section id="{name}"><h2>{title}</h2>\n{inside}\n</section>'
