"""Kinds of places and changes in an archive: clusters of embeddings, and periods compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.inference.quantize import unit
from olmoearth_jax.maps import cogs, extract, preview
from olmoearth_jax.maps.archive import Archive, Zone

STEPS = 50
"""Lloyd steps of k-means."""
NO_CLUSTER = 255
_ROWS = 65536  # vectors that are compared with the centres at once
_BINS = 200_000
"""Of the distances 0..2, for medians without keeping all values."""


def k_means(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Centres float64 [k, d] of unit vectors [N, d]: k-means++, then Lloyd steps.

    Raises:
      ValueError: fewer different vectors than clusters.
    """
    x, draw = x.astype(np.float64), np.random.default_rng(seed)
    centres = [x[draw.integers(len(x))]] if len(x) else []
    far = np.full(len(x), np.inf)
    while 0 < len(centres) < k:
        far = np.minimum(far, ((x - centres[-1]) ** 2).sum(1))
        total = far.sum()
        if not total > 0:
            break
        # The last of the sums may miss 1 by rounding.
        at = np.searchsorted(np.cumsum(far) / total, draw.random(), side="right")
        centres.append(x[min(int(at), len(x) - 1)])
    if len(centres) < k:
        raise ValueError(f"there are fewer than {k} different embeddings; take a smaller --k")
    out = np.stack(centres)
    for _ in range(STEPS):
        label = nearest(x, out)
        count = np.bincount(label, minlength=k)
        total = np.stack([np.bincount(label, x[:, d], k) for d in range(x.shape[1])], 1)
        new = np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], out)
        if np.array_equal(new, out):
            break
        out = new
    return out


def nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Number of the nearest centre of each vector [N, d]; the first of equals."""
    out, sizes = np.zeros(len(x), np.int64), (centres**2).sum(1)
    for low in range(0, len(x), _ROWS):  # a shard in float64 would take gigabytes
        part = x[low : low + _ROWS].astype(np.float64)
        out[low : low + _ROWS] = (sizes - 2 * part @ centres.T).argmin(1)
    return out


def cluster(
    archive: Archive, period: Any, output: Path, k: int = 12, seed: int = 0,
    width: int | None = None,
) -> list[Path]:  # fmt: skip
    """Writes the cluster of every embedding as bytes, one COG per zone; the files.

    Clusters are numbered by their size in all zones, the largest is 0; 255 is nodata.

    Raises:
      ValueError: a period or width that the archive has not, or too few embeddings.
    """
    if not 2 <= k <= NO_CLUSTER:
        raise ValueError(f"--k must be 2..{NO_CLUSTER}, not {k}")
    step, d = archive.step_of(period), archive.width_of(width)
    x = unit(preview.sample_vectors(archive)[:, :d])
    centres, count = k_means(x, k, seed), np.zeros(k, np.int64)
    for _, _, _, label in _labels(archive, step, centres):
        count += np.bincount(label[label != NO_CLUSTER], minlength=k)[:k]
    order = np.argsort(-count, kind="stable")
    ranks = np.full(256, NO_CLUSTER, np.uint8)
    ranks[order] = np.arange(k)
    colors = _colors(x, centres[order])
    files = cogs.named(output, archive.zones)
    with contextlib.ExitStack() as stack:
        writers = {
            number: stack.enter_context(
                cogs.writing(
                    files[number], **extract.form_of(zone),
                    dtype="uint8", names=["cluster"], nodata=NO_CLUSTER, colors=colors,
                    overviews="mode", tags={**extract.tags_of(archive, period), "SEED": str(seed)},
                )
            )
            for number, zone in ((n, archive.zone(n)) for n in archive.zones)
        }  # fmt: skip
        for zone, rows, cols, label in _labels(archive, step, centres):
            writers[zone.number].put(rows.start, cols.start, ranks[label][None])
    return list(files.values())


def _labels(
    archive: Archive, step: int, centres: np.ndarray
) -> Iterator[tuple[Zone, slice, slice, np.ndarray]]:
    """Cluster of each embedding [h, w], part by part; 255 where there is none."""
    for zone in map(archive.zone, archive.zones):
        for rows, cols in zone.parts():
            x, valid = archive.window(zone, step, rows, cols, centres.shape[1])
            if valid.any():
                out = np.full(valid.shape, NO_CLUSTER, np.uint8)
                out[valid] = nearest(unit(x[valid]), centres)
                yield zone, rows, cols, out


def _colors(x: np.ndarray, centres: np.ndarray) -> dict[int, tuple[int, int, int]]:
    """A colour per cluster: its place among the principal components of a sample."""
    from olmoearth_jax.evals.embeddings import fit_pca

    dims = min(3, x.shape[1])
    pca = fit_pca(x, dims)
    lo, hi = np.percentile(pca(x), [2, 98], axis=0)
    scores = np.zeros((len(centres), 1, 3), np.float32)
    scores[:, 0, :dims] = pca(centres)
    lo, hi = (np.resize(v, 3) for v in (lo, hi))
    rgb = preview.to_rgb(scores, np.ones(scores.shape[:2], bool), lo, hi)[:, 0]
    return {i: (int(r), int(g), int(b)) for i, (r, g, b) in enumerate(rgb)}


def change(
    archive: Archive, periods: list[Any], output: Path, width: int | None = None
) -> list[Path]:
    """Writes how much embeddings of two periods differ, one COG of two bands per zone; the files.

    The first band is c = 1 - cosine, NaN where either has none; the second (c - median) /
    (1.4826 MAD) over everything, whose median and MAD are exact to 1e-5.

    Raises:
      ValueError: not two periods of the archive, a width it has not, or nothing in both.
    """
    if len(periods) != 2 or archive.step_of(periods[0]) == archive.step_of(periods[1]):
        raise ValueError(
            f"give two different periods, as in --years=2023,2024; there are "
            f"{', '.join(map(str, archive.periods))}"
        )
    steps = [archive.step_of(p) for p in periods]
    archive.width_of(width)
    bins = np.zeros(_BINS, np.int64)
    for _, _, _, c in _distances(archive, steps, width):
        bins += np.bincount(_bin(c), minlength=_BINS)
    if not bins.sum():
        raise ValueError(f"no embedding is there in both {periods[0]} and {periods[1]}")
    median = _middle(bins)
    spread = np.zeros(_BINS, np.int64)
    middles = (np.arange(_BINS) + 0.5) * 2 / _BINS
    np.add.at(spread, _bin(np.abs(middles - median)), bins)
    scale = 1.4826 * _middle(spread)
    files = cogs.named(output, archive.zones)
    tags = extract.tags_of(archive, " to ".join(map(str, periods)))
    tags |= {"MEDIAN": f"{median:.6g}", "SCALE": f"{scale:.6g}"}
    with contextlib.ExitStack() as stack:
        writers = {
            number: stack.enter_context(
                cogs.writing(
                    files[number], **extract.form_of(zone),
                    dtype="float32", names=["change", "score"], nodata=np.nan, tags=tags,
                )
            )
            for number, zone in ((n, archive.zone(n)) for n in archive.zones)
        }  # fmt: skip
        for zone, rows, cols, c in _distances(archive, steps, width):
            both = np.stack([c, (c - median) / scale]).astype(np.float32)
            writers[zone.number].put(rows.start, cols.start, both)
    return list(files.values())


def _distances(
    archive: Archive, steps: list[int], width: int | None
) -> Iterator[tuple[Zone, slice, slice, np.ndarray]]:
    """1 - cosine float32 [h, w] of two periods, part by part; NaN where either has none."""
    for zone in map(archive.zone, archive.zones):
        for rows, cols in zone.parts():
            (a, one), (b, two) = (archive.window(zone, s, rows, cols, width) for s in steps)
            both = one & two
            if both.any():
                x, y = (unit(np.where(both[..., None], v, 0)).astype(np.float64) for v in (a, b))
                c = np.clip(1 - (x * y).sum(-1), 0, 2)
                yield zone, rows, cols, np.where(both, c, np.nan).astype(np.float32)


def _bin(c: np.ndarray) -> np.ndarray:
    found = c[np.isfinite(c)]
    return np.minimum((found * (_BINS / 2)).astype(np.int64), _BINS - 1)


def _middle(bins: np.ndarray) -> float:
    """The median of what was counted; the middle of its bin."""
    at = np.searchsorted(np.cumsum(bins), (bins.sum() + 1) // 2)
    return float((at + 0.5) * 2 / _BINS)
