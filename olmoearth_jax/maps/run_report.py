"""The files of a finished run that people read: report, predictions, pictures."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.evals import scoring
from olmoearth_jax.files import replacing, write_atomically
from olmoearth_jax.maps import report as reporting
from olmoearth_jax.maps import report_html, run_folder, samples
from olmoearth_jax.maps.labelled import Labelled
from olmoearth_jax.maps.lattice import LONLAT, crs_of
from olmoearth_jax.maps.scenes import Scene
from olmoearth_jax.maps.token_cache import Tokens


def write(
    folder: Path,
    o: Any,
    found: Labelled,
    tokens: Mapping[str, Tokens],
    guesses: Mapping[str, np.ndarray],
    baselines: Mapping[str, np.ndarray],
    counts: np.ndarray,
    log: Sequence[Mapping[str, Any]],
    scenes: Sequence[Scene],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes all reports of a run and then removes its cache; returns the report.

    Args:
      o: options of the run.
      tokens, guesses: of each split: its labels, and probabilities or values [N, K] for them.
      baselines: the same of the scored split by other means.
      counts: labels of each class in training.
      log: one record an epoch.
    """
    scored = scored_split(tokens)
    part, guess = tokens[scored], guesses[scored]
    blocks = found.blocks()[part.window]
    report = _report(o, found, tokens, guesses, baselines, counts)
    report["interval"] = _interval(found, part.labels, guess, blocks, o.seed)
    report["scored_split"] = scored
    report["best_epoch"] = next((r["epoch"] for r in reversed(log) if r.get("best")), None)
    write_atomically(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log))
    run_folder.write_json(folder / "split.geojson", split_features(found))
    _write_predictions(folder / "predictions.parquet", found, part, guess, scenes)
    if report["classes"] is not None:
        confusion = np.array(report["splits"][scored]["confusion"])
        try:
            draw_confusion(folder / "confusion.png", confusion, report["classes"])
        except ImportError:
            report["notes"].append("no confusion.png: it needs the 'viz' extra")
    write_atomically(folder / "report.md", reporting.markdown(report))
    write_atomically(folder / "report.html", report_html.page(folder, report=report))
    run_folder.write_json(folder / run_folder.REPORT, report)  # last: it says that all is there
    shutil.rmtree(folder / "cache", ignore_errors=True)
    say(reporting.markdown(report))
    return report


def scored_split(tokens: Mapping[str, Tokens]) -> str:
    """The split that tells how good a run is."""
    return next(s for s in ("test", "valid", "train") if s in tokens)


def _report(o, found: Labelled, tokens, guesses, baselines, counts) -> dict[str, Any]:
    classes = found.target.classes
    splits = {s: _scores(found, t.labels, guesses[s]) for s, t in tokens.items()}
    scored = scored_split(tokens)
    truth, others = tokens[scored].labels, {}
    if classes is None:
        mean = np.full(len(truth), tokens["train"].labels.mean(dtype=np.float64))
        others["mean of training"] = reporting.value_scores(truth, mean)
    else:
        confusion = reporting.majority_confusion(truth, counts.tolist())
        others["majority class"] = reporting.class_scores(confusion)
    others |= {name: _scores(found, truth, guess) for name, guess in baselines.items()}
    return {
        "title": f"Map of {o.labels.label_column or o.labels.value_column or 'labels'}",
        "model": o.model, "mode": o.mode,
        "task": "values" if classes is None else "classes",
        "primary_metric": "rmse" if classes is None else "macro_f1",
        "classes": None if classes is None else [c.name for c in classes],
        "unit": found.target.unit, "splits": splits, "baselines": others,
        "labels": found.counts, "block": found.split.side, "blocks": len(found.split.blocks),
        "left_out_by_the_gap": int(found.split.dropped.sum()), "notes": list(found.notes),
        "seed": o.seed,
    }  # fmt: skip


def _scores(found: Labelled, labels: np.ndarray, guess: np.ndarray) -> dict[str, Any]:
    classes = found.target.classes
    if classes is None:
        return {"labels": len(labels), **reporting.value_scores(labels, guess[:, 0])}
    confusion = scoring.confusion_matrix(guess.argmax(-1), labels, len(classes))
    return {"labels": len(labels), **reporting.class_scores(confusion)}


