"""Goldens of maps: plan, look-up, workers, quantisation, and what belongs to labels."""

from __future__ import annotations

import functools
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data import worker_place
from olmoearth_jax.inference import quantize
from olmoearth_jax.maps import (
    archive,
    area,
    conventions,
    labels,
    lattice,
    map_files,
    plan,
    preview,
    samples,
    store,
)

from . import maps_labels
from .common import Case, Checks, Result, load_json, load_npz


def cases(folder: Path) -> Iterator[Case]:
    """All cases of a folder of goldens of maps; a compact copy holds its stores in one file."""
    for name, made in _MADE.items():
        if (folder / name).exists():
            yield from made(folder)
    if (folder / "stores.zip").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            with zipfile.ZipFile(folder / "stores.zip") as held:
                held.extractall(scratch)
            yield from _stores(Path(scratch))
    yield from maps_labels.cases(folder)


def _as_uint8(probabilities: np.ndarray) -> np.ndarray:
    """What a map's file holds of probabilities [N, K]: uint8 [N, K]."""
    names = tuple(str(k) for k in range(probabilities.shape[1]))
    classes = [labels.Class(k, name, "#000000") for k, name in enumerate(names)]
    target = samples.Target(classes)
    bands = [b for b in map_files.bands_of(target, "uint8") if b.name == "probabilities"]
    valid = np.ones((len(probabilities), 1), bool)
    made = map_files.layers_of(target, bands, probabilities[:, None], valid)
    return np.moveaxis(made["probabilities"][..., 0], 0, -1)


def _quantise(folder: Path) -> Iterator[Case]:
    def run() -> Result:
        g, checks = load_npz(folder / "quantise.npz"), Checks()
        valid = g["valid"]
        rules = {
            "power": quantize.rule_of("int8", "signed_power", None),
            "scale": quantize.rule_of("int8", "per_pixel_scale", None),
            "linear": quantize.rule_of("int8", "linear", None, float(g["linear_scale"]),
                                       float(g["linear_offset"])),
        }  # fmt: skip
        checks.array("unit", quantize.unit(g["x"])[valid], g["unit"][valid], rtol=1e-6)
        for name, rule in rules.items():
            q, scales, _ = quantize.quantize(g["x"], valid, rule)
            want = g[f"{name}_q"]
            near = g.get(f"{name}_near_tie", np.zeros(want.shape, bool)) & valid[:, None]
            off = np.abs(q.astype(int) - want)
            checks.true(f"{name}: values differ", (off[~near] == 0).all() and (off <= 1).all())
            if scales is not None:
                checks.array(f"{name} scales", scales, g["scale_scales"], rtol=1e-6)
            back = quantize.restore(want, rule, g["scale_scales"])
            checks.array(f"{name} back", back, g[f"{name}_back"], rtol=1e-6)
        checks.array("probabilities", _as_uint8(g["prob"]), g["prob_q"], rtol=0, atol=0)
        return checks.result("int8 and uint8 exact but at ties, 1e-6 |ref|")

    yield Case("quantise", run)


def _plans(folder: Path) -> Iterator[Case]:
    for number, record in enumerate(load_json(folder / "plan.json")):

        def run(record: dict = record) -> Result:
            import shapely.geometry

            checks = Checks()
            shape = area.area_of([shapely.geometry.shape(record["area"])])
            grid = lattice.Lattice(record["token_m"], record["shard"])
            found = plan.make(area.by_zone(shape), grid, plan.periods_of(["2024"]))
            unsure = {s["id"] for s in record["shards"] if not s["sure"]}
            got = [s.id for s in found if s.id not in unsure]
            checks.equal("shards", got, [s["id"] for s in record["shards"] if s["sure"]])
            known = [plan.shard_of(s["id"]) for s in record["shards"]]
            grids = plan.grids_of(known, grid).values()
            checks.equal("zones", {g.name: _place(g) for g in grids}, record["zones"])
            return checks.result()

        yield Case(f"plan/{number} {record['name']}", run)


def _place(grid: lattice.Grid) -> dict:
    return {"spatial:shape": list(grid.shape), "spatial:transform": grid.transform,
            "spatial:bbox": grid.bbox, "proj:code": grid.crs}  # fmt: skip


def _lookup(folder: Path) -> Iterator[Case]:
    def run() -> Result:
        g, checks = load_json(folder / "lookup.json"), Checks()
        for p in g["points"]:
            row, col = lattice.pixel_of(g["transform"], p["x"], p["y"])
            inside = 0 <= row < g["shape"][0] and 0 <= col < g["shape"][1]
            got = {"x": p["x"], "y": p["y"], "row": int(row), "col": int(col), "inside": inside}
            checks.equal(f"point {p['x']}, {p['y']}", got, p)
        for lon, zone in g["zone_of_longitude"]:
            checks.equal(f"zone of {lon}", lattice.zone_of(lon), zone)
        return checks.result()

    yield Case("lookup", run)


def _preview(folder: Path) -> Iterator[Case]:
    def run() -> Result:
        g, checks = load_npz(folder / "preview.npz"), Checks()
        got = preview.to_rgb(g["scores"], g["valid"], g["lo"], g["hi"])
        exact = (g["scores"] - g["lo"]) / (g["hi"] - g["lo"]) * 254
        near = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-3
        off = np.abs(got.astype(int) - g["level0"])
        checks.true("level 0 differs", (off[~near] == 0).all() and (off <= 1).all())
        for level in (1, 2):
            below = preview.halve(g[f"level{level - 1}"])
            checks.array(f"level {level}", below, g[f"level{level}"])
        return checks.result("exact but at ties")

    yield Case("preview", run)


