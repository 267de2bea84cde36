"""Goldens of maps: plan, look-up, workers, quantisation, and what belongs to labels."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from olmoearth_jax.maps import area, lattice, plan, quantise, work_list

from .common import Case, Checks, Result, load_json, load_npz, skipped


def cases(folder: Path) -> Iterator[Case]:
    """All cases of a folder of goldens of maps; what a compact copy lacks is left out."""
    for name, made in _MADE.items():
        if (folder / name).exists():
            yield from made(folder)
    try:
        labels = importlib.import_module(f"{__package__}.maps_labels")
    except ModuleNotFoundError as e:
        if e.name != f"{__package__}.maps_labels":
            raise
        yield skipped("labels", "not built yet")
    else:
        yield from labels.cases(folder)


def _quantise(folder: Path) -> Iterator[Case]:
    def run() -> Result:
        g, checks = load_npz(folder / "quantise.npz"), Checks()
        valid = g["valid"]
        rules = {
            "power": quantise.rule_of("int8", "signed_power", None),
            "scale": quantise.rule_of("int8", "per_pixel_scale", None),
            "linear": quantise.rule_of("int8", "linear", None, float(g["linear_scale"]),
                                       float(g["linear_offset"])),
        }  # fmt: skip
        checks.array("unit", quantise.unit(g["x"])[valid], g["unit"][valid], rtol=1e-6)
        for name, rule in rules.items():
            q, scales, _ = quantise.quantise(g["x"], valid, rule)
            want = g[f"{name}_q"]
            near = g.get(f"{name}_near_tie", np.zeros(want.shape, bool)) & valid[:, None]
            off = np.abs(q.astype(int) - want)
            checks.true(f"{name}: values differ", (off[~near] == 0).all() and (off <= 1).all())
            if scales is not None:
                checks.array(f"{name} scales", scales, g["scale_scales"], rtol=1e-6)
            back = quantise.restore(want, rule, g["scale_scales"])
            checks.array(f"{name} back", back, g[f"{name}_back"], rtol=1e-6)
        return checks.result("int8 exact but at ties, 1e-6 |ref|")

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


def _workers(folder: Path) -> Iterator[Case]:
    def run() -> Result:
        g, checks = load_json(folder / "workers.json"), Checks()
        for case in g["cases"]:
            flags = case["flags"]
            try:
                got = list(work_list.place_of(flags.get("shard"), flags.get("of"), case["env"]))
            except ValueError:
                got = "error"
            checks.equal(f"{case['env']} {flags}", got, case["expect"])
        order = g["order"]
        for i in range(order["workers"]):
            taken = list(work_list.order(order["shards"], i, order["workers"]))
            checks.equal(f"order of {i}", taken, order["own"][str(i)] + order["then"][str(i)])
        return checks.result()

    yield Case("workers", run)


_MADE = {
    "quantise.npz": _quantise,
    "plan.json": _plans,
    "lookup.json": _lookup,
    "workers.json": _workers,
}