def _interval(found: Labelled, labels, guess, blocks, seed: int) -> list[float | None]:
    if found.target.classes is None:
        return reporting.value_interval(labels, guess[:, 0], blocks, seed)
    size, kind = len(found.target.classes), guess.argmax(-1)
    each = [
        scoring.confusion_matrix(kind[blocks == b], labels[blocks == b], size)
        for b in np.unique(blocks)
    ]
    return reporting.class_interval(np.stack(each), seed)


def split_features(found: Labelled) -> dict[str, Any]:
    """The blocks with their split and labels as GeoJSON; windows, if the labels say the split."""
    held = samples.counts_of(found.windows, found.target)
    if found.split.blocks:
        numbers = found.blocks()
        order = sorted(found.split.blocks)
        corners = [
            (z, np.array([[x, y], [x + 1, y], [x + 1, y + 1], [x, y + 1]]) * found.split.side)
            for z, x, y in order
        ]
        names = [found.split.blocks[b] for b in order]
        labels: list[dict[str, int]] = [{} for _ in order]
        for number, counts in zip(numbers, held, strict=True):
            for c, n in counts.items():
                labels[number][c] = labels[number].get(c, 0) + n
    else:
        low, high = found.places.boxes
        corners = [
            (int(z), np.array([[a[0], a[1]], [b[0], a[1]], [b[0], b[1]], [a[0], b[1]]]))
            for z, a, b in zip(found.places.zone, low, high, strict=True)
        ]
        names, labels = found.split.names, [dict(h) for h in held]
    features = []
    for (zone, ring), name, counts in zip(corners, names, labels, strict=True):
        lon, lat = transform_points(crs_of(zone), LONLAT, ring[:, 0].tolist(),
                                    ring[:, 1].tolist())  # fmt: skip
        places = [[round(float(x), 7), round(float(y), 7)] for x, y in zip(lon, lat, strict=True)]
        features.append({
            "type": "Feature",
            "properties": {"split": name, "labels": sum(counts.values()), **counts},
            "geometry": {"type": "Polygon", "coordinates": [[*places, places[0]]]},
        })  # fmt: skip
    return {"type": "FeatureCollection", "features": features}


def _write_predictions(
    path: Path, found: Labelled, part: Tokens, guess: np.ndarray, scenes: Sequence[Scene]
) -> None:
    import pyarrow
    import pyarrow.parquet

    lon, lat = np.zeros(len(part.labels)), np.zeros(len(part.labels))
    for number, scene in enumerate(scenes):
        mine = np.flatnonzero(part.scene == number)
        if len(mine):
            rows, cols = (part.row[mine] + 0.5).tolist(), (part.col[mine] + 0.5).tolist()
            lon[mine], lat[mine] = scene.lonlat(rows, cols)
    columns: dict[str, Any] = {"id": part.ids, "lon": lon, "lat": lat}
    if found.target.classes is None:
        columns |= {"truth": part.labels, "predicted": guess[:, 0]}
    else:
        names = np.array([c.name for c in found.target.classes])
        columns |= {
            "truth": names[part.labels], "predicted": names[guess.argmax(-1)],
            "score": guess.max(-1),
        }  # fmt: skip
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)


def draw_confusion(path: Path, confusion: np.ndarray, names: Sequence[str]) -> None:
    """A picture of a confusion matrix: rows are truth, with counts and percent of the row.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    size, plain = len(names), [reporting.shortened(name) for name in names]
    side = min(3 + 0.6 * size, 20)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes: Any = figure.add_subplot()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for r in range(size):
        for c in range(size if size <= reporting.MOST_NUMBERED else 0):
            text = f"{confusion[r, c]}\n{share[r, c]:.0%}"
            color = "white" if share[r, c] > 0.5 else "black"
            axes.text(c, r, text, ha="center", va="center", color=color, fontsize=8)
    # A name such as "$x" is no formula.
    axes.set_xticks(range(size), plain, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(size), plain, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # a letter that the font lacks is a box
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": "olmoearth-jax"})
