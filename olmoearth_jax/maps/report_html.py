"""One page for a run and its map: pictures and tables in a single file, with nothing to fetch."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import library as rasterio_library
from olmoearth_jax.files import read_json_lines
from olmoearth_jax.html_page import (
    curve,
    document,
    drawing,
    escaped,
    figure,
    image,
    key,
    label,
    table,
)
from olmoearth_jax.images import png
from olmoearth_jax.maps import report as reporting
from olmoearth_jax.maps import run_folder
from olmoearth_jax.maps.run_folder import Task

SPLIT_COLORS = {"train": "#4477aa", "valid": "#ccbb44", "test": "#ee6677"}
_SIDE = 900
"""Most pixels per side of the preview."""


def page(run: Path, made: Path | None = None, report: Mapping[str, Any] | None = None) -> str:
    """The page of a run, and of a map that was made with it.

    Args:
      run: folder of the run, with all but perhaps its report.
      made: folder of the map's files.
      report: of the run; as it lies there by default.

    Raises:
      ValueError: the run is not finished.
    """
    task = run_folder.read_task(run, finished=report is None)
    if report is None:
        report = json.loads((run / run_folder.REPORT).read_text())
    assert report is not None
    parts = [f"<h1>{escaped(report['title'])}</h1>", _summary(report)]
    if made is not None:
        parts += ["<h2>Map</h2>", _preview(task, made), _areas(made)]
    parts += ["<h2>Scores</h2>", _scores(report)]
    if task.target.classes is None:
        parts += [_scatter(run, task, report["scored_split"])]
    else:
        colors = [c.color for c in task.target.classes]
        scores = report["splits"][report["scored_split"]]
        parts += ["<h2>Classes</h2>", _class_table(report["classes"], scores["per_class"], colors)]
        parts += ["<h2>Confusion</h2>", _confusion(report["classes"], scores["confusion"])]
    parts += ["<h2>Split</h2>", _split_map(json.loads((run / "split.geojson").read_text()))]
    parts += ["<h2>Training</h2>", _curves(read_json_lines(run / "log.jsonl"))]
    parts += ["<h2>Labels and notes</h2>", _notes(report)]
    return document(report["title"], parts)


def check(run: Path) -> None:
    """Raises ValueError if a finished run lacks what the page of its maps needs, or it is damaged.

    What a map needs at its end should not fail only then.
    """
    try:
        page(run)
    except Exception as e:  # files of several kinds, damaged in any way
        told = f"there is no {e}" if isinstance(e, KeyError) else e
        raise ValueError(f"the report of {run} cannot be read: {told}") from None


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _summary(report: Mapping[str, Any]) -> str:
    scored, primary = report["scored_split"], report["primary_metric"]
    low, high = report["interval"]
    span = "" if low is None else f" (95 % of resampled blocks: {low:.3f} to {high:.3f})"
    score = _number(report["splits"][scored][primary])
    unit = f" {escaped(report['unit'])}" if report["unit"] else ""
    return (
        f"<p>{escaped(primary)} of the {scored} split: <strong>{score}{unit}</strong>{span}. Model "
        f"{escaped(Path(report['model']).name)}, mode {escaped(report['mode'])}.</p>"
    )


def _scores(report: Mapping[str, Any]) -> str:
    keys = ("overall_accuracy", "balanced_accuracy", "macro_f1", "mean_iou")
    if report["classes"] is None:
        keys = ("rmse", "mae", "bias", "r2")
    rows = [
        [escaped(name), _number(s.get("labels")), *(_number(s.get(k)) for k in keys)]
        for name, s in [*report["splits"].items(), *report["baselines"].items()]
    ]
    return table(["", "labels", *(k.replace("_", " ") for k in keys)], rows)


def _class_table(names, per_class, colors) -> str:
    keys = ("support", "precision", "recall", "f1", "iou")
    rows = [
        [key(color) + escaped(name), *(_number(row[k]) for k in keys)]
        for name, row, color in zip(names, per_class, colors, strict=True)
    ]
    return table(["class", *keys], rows)


def _confusion(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A picture of a confusion matrix; rows are truth."""
    names = [reporting.shortened(name) for name in names]
    reach = 7 * max(map(len, names))  # pixels of the longest name; those above stand at 45 degrees
    size, left, top, n = 56, reach + 16, int(0.71 * reach) + 24, len(names)
    out = []
    for r, row in enumerate(counts):
        total = max(sum(row), 1)
        y = top + r * size
        out.append(label(left - 8, y + size / 2 + 4, names[r], "end"))
        for c, count in enumerate(row):
            if not count and n > reporting.MOST_NUMBERED:
                continue
            x, share = left + c * size, count / total
            shade = (
                f"rgb({int(255 - 187 * share)},{int(255 - 136 * share)},{int(255 - 85 * share)})"
            )
            out.append(f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{shade}" '
                       'stroke="#fff"/>')  # fmt: skip
            if n > reporting.MOST_NUMBERED:
                continue
            ink = "#fff" if share > 0.6 else "#222"
            out.append(label(x + size / 2, y + size / 2 - 2, str(count), "middle", ink))
            out.append(label(x + size / 2, y + size / 2 + 13, f"{share:.0%}", "middle", ink))
    for c, name in enumerate(names):
        x = left + c * size + size / 2
        out.append(f'<text x="{x}" y="{top - 8}" font-size="12" '
                   f'transform="rotate(-45 {x} {top - 8})">{escaped(name)}</text>')  # fmt: skip
    picture = drawing(left + n * size + top, top + n * size + 10, out, "confusion matrix")
    return figure(picture, "Rows are truth, columns what the map shows; percent of the row.")


