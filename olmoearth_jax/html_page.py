"""Parts of an HTML page that is one file and fetches nothing: tables, pictures and curves."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from olmoearth_jax import outputs

BLUE, RED = "#4477aa", "#ee6677"
_MOST_POINTS = 400
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem;
       padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } th, td { padding: .2rem .7rem }
th { text-align: left; border-bottom: 1px solid #999 } td { border-bottom: 1px solid #eee }
td { overflow-wrap: anywhere } td:first-child { min-width: 9rem }
td.n, th.n { overflow-wrap: normal; text-align: right; font-variant-numeric: tabular-nums }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .35em 0 .9em;
       vertical-align: -.1em; border: 1px solid #888 }
img, svg { max-width: 100%; height: auto } figcaption { color: #555 } code { font-size: .9em }
figure { display: inline-block; margin: .5rem 1rem .5rem 0 }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page with the mark of this program.

    Args:
      title: text.
      parts: HTML of the body; empty ones are left out.
    """
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="{outputs.MARK}"><title>{escaped(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def escaped(value: Any) -> str:
    """HTML that shows a value as text."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose columns after the first `words` are numbers; cells are HTML."""
    kinds = ["" if i < words else ' class="n"' for i in range(len(head))]
    top = "".join(f"<th{k}>{h}</th>" for k, h in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{c}</td>" for k, c in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def key(color: str) -> str:
    """A small square of a colour, for legends."""
    return f'<span class="key" style="background:{escaped(color)}"></span>'


def figure(picture: str, caption: str) -> str:
    """A picture over its caption; both are HTML."""
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def image(png: bytes, about: str, width: int | None = None) -> str:
    """A PNG file within the page.

    Args:
      png: contents of the file.
      about: text for those who do not see it.
      width: in CSS pixels; its own by default.
    """
    size = "" if width is None else f' width="{width}"'
    data = base64.b64encode(png).decode()
    return f'<img alt="{escaped(about)}"{size} src="data:image/png;base64,{data}">'


def drawing(width: float, height: float, parts: Iterable[str], about: str) -> str:
    """An SVG picture of a size in CSS pixels."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{escaped(about)}">'
        + "".join(parts) + "</svg>"
    )  # fmt: skip


def label(x: float, y: float, text: str, anchor: str = "start", color: str = "#222") -> str:
    """A text within a drawing."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" text-anchor="{anchor}" fill="{color}">'
        f"{escaped(text)}</text>"
    )


def curve(
    name: str,
    points: Iterable[tuple[int, float]],
    unit: str,
    color: str = BLUE,
    marked: int | None = None,
) -> str:
    """A figure of values over steps or epochs; '' for fewer than two finite values.

    Args:
      name: its caption, a text.
      points: (place, value) in ascending order; a long curve is thinned out.
      unit: of places, as 'step'.
      color: of the line.
      marked: a place that gets a dot.
    """
    finite = [(at, value) for at, value in points if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, high = min(v for _, v in finite), max(v for _, v in finite)
    begin, end = finite[0][0], finite[-1][0]

    def place(at: int, value: float) -> tuple[str, str]:
        x = 70 + 340 * (at - begin) / max(end - begin, 1)
        return f"{x:.1f}", f"{130 - 110 * (value - low) / max(high - low, 1e-12):.1f}"

    shown = [*finite[: -1 : max(1, len(finite) // _MOST_POINTS)], finite[-1]]
    line = " ".join(",".join(place(*point)) for point in shown)
    parts = [
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>',
        label(65, 24, f"{high:.4g}", "end"), label(65, 134, f"{low:.4g}", "end"),
        label(70, 155, f"{unit} {begin}"), label(410, 155, str(end), "end"),
    ]  # fmt: skip
    for x, y in (place(*point) for point in finite if point[0] == marked):
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{RED}"/>')
    return figure(drawing(420, 165, parts, name), escaped(name))
