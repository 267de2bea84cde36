"""Goldens of maps from labels: rasterised labels, the block split, metrics, and blended tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.evals import scoring
from olmoearth_jax.maps import label_files, labels, lattice, report, split, tile_map

from .common import Case, Checks, Result, load_json, load_npz


def cases(folder: Path) -> Iterator[Case]:
    """All cases of labels, splits, metrics and blending in a folder of goldens of maps."""
    for name, check in _FILES.items():
        if (folder / name).is_file():
            yield from check(folder)


@dataclasses.dataclass
class Burnt:
    """Labels on a grid.

    Attributes:
      labels: int of classes and `nodata`, or float32 with NaN, [H, W].
      pixels: per feature the flat numbers of the pixels that it covers, ascending.
      report: features outside, empty (burn nothing) and repaired; pixels in conflict and labelled.
      empty_ids: of the features that burn nothing.
    """

    labels: np.ndarray
    pixels: list[np.ndarray]
    report: dict[str, int]
    empty_ids: list[str]


def burn(
    features: label_files.Features,
    codes: Sequence[float],
    crs: Any,
    transform: Any,
    shape: tuple[int, int],
    nodata: int | None = 255,
    all_touched: bool = False,
) -> Burnt:
    """As `labels.burn_cells`, with an array of the whole grid.

    Args:
      nodata: of classes; None for values, where NaN means none.
    """
    slack = labels.SAME if nodata is None else 0.0
    got = labels.burn_cells(features, codes, crs, transform, shape, slack, all_touched)
    if nodata is None:
        out = np.full(shape[0] * shape[1], np.nan, np.float32)
    else:
        out = np.full(shape[0] * shape[1], nodata, np.uint8 if nodata == 255 else np.uint16)
    out[got.cells] = got.codes
    return Burnt(out.reshape(shape), got.pixels, got.report, got.empty_ids)


def _case(name: str, run: Callable[..., Result], *given) -> Case:
    return Case(name, lambda: run(*given))


def _label_cases(folder: Path) -> Iterator[Case]:
    for record in load_json(folder / "labels.json"):
        yield _case(f"labels/{record['key']}", _labels, record, folder)


def _labels(record: dict, folder: Path) -> Result:
    import shapely.geometry
    from rasterio.transform import Affine

    checks, want = Checks(), load_npz(folder / "labels.npz")
    held = record["labels"]["features"]
    features = label_files.Features(
        [shapely.geometry.shape(f["geometry"]) for f in held], record["labels_crs"],
        [f["properties"][record["column"]] for f in held],
        {"id": [str(i) for i in range(len(held))]},
    )  # fmt: skip
    place = record["raster_crs"], Affine(*record["transform"]), tuple(record["shape"])
    for turn in (1, -1):  # the order of features must not matter
        shown = label_files.Features(
            features.shapes[::turn], features.crs, features.values[::turn], features.columns
        )
        codes = [record["classes"][v] for v in shown.values]
        got = burn(shown, codes, *place, all_touched=record["all_touched"])
        checks.array("labels", got.labels, want[record["key"]])
        checks.equal("report", {k: got.report[k] for k in record["report"]}, record["report"])
        tokens = f"{record['key']}_tokens4"
        checks.array("tokens", labels.to_tokens(got.labels, 4), want[tokens])
    if set(features.values) == set(record["classes"]):
        numbers = {c.name: c.value for c in labels.classes_of(features.values)}
        checks.equal("numbers of classes", numbers, record["classes"])
    return checks.result()


def _split_cases(folder: Path) -> Iterator[Case]:
    held = load_json(folder / "split.json")
    for record in held["samples"]:
        yield _case(f"split/{record['name']}", _split, record)
    for record in held["blocks_only"]:
        yield _case(f"split/{record['name']}", _assign, record)


def _split(record: dict) -> Result:
    checks, samples = Checks(), record["samples"]
    zone, east, north = (np.array([s[k] for s in samples]) for k in ("zone", "E", "N"))
    checks.array("zones", lattice.zone_of([s["lon"] for s in samples]), zone)
    own = split.blocks_of(zone, east, north, record["block_m"])
    checks.equal("blocks", own, [tuple(s["block"]) for s in samples])
    got = split.split_blocks(
        zone, east, north, [{s["class"]: 1} for s in samples], record["block_m"], record["seed"],
        record["fractions"], record["gap_m"],
    )  # fmt: skip
    checks.equal("splits", got.names, [s["split"] for s in samples])
    sure = np.array([not s.get("unsure", False) for s in samples])
    checks.array("left out", got.dropped[sure], np.array([s["dropped"] for s in samples])[sure])
    want = {tuple(b["block"]): b["split"] for b in record["blocks"]}
    checks.equal("splits of the blocks", got.blocks, want)
    return checks.result()


def _assign(record: dict) -> Result:
    checks = Checks()
    counts = {tuple(b["block"]): b["counts"] for b in record["blocks"]}
    got = split.assign(counts, record["seed"], record["fractions"])
    checks.equal("splits", got, {tuple(b["block"]): b["split"] for b in record["blocks"]})
    return checks.result()


def _blend_cases(folder: Path) -> Iterator[Case]:
    yield _case("blend", _blend, folder / "blend.npz")


def _blend(path: Path) -> Result:
    z, checks = load_npz(path), Checks(atol=1e-5)
    tile, overlap = int(z["tile"]), int(z["overlap"])
    height, width, channels = z["blended"].shape
    rows, cols = (tile_map.starts(side, tile, overlap) for side in (height, width))
    checks.array("rows", rows, z["row_starts"])
    checks.array("columns", cols, z["col_starts"])
    checks.array("weights", tile_map.weights(tile), z["weights"], 0, 1e-12)
    whole = tile_map.Blend(slice(0, height), slice(0, width), channels, (tile, tile))
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            whole.add(row, col, z["probs"][i, j])
    got, there = whole.result()
    checks.true("every pixel", there.all())
    checks.array("blended", got, z["blended"])
    sure = ~z["near_tie"]
    checks.array("classes", got.argmax(-1)[sure], z["classes"][sure], 0, 0)
    return checks.result()


def _metric_cases(folder: Path) -> Iterator[Case]:
    for name, check in (
        ("classification", _classes), ("regression", _values), ("class_weights", _weights)
    ):  # fmt: skip
        yield _case(f"metrics/{name}", check, load_json(folder / "metrics.json")[name])


def _classes(want: dict) -> Result:
    checks = Checks(atol=1e-9)
    truth, guess = (np.array(want[k]) for k in ("truth", "predicted"))
    got = report.class_scores(scoring.confusion_matrix(guess, truth, want["num_classes"]))
    checks.equal("confusion", got["confusion"], want["confusion"])
    for key in ("overall_accuracy", "balanced_accuracy", "macro_f1", "mean_iou"):
        checks.array(key, got[key], want[key])
    for number, row in enumerate(want["per_class"]):
        _numbers(checks, f"class {number}", got["per_class"][number], row)
    return checks.result()


def _numbers(checks: Checks, what: str, got: dict, want: dict) -> None:
    """Equal members, None where it is None there."""
    for key, value in want.items():
        if value is None or got[key] is None:
            checks.equal(f"{what} {key}", got[key], value)
        else:
            checks.array(f"{what} {key}", got[key], value)


def _values(want: dict) -> Result:
    checks = Checks(atol=1e-9)
    got = report.value_scores(np.array(want["truth"]), np.array(want["predicted"]))
    _numbers(checks, "values", got, {k: want[k] for k in ("rmse", "mae", "bias", "r2")})
    return checks.result()


def _weights(want: dict) -> Result:
    checks = Checks(atol=1e-9)
    checks.array("balanced", report.class_weights(want["counts"]), want["balanced"])
    return checks.result()


_FILES = {
    "metrics.json": _metric_cases,
    "labels.json": _label_cases,
    "split.json": _split_cases,
    "blend.npz": _blend_cases,
}