def _split_map(features: Mapping[str, Any]) -> str:
    """The blocks of the split in their colours, on a plain map."""
    rings = [np.array(f["geometry"]["coordinates"][0]) for f in features["features"]]
    every = np.concatenate(rings)
    low, high = every.min(0), every.max(0)
    stretch = np.cos(np.radians((low[1] + high[1]) / 2))  # a degree of longitude is shorter
    size = (high - low) * np.array([stretch, 1.0])
    scale = 640 / max(size.max(), 1e-9)
    parts = []
    for ring, feature in zip(rings, features["features"], strict=True):
        about = feature["properties"]
        x = (ring[:, 0] - low[0]) * stretch * scale + 5
        y = (high[1] - ring[:, 1]) * scale + 5
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        title = escaped(f"{about['split']}: {about['labels']} labels")
        color = SPLIT_COLORS.get(about["split"], "#999")
        parts.append(
            f'<polygon points="{points}" fill="{color}" fill-opacity=".75" stroke="#fff">'
            f"<title>{title}</title></polygon>"
        )
    keys = "".join(f"{key(c)}{s}" for s, c in SPLIT_COLORS.items())
    picture = drawing(size[0] * scale + 10, size[1] * scale + 10, parts, "map of the split")
    return figure(picture, keys)


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Loss and validation metric by epoch."""
    out = []
    best = [r["epoch"] for r in records if r.get("best")]
    for name in records[0] if records else ():
        if name in ("epoch", "best", "lr"):
            continue
        points = [(r["epoch"], r[name]) for r in records if isinstance(r.get(name), int | float)]
        caption = "training loss" if name == "loss" else f"validation {name}"
        out.append(curve(caption, points, "epoch", marked=best[-1] if best else None))
    return "".join(out)


def _notes(report: Mapping[str, Any]) -> str:
    rows = [[escaped(k.replace("_", " ")), _number(v)] for k, v in report["labels"].items() if v]
    notes = "".join(f"<li>{escaped(n)}</li>" for n in report["notes"])
    return table(["labels", ""], rows) + (f"<ul>{notes}</ul>" if notes else "")


def _scatter(run: Path, task: Task, split: str) -> str:
    """Truth against prediction of the samples that were scored."""
    import pyarrow.parquet

    found = pyarrow.parquet.read_table(run / "predictions.parquet")
    truth, guess = (np.array(found[k], float)[:2000] for k in ("truth", "predicted"))
    low, high = min(truth.min(), guess.min()), max(truth.max(), guess.max())
    place = lambda v: 40 + 400 * (v - low) / max(high - low, 1e-9)  # noqa: E731
    parts = ['<line x1="40" y1="440" x2="440" y2="40" stroke="#bbb"/>']
    parts += [
        f'<circle cx="{place(t):.1f}" cy="{480 - place(g):.1f}" r="2.5" fill="#4477aa" '
        'fill-opacity=".5"/>' for t, g in zip(truth, guess, strict=True)
    ]  # fmt: skip
    parts += [label(40, 460, f"{low:.4g}"), label(440, 460, f"{high:.4g}", "end")]
    unit = f" in {escaped(task.target.unit)}" if task.target.unit else ""
    picture = drawing(480, 480, parts, "truth and prediction")
    return figure(picture, f"Samples of the {split} split: truth across, prediction up{unit}.")


def _preview(task: Task, made: Path) -> str:
    """The map thinned out, with its legend."""
    rasterio = rasterio_library()
    name = "values" if task.target.classes is None else "classes"
    with rasterio.open(made / f"{name}.tif") as file:
        shrink = max(1.0, max(file.shape) / _SIDE)
        shape = tuple(max(1, round(n / shrink)) for n in file.shape)
        x = file.read(1, out_shape=shape)
    pixels = np.full((*x.shape, 3), 255, np.uint8)  # white where there is no data
    if task.target.classes is None:
        there = np.isfinite(x)
        low, high = np.percentile(x[there], [2, 98]) if there.any() else (0.0, 1.0)
        share = np.clip((np.where(there, x, low) - low) / max(high - low, 1e-9), 0, 1)[..., None]
        ramp = np.array([[255, 255, 229], [0, 69, 41]])
        pixels[there] = (ramp[0] + share * (ramp[1] - ramp[0]))[there].astype(np.uint8)
        keys = f"{key('#ffffe5')}{low:.4g}{key('#004529')}{high:.4g} {escaped(task.target.unit)}"
    else:
        keys = ""
        for c in task.target.classes:
            pixels[x == c.value] = [int(c.color[i : i + 2], 16) for i in (1, 3, 5)]
            keys += key(c.color) + escaped(c.name)
    return figure(image(png(pixels), "map", x.shape[1]), keys)


def _areas(made: Path) -> str:
    path = made / "areas.csv"
    if not path.is_file():
        return ""
    first, *lines = path.read_text().splitlines()
    rows = [
        [escaped(r["class"]), f"{int(r['pixels']):,}", f"{float(r['hectares']):,.1f}",
         f"{float(r['share']):.1%}" if r["share"] else ""]
        for r in csv.DictReader(lines)
    ]  # fmt: skip
    shares = table(["class", "pixels", "hectares", "share"], rows)
    return f"{shares}<p>{escaped(first.lstrip('# '))}.</p>"
