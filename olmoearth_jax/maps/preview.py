"""Colours of an archive: three principal components of its embeddings as red, green and blue.

The components are fitted once to vectors from all zones and periods; then every shard is rendered
with its overviews, by itself, so that the work can be stopped and shared as that of the archive.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data import durable, work_list
from olmoearth_jax.evals.embeddings import fit_pca
from olmoearth_jax.maps import cogs, conventions, extract
from olmoearth_jax.maps.archive import Archive, Zone
from olmoearth_jax.maps.plan import Shard
from olmoearth_jax.maps.store import NOT_PROCESSED, zarr_library

MOST_VECTORS = 100_000
SMALLEST = 64
"""Side of the shards of the last overview."""
_FORM = 1


def to_rgb(scores: np.ndarray, valid: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3]: scores lo..hi as 1..255, 0 where there is nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (scores - lo) / (hi - lo)
    share = np.clip(np.nan_to_num(share), 0, 1)
    return np.where(valid[..., None], 1 + np.rint(share * 254), 0).astype(np.uint8)


def halve(rgb: np.ndarray) -> np.ndarray:
    """The next overview of uint8 [h, w, 3]: the mean of the valid pixels of 2 x 2, half up."""
    h, w = (side // 2 for side in rgb.shape[:2])
    parts = rgb[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).astype(np.int64)
    count = (parts[..., :1] > 0).sum((1, 3))
    total = parts.sum((1, 3))
    return np.where(count > 0, (2 * total + count) // np.maximum(2 * count, 1), 0).astype(np.uint8)


def sample_vectors(archive: Archive, most: int = MOST_VECTORS) -> np.ndarray:
    """float32 [N, D]: valid vectors, about as many of each zone and period.

    Shards are taken in the order of the SHA-256 of their ids, and thinned out by the same digest.
    """
    quota = max(1, most // (len(archive.zones) * len(archive.periods)))
    out = []
    for number in archive.zones:
        zone = archive.zone(number)
        for step, period in enumerate(archive.periods):
            shards = {_id(zone, period, r, c): (r, c) for r, c in zone.shards()}
            order = sorted((hashlib.sha256(unit.encode()).digest(), unit) for unit in shards)
            each, left = max(256, -(-quota // len(shards))), quota
            for digest, unit in order:
                if not left:
                    break
                found = _some(archive, zone, step, shards[unit], min(each, left), digest)
                out.append(found)
                left -= len(found)
    return np.concatenate(out) if out else np.zeros((0, archive.dimensions), np.float32)


def _some(
    archive: Archive, zone: Zone, step: int, shard: tuple[slice, slice], most: int, digest: bytes
) -> np.ndarray:
    """float32 [N, D]: up to `most` embeddings of a shard, drawn by a digest, in their order."""
    seen = np.asarray(zone.coverage[step, shard[0], shard[1]])
    places = np.flatnonzero((seen > 0) & (seen < NOT_PROCESSED))
    draw = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    chosen = np.sort(draw.choice(places, min(most, len(places)), replace=False))
    out = [np.zeros((0, archive.dimensions), np.float32)]
    for rows, cols in zone.stripes(*shard):
        low, high = ((at - shard[0].start) * seen.shape[1] for at in (rows.start, rows.stop))
        own = chosen[(chosen >= low) & (chosen < high)] - low
        if len(own):
            x, valid = archive.window(zone, step, rows, cols)
            own = own[valid.reshape(-1)[own]]
            out.append(x.reshape(-1, x.shape[-1])[own])
    return np.concatenate(out)


def _id(zone: Zone, period: Any, rows: slice, cols: slice) -> str:
    """The id of a shard in the plan of its archive."""
    a, _, c, _, _, f = zone.transform
    top, left = round(-f / a) // zone.side, round(c / a) // zone.side
    row, col = top + rows.start // zone.side, left + cols.start // zone.side
    return Shard(zone.number, str(period), row, col).id


def _name(zone: Zone, period: Any, rows: slice, cols: slice) -> str:
    return f"utm{zone.number:02d}/{period}/{rows.start}_{cols.start}"


def fit(archive: Archive) -> dict[str, Any]:
    """What `preview.json` holds: mean, components, lo, hi, variance share, job digest.

    Raises:
      ValueError: fewer than four embeddings.
    """
    x = sample_vectors(archive)
    if len(x) < 4 or archive.dimensions < 3:
        raise ValueError(f"a preview needs embeddings: there are {len(x)} of {archive.dimensions}")
    pca = fit_pca(x, 3)
    lo, hi = np.percentile(_scores(x, pca.mean, pca.components), [2, 98], axis=0)
    return {
        "mean": pca.mean.tolist(), "components": pca.components.tolist(), "lo": lo.tolist(),
        "hi": hi.tolist(), "variance_share": pca.variance_retained, "vectors": len(x),
        "job_digest": archive.attrs.get("olmoearth:job_digest", ""),
    }  # fmt: skip


def _scores(x: np.ndarray, mean: Any, components: Any) -> np.ndarray:
    return (x.astype(np.float64) - mean) @ np.asarray(components).T


def write(
    archive: Archive, output: Path, say: Callable[[str, Mapping[str, Any]], None]
) -> tuple[list[Path], work_list.Outcome]:
    """Fits, renders and writes preview.json, preview.zarr and preview/*.tif below a folder.

    Args:
      archive: complete or not; only done shards are shown.
      output: the folder of the archive.
      say: is called after each rendered shard.

    Raises:
      ValueError: no embeddings, or a preview of another job.
    """
    path = output / "preview.json"
    if not path.is_file():
        durable.write_first(path, json.dumps(fit(archive)) + "\n")
    held = durable.read_json(path) or {}
    if held.get("job_digest") != archive.attrs.get("olmoearth:job_digest", ""):
        raise ValueError(f"{path} is of another job: delete it and {output / 'preview.zarr'}")
    store = output / "preview.zarr"
    _make_store(archive, store)
    units = list(_units(archive))
    digest = work_list.digest_of({"form": _FORM, "fit": held})
    folder = output / "job" / "preview"
    work = work_list.WorkList(folder, store, digest, list(units))
    render = _Renderer(archive, store, held)
    found = work.run(render, say=say)
    made = [path, store]
    if not found.busy and not found.failed:
        made += _write_maps(archive, store, output / "preview", held)
    return made, found


def _units(archive: Archive) -> Iterator[str]:
    """Ids of the shards that hold something now; those that come later are another run's."""
    for number in archive.zones:
        zone = archive.zone(number)
        for step, period in enumerate(archive.periods):
            for rows, cols in zone.shards():
                coverage = np.asarray(zone.coverage[step, rows, cols])
                if ((coverage > 0) & (coverage < 255)).any():
                    yield _name(zone, period, rows, cols)


def _levels(zone: Zone) -> int:
    """How many levels there are, the full one included."""
    count, side = 1, zone.side
    while side % 2 == 0 and side // 2 >= SMALLEST:
        count, side = count + 1, side // 2
    return count


class _Renderer:
    def __init__(self, archive: Archive, store: Path, held: Mapping[str, Any]):
        self._archive, self._store, self._held = archive, store, held
        self._zarr = zarr_library()

    def __call__(self, unit: str) -> tuple[dict[str, Any], list[str]]:
        """Renders a shard in all levels."""
        name, period, place = unit.split("/")
        top, left = (int(v) for v in place.split("_"))
        zone = self._archive.zone(int(name[3:]))
        step, side, keys = self._archive.step_of(period), zone.side, []
        rows, cols = slice(top, top + side), slice(left, left + side)
        parts = [self._rgb(zone, step, *part) for part in zone.stripes(rows, cols)]
        rgb = np.concatenate(parts)
        valid = int((rgb > 0).any(-1).sum())
        for level in range(_levels(zone)):
            if level:
                rgb, side, top, left = halve(rgb), side // 2, top // 2, left // 2
            array = self._zarr.open_array(self._store / name / str(level), mode="r+", zarr_format=3)
            at = slice(top, top + side), slice(left, left + side)
            array[(step, slice(None), *at)] = np.moveaxis(rgb, -1, 0)
            key = f"{name}/{level}/c/{step}/0/{top // side}/{left // side}"
            if (self._store / key).is_file():
                keys.append(key)
        return {"valid": valid}, keys

    def _rgb(self, zone: Zone, step: int, rows: slice, cols: slice) -> np.ndarray:
        """Colours uint8 [h, w, 3] of a window; 0 where there is no embedding."""
        x, valid = self._archive.window(zone, step, rows, cols)
        out, p = np.zeros((*valid.shape, 3), np.uint8), self._held
        if valid.any():
            scores = _scores(x[valid], p["mean"], p["components"])
            shown = to_rgb(scores, np.ones(len(scores), bool), np.array(p["lo"]), np.array(p["hi"]))
            out[valid] = shown
        return out


def _make_store(archive: Archive, path: Path) -> None:
    """Makes preview.zarr with all metadata, unless it is there."""
    if path.exists():
        return
    zarr, scratch = zarr_library(), path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        root = zarr.open_group(scratch, mode="w", zarr_format=3)
        for number in archive.zones:
            zone = archive.zone(number)
            group = root.create_group(f"utm{number:02d}", attributes=_attributes(zone))
            for level in range(_levels(zone)):
                side = zone.side >> level
                shape = (zone.shape[0] >> level, zone.shape[1] >> level)
                group.create_array(
                    str(level), shape=(len(archive.periods), 3, *shape),
                    chunks=(1, 3, min(side, 256), min(side, 256)), shards=(1, 3, side, side),
                    dtype="uint8", fill_value=0,
                    compressors=zarr.codecs.ZstdCodec(level=3, checksum=False),
                    dimension_names=("time", "rgb", "y", "x"),
                )  # fmt: skip
        with contextlib.suppress(OSError):
            scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _attributes(zone: Zone) -> dict[str, Any]:
    layout = []
    a, b, c, d, e, f = zone.transform
    height, width = zone.shape
    for level in range(_levels(zone)):
        k = 2**level
        entry: dict[str, Any] = {
            "asset": str(level), "spatial:shape": [height // k, width // k],
            "spatial:transform": [a * k, b, c, d, e * k, f],
        }  # fmt: skip
        if level:
            entry["derived_from"] = str(level - 1)
            entry["transform"] = {"scale": [2.0, 2.0], "translation": [0.0, 0.0]}
        layout.append(entry)
    return {
        "zarr_conventions": [conventions.MULTISCALES, conventions.SPATIAL, conventions.PROJ],
        "multiscales": {"layout": layout, "resampling_method": "average"},
        "proj:code": zone.crs, "spatial:dimensions": ["y", "x"],
        "spatial:bbox": [c, f + height * e, c + width * a, f],
    }  # fmt: skip


def _write_maps(archive: Archive, store: Path, folder: Path, held: Mapping[str, Any]) -> list[Path]:
    """A COG of red, green, blue and alpha for each zone and period."""
    zarr, made = zarr_library(), []
    for number in archive.zones:
        zone = archive.zone(number)
        array = zarr.open_array(store / f"utm{number:02d}" / "0", mode="r", zarr_format=3)
        for step, period in enumerate(archive.periods):
            path = folder / f"utm{number:02d}_{period}.tif"
            tags = extract.tags_of(archive, period)
            tags["VARIANCE_SHARE"] = f"{held['variance_share']:.4f}"
            with cogs.writing(
                path, **extract.form_of(zone), dtype="uint8",
                names=["red", "green", "blue", "alpha"], tags=tags, alpha=True,
                overviews="average",
            ) as file:  # fmt: skip
                for rows, cols in zone.shards():
                    rgb = np.asarray(array[step, :, rows, cols])
                    if rgb.any():
                        opaque = np.where(rgb[:1] > 0, 255, 0).astype(np.uint8)
                        file.put(rows.start, cols.start, np.concatenate([rgb, opaque]))
            made.append(path)
    return made