def _workers(folder: Path) -> Iterator[Case]:
    def run() -> Result:
        g, checks = load_json(folder / "workers.json"), Checks()
        for case in g["cases"]:
            flags = case["flags"]
            try:
                got = list(worker_place.place_of(flags.get("shard"), flags.get("of"), case["env"]))
            except ValueError:
                got = "error"
            checks.equal(f"{case['env']} {flags}", got, case["expect"])
        order = g["order"]
        for i in range(order["workers"]):
            taken = list(worker_place.order(order["shards"], i, order["workers"]))
            checks.equal(f"order of {i}", taken, order["own"][str(i)] + order["then"][str(i)])
        return checks.result()

    yield Case("workers", run)


def _stores(folder: Path) -> Iterator[Case]:
    for method in ("signed_power", "per_pixel_scale"):
        path = folder / f"store_{method}.zarr"
        if path.is_dir():
            yield Case(f"{path.name} points", functools.partial(_points, path))
            yield Case(f"{path.name} written again", functools.partial(_rewritten, path, method))


def _points(path: Path) -> Result:
    checks, held = Checks(), archive.open_archive(path)
    for p in load_json(path.with_suffix(".json"))["points"]:
        where, step = f"point {p['lon']}, {p['lat']}", held.step_of(p["year"])
        values, valid, place = held.locate([[p["lon"], p["lat"]]], [p["year"]])
        checks.equal(f"{where} place", place[0].tolist(), [p["zone"], p["row"], p["col"]])
        checks.equal(f"{where} valid", bool(valid[0, 0]), p["valid"])
        rows, cols = (slice(p[k], p[k] + 1) for k in ("row", "col"))
        q, _, coverage = held.stored(held.zone(p["zone"]), step, rows, cols)
        checks.equal(f"{where} coverage", int(coverage[0, 0]), p["coverage"])
        checks.equal(f"{where} int8", q[0, 0].tolist(), p["int8"])
        if p["valid"]:
            checks.array(f"{where} values", values[0, 0], p["value"], rtol=1e-6)
    return checks.result("1e-6 |ref|")


def _rewritten(path: Path, method: str) -> Result:
    """Writes the values of a recorded store again and compares all files."""
    checks, held = Checks(), archive.open_archive(path)
    periods = plan.periods_of([str(p) for p in held.periods])
    first = held.zone(held.zones[0])
    grid = lattice.Lattice(held.attrs["geoemb:gsd"], first.side)
    rule = quantize.rule_of("int8", method, None)
    own = {k.removeprefix("olmoearth:"): v for k, v in held.attrs.items() if "olmoearth:" in k}
    attrs = conventions.root_attributes(
        rule, held.dimensions, grid.token, held.attrs["geoemb:model"], ["sentinel2_l2a"],
        held.attrs["geoemb:build_version"], held.widths, own,
    )  # fmt: skip
    bands = store.band_chunk(held.dimensions, held.widths)
    chunk = first.coverage.chunks[-1]
    form = store.Form(held.dimensions, rule, periods, first.side, chunk, bands, attrs)
    shards = [
        plan.Shard(n, p.name, *np.add(_corner(held.zone(n), grid), (row, col)).tolist())
        for n in held.zones for p in periods
        for row in range(held.zone(n).shape[0] // grid.side)
        for col in range(held.zone(n).shape[1] // grid.side)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / store.NAME
        grids = plan.grids_of(shards, grid)
        store.make_store(out, form, grids)
        writer = store.Writer(out, form, grids)
        for shard in shards:
            zone = held.zone(shard.zone)
            row, col = np.subtract((shard.row, shard.col), _corner(zone, grid)) * grid.side
            at = slice(row, row + grid.side), slice(col, col + grid.side)
            q, scales, coverage = held.stored(zone, held.step_of(shard.period), *at)
            writer.write(shard, np.moveaxis(q, -1, 0), scales, coverage)
        names = [_objects_below(p) for p in (path, out)]
        checks.equal("names of the files", names[1], names[0])
        for name in set(names[0]) & set(names[1]):
            want, got = (p / name for p in (path, out))
            if name.endswith("zarr.json"):
                checks.equal(name, _metadata(got), _metadata(want))
            else:
                checks.true(f"{name} differs", got.read_bytes() == want.read_bytes())
    return checks.result()


def _corner(zone: archive.Zone, grid: lattice.Lattice) -> tuple[int, int]:
    return grid.shard_at(zone.transform[2], zone.transform[5])


def _metadata(path: Path) -> Any:
    """Metadata without the text of the CRS, which differs between versions of PROJ."""

    def cut(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: cut(v) for k, v in x.items() if k != "crs_wkt"}
        return x

    return cut(json.loads(path.read_text()))


_MADE = {
    "store_signed_power.zarr": _stores,
    "quantise.npz": _quantise,
    "plan.json": _plans,
    "lookup.json": _lookup,
    "workers.json": _workers,
    "preview.npz": _preview,
}


def _objects_below(path: Path) -> list[str]:
    files = (p for p in path.rglob("*") if p.is_file() and p.suffix != ".partial")
    return sorted(p.relative_to(path).as_posix() for p in files)
