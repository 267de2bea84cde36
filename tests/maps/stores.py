"""Small archives for tests, written through the writer that workers use."""

from pathlib import Path

import numpy as np

from olmoearth_jax.inference import quantize
from olmoearth_jax.maps import conventions, plan, store
from olmoearth_jax.maps.lattice import Grid, Lattice

SIDE = 16


def make(
    path: Path, rule: quantize.Rule, grids: dict[int, Grid], periods: list[plan.Period],
    dimensions: int = 8, left_out: tuple[str, ...] = (), **provenance,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Writes an archive of random values; (values [S, S, D], valid) of each shard by id."""
    attrs = conventions.root_attributes(
        rule, dimensions, 10.0, "urn:sha256:0", ["sentinel2_l2a"], "olmoearth-jax 0",
        (dimensions, dimensions // 2), {"normalize": rule.normalize, **provenance},
    )  # fmt: skip
    form = store.Form(dimensions, rule, periods, SIDE, SIDE // 2, dimensions // 2, attrs)
    store.make_store(path, form, grids)
    writer, draw, out = store.Writer(path, form, grids), np.random.default_rng(0), {}
    for zone, grid in grids.items():
        for period in periods:
            for k in range(grid.rows * grid.cols):
                row, col = divmod(k, grid.cols)
                shard = plan.Shard(zone, period.name, grid.top + row, grid.left + col)
                if shard.id in left_out:
                    continue
                x = draw.normal(size=(SIDE, SIDE, dimensions)).astype(np.float32)
                valid = draw.random((SIDE, SIDE)) > 0.2
                q, scales, _ = quantize.quantize(x, valid, rule)
                writer.write(shard, np.moveaxis(q, -1, 0), scales, valid.astype(np.uint8) * 7)
                x = quantize.unit(x) if rule.normalize == "l2" else x
                out[shard.id] = x, valid
    return out


def grid(zone: int, easting: float, northing: float, rows: int = 2, cols: int = 3) -> Grid:
    """A grid whose top-left corner is the shard that holds a point."""
    lattice = Lattice(10.0, SIDE)
    return Grid(zone, lattice, *lattice.shard_at(easting, northing), rows, cols)
