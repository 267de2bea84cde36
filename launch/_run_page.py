"""One page for a training run: curves, pictures, settings and evaluations in a single file."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax import outputs
from olmoearth_jax.checkpoints import integrity
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib.official import official
from olmoearth_jax.evals import runner
from olmoearth_jax.files import write_atomically
from olmoearth_jax.train.comparison import series
from olmoearth_jax.train.metrics import is_timing, read_metrics
from olmoearth_jax.train.runfolder import RunFolder

NAME = "report.html"
_COLOURS = ("#4477aa", "#ee6677")
_MOST_POINTS = 400
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem;
       padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } th, td { padding: .2rem .7rem }
th { text-align: left; border-bottom: 1px solid #999 } td { border-bottom: 1px solid #eee }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
img, svg { max-width: 100%; height: auto } figure { display: inline-block; margin: .5rem 1rem }
figcaption { color: #555 } code { font-size: .9em }
"""


def write(run: Path, overwrite: bool = False) -> Path:
    """Writes the page of a run into its folder.

    Raises:
      ValueError: no run there, or a page that is not of this program.
    """
    path = run / NAME
    outputs.check(path, overwrite=overwrite)
    write_atomically(path, page(run))
    return path


def page(run: Path) -> str:
    """The page of a run.

    Raises:
      ValueError: the folder holds no metrics or config.
    """
    records = read_metrics(run)
    config = run / "config.json"
    if not config.is_file():
        raise ValueError(f"{run} is no run folder: it has no config.json")
    cfg = json.loads(config.read_text(encoding="utf-8"))
    name = str(cfg.get("common", {}).get("run_name", run.name))
    parts = [f"<h1>{_esc(name)}</h1>", _head(records, cfg)]
    parts += ["<h2>Curves</h2>", *_curves(records)]
    if pictures := _pictures(RunFolder(run).pictures):
        parts += ["<h2>Pictures</h2>", pictures]
    if table := _evaluations(run / "evals"):
        parts += ["<h2>Evaluations</h2>", table]
    parts += ["<h2>Settings</h2>", _settings(cfg)]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="{outputs.MARK}"><title>{_esc(name)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _esc(value: Any) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table of texts, of which the columns after the first `words` are numbers."""
    kinds = ["" if i < words else ' class="n"' for i in range(len(head))]
    top = "".join(f"<th{k}>{_esc(h)}</th>" for k, h in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{k}>{_esc(c)}</td>" for k, c in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _head(records: Sequence[Mapping[str, Any]], cfg: Mapping[str, Any]) -> str:
    last = max((r["step"] for r in records), default=0)
    common, data = cfg.get("common", {}), cfg.get("dataset", {})
    rows = [
        ["recipe", common.get("recipe") or "own"],
        ["steps so far", f"{last:,}"],
        ["modalities", ", ".join(common.get("training_modalities", []))],
        ["dataset", data.get("h5py_dir") or ""],
        ["kept out for validation", f"{data.get('validation_fraction', 0):.0%}"],
    ]
    for name in ("train/loss", "val/loss"):
        if found := [v for _, v in series(records, name) if math.isfinite(v)]:
            rows.append([name, f"{found[-1]:.4g} (first {found[0]:.4g})"])
    return _table(["", ""], rows, words=2)


def _curves(records: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {n for r in records for n in r}
    chosen = [n for n in names if n.startswith(("train/", "val/", "eval")) and not is_timing(n)]
    first = [n for n in ("train/loss", "val/loss") if n in chosen]
    rest = sorted(n for n in chosen if n not in first)
    return [c for n in [*first, *rest, "optim/LR (group 0)"] if (c := _curve(records, n))]


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> str:
    """One metric over the steps; a long one is thinned out."""
    points = [(s, v) for s, v in series(records, name) if math.isfinite(v)]
    if len(points) < 2:
        return ""
    points = points[:: max(1, len(points) // _MOST_POINTS)] + points[-1:]
    low, high = min(v for _, v in points), max(v for _, v in points)
    begin, end = points[0][0], points[-1][0]
    px = [70 + 340 * (s - begin) / max(end - begin, 1) for s, _ in points]
    py = [130 - 110 * (v - low) / max(high - low, 1e-12) for _, v in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(px, py, strict=True))
    colour = _COLOURS[name.startswith(("val/", "eval"))]
    parts = [
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        _text(65, 24, f"{high:.4g}", "end"), _text(65, 134, f"{low:.4g}", "end"),
        _text(70, 155, f"step {begin}"), _text(410, 155, str(end), "end"),
    ]  # fmt: skip
    picture = (
        f'<svg viewBox="0 0 420 165" width="420" role="img" aria-label="{_esc(name)}" '
        f'font-size="11" font-family="sans-serif">{"".join(parts)}</svg>'
    )
    return f"<figure>{picture}<figcaption>{_esc(name)}</figcaption></figure>"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{_esc(text)}</text>'


def _pictures(folder: Path) -> str:
    """Those of the first step beside the newest."""
    out = []
    for path in sorted(folder.glob("*.png"), key=_order):
        data = base64.b64encode(path.read_bytes()).decode()
        about = path.stem.replace("_", " ")
        out.append(f'<figure><img alt="{_esc(about)}" src="data:image/png;base64,{data}">'
                   f"<figcaption>{_esc(about)}</figcaption></figure>")  # fmt: skip
    return "".join(out)


def _order(path: Path) -> tuple[str, int]:
    found = re.fullmatch(r"(.*)_step_(\d+)", path.stem)
    return (found[1], int(found[2])) if found else (path.stem, 0)


def _evaluations(folder: Path) -> str:
    if not (folder / runner.LINES).is_file():
        return ""
    rows = []
    for item in runner.read_lines(folder):
        valid, test = (_score(item.get(part)) for part in ("valid", "test"))
        metric = (item.get("valid") or item.get("test") or {}).get("primary_key", "")
        rows.append([item["task"], item["mode"], metric, str(item.get("checkpoint_step", "")),
                     valid, test])  # fmt: skip
    return _table(["task", "mode", "metric", "step", "valid", "test"], rows, words=3)


def _score(found: Mapping[str, Any] | None) -> str:
    value = (found or {}).get("primary")
    return "" if value is None else f"{value:.4f}"


def _settings(cfg: Mapping[str, Any]) -> str:
    """What differs from the official recipe that the run was made from, or from the defaults."""
    size, version, *_ = [*str(cfg.get("common", {}).get("recipe", "")).split(), "", ""]
    try:
        base, what = official(size, version), f"the official {size}, {version}"
    except (ValueError, KeyError):
        base, what = ExperimentConfig(), "the defaults"
    lines = integrity.config_differences(base.to_dict(), cfg, ignored=())
    rows = []
    for line in lines:
        path, _, change = line.partition(": ")
        before, _, now = change.partition(" -> ")
        rows.append([path, _short(before), _short(now)])
    return f"<p>Different from {_esc(what)}:</p>" + _table(["", "there", "here"], rows, words=3)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:110]} ..."
