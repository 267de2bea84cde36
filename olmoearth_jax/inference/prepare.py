"""From a sample in raw units to the arrays a model takes: normalised, filled, masked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.inference import missing_bands
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.masks import MISSING_TOKEN, VISIBLE
from olmoearth_jax.model.tokens import SlotTable

_BYTES = 4 << 20  # normalised at once

Ranges = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Per modality (lo, hi) float64 [bands]: the raw values that become 0 and 1."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Arrays of a batch.

    Attributes:
      data: normalised float32 per modality.
      masks: int8 token masks per modality, 0 visible, 3 missing.
      timestamps: int32 [B, T, 3].
    """

    data: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    timestamps: np.ndarray

    def rows(self, index: Any) -> Prepared:
        """The samples at these places of the batch."""
        data, masks = ({n: x[index] for n, x in d.items()} for d in (self.data, self.masks))
        return Prepared(data, masks, self.timestamps[index])

    @property
    def visible(self) -> np.ndarray:
        """bool [B, h, w]: patches of which any token is visible; h = w = 1 without images."""
        grids = {n: m for n, m in self.masks.items() if modalities.get(n).spatial}
        seen = [
            (m == VISIBLE).reshape(len(m), *(m.shape[1:3] if grids else (1, 1)), -1).any(-1)
            for m in (grids or self.masks).values()
        ]
        return np.asarray(np.stack(seen).any(0))


def ranges_of(names: tuple[str, ...], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Ranges of the modalities: those stored with the weights, else the registry's.

    Raises:
      ValueError: stored ranges for other bands than the registry has.
    """
    out = {}
    for name in names:
        record = stored.get(name, {})
        bands = list(modalities.get(name).bands)
        if "lo" in record:
            if list(record.get("bands", bands)) != bands:
                raise ValueError(f"the weights were normalised for other bands of {name}")
            out[name] = tuple(np.asarray(record[k], np.float64) for k in ("lo", "hi"))
        elif not record and modalities.get(name).norm_range() is not None:
            out[name] = modalities.get(name).norm_range()
        else:
            out[name] = (np.zeros(len(bands)), np.ones(len(bands)))
    return out


def prepare(
    sample: Sample,
    names: tuple[str, ...],
    slots: SlotTable,
    patch_size: int,
    version: str,
    ranges: Ranges,
) -> Prepared:
    """Normalises, fills and masks the modalities `names` of a sample; warns of much filling."""
    data, masks = {}, {}
    for name in names:
        raw, modality = sample.data[name], modalities.get(name)
        lo, hi = ranges[name]
        if sample.normalized:
            lo, hi, version = np.zeros_like(lo), np.ones_like(hi), "v1_1"
        sets = [list(slots.slots[i].channels) for i in slots.of(name)]
        pixels = patch_size * modality.image_factor if modality.spatial else 0
        gone = np.isnan(raw)
        if gone.any():
            # A batch or timestep without any data is masked: nothing is made up for it.
            area = (1, 2) if modality.spatial else ()
            absent = gone.all((*area, -1), keepdims=True)
            single = gone & ~gone.all(area, keepdims=True) & (sample.nan_pixels == "mask")
            source = np.where(absent, np.float32(0), raw)
            values, empty = missing_bands.fill(source, name, version, lo, hi, single)
            data[name] = np.where(absent, np.float32(0), values.astype(np.float32))
            lost = [
                _tokens((empty | absent)[..., bands].all(-1), single[..., bands].any(-1), pixels)
                for bands in sets
            ]
            masks[name] = np.where(np.stack(lost, -1), MISSING_TOKEN, VISIBLE).astype(np.int8)
        else:
            data[name] = _normalize(raw, lo, hi)
            shape = raw.shape[:-1]
            if pixels:
                shape = (shape[0], shape[1] // pixels, shape[2] // pixels, shape[3])
            masks[name] = np.zeros((*shape, len(sets)), np.int8)
    return Prepared(data, masks, sample.timestamps)


def _normalize(raw: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """float32 values with lo..hi made 0..1; the samples of a large batch side by side."""
    scale, shift = ((x / (hi - lo)).astype(np.float32) for x in (1.0, -lo))
    out = np.empty(raw.shape, np.float32)

    def part(rows: slice) -> None:
        np.multiply(raw[rows], scale, out=out[rows])
        out[rows] += shift

    each = max(1, len(raw) * _BYTES // max(out.nbytes, 1))
    parts = [slice(i, i + each) for i in range(0, len(raw), each)]
    if len(parts) == 1:
        part(parts[0])
    else:
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            list(pool.map(part, parts))
    return out


def _tokens(empty: Any, single: Any, pixels: int) -> np.ndarray:
    """bool [B, (h, w,) (T)]: tokens without data, or with single pixels that must not be seen.

    Args:
      empty: bool [B, (H, W,) (T)], no band has a value.
      single: bool of that shape, a band lacks a value here but not everywhere.
      pixels: side of a patch, 0 without a grid.
    """
    if not pixels:
        return empty
    batch, height, width, steps = empty.shape
    cut = (batch, height // pixels, pixels, width // pixels, pixels, steps)
    return np.asarray(empty.reshape(cut).all((2, 4)) | single.reshape(cut).any((2, 4)))
