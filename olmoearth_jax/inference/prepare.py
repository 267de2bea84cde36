"""From a sample in raw units to the arrays a model takes: normalised, filled, masked.

Missing bands are filled by the rule of a model's version (spec/model_v1_3.md section 8).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.masks import MISSING_TOKEN, VISIBLE
from olmoearth_jax.modalities import MISSING
from olmoearth_jax.model.tokens import SlotTable
from olmoearth_jax.model.versions import VERSIONS, Version
from olmoearth_jax.proposals import known

_WARN_ABOVE = 0.2  # share of a pixel's bands that may be made up without a word

# Central wavelengths in nm, by groups within which values may stand in for each other.
_GROUPS = {
    "sentinel2_l2a": [
        "B01 443 B02 490 B03 560 B04 665 B05 705 B06 740 B07 783 B08 842 B8A 865 B09 945 "
        "B11 1610 B12 2190"
    ],
    "landsat": [
        "B1 443 B2 482 B3 561 B8 590 B4 655 B5 865 B9 1373 B6 1609 B7 2201",
        "B10 10900 B11 12000",
    ],
}
_BYTES = 4 << 20  # normalised at once

_Ranges = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Per modality (lo, hi) float64 [bands]: the raw values that become 0 and 1."""


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """Arrays of a batch, as a model takes them."""

    data: dict[str, np.ndarray]
    """Normalised float32 per modality."""
    masks: dict[str, np.ndarray]
    """int8 token masks per modality, 0 visible, 3 missing."""
    timestamps: np.ndarray
    """int32 [B, T, 3]."""

    def rows(self, index: Any) -> ModelInput:
        """The samples at these places of the batch."""
        data, masks = ({n: x[index] for n, x in d.items()} for d in (self.data, self.masks))
        return ModelInput(data, masks, self.timestamps[index])

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


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a model asks of its inputs."""

    slots: SlotTable
    version: str
    """Decides how missing bands are filled."""
    ranges: _Ranges


def prepare(sample: Sample, names: tuple[str, ...], patch_size: int, rules: Rules) -> ModelInput:
    """Normalises, fills and masks the modalities `names` of a sample; warns of much filling."""
    slots, version = rules.slots, rules.version
    data, masks = {}, {}
    for name in names:
        raw, modality = sample.data[name], modalities.get(name)
        lo, hi = rules.ranges[name]
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
            values, empty = fill(source, name, version, (lo, hi), single)
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
    return ModelInput(data, masks, sample.timestamps)


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


@functools.lru_cache(maxsize=64)
def stand_ins(name: str, band: str) -> tuple[int, ...]:
    """Channels whose values may replace those of a band, nearest wavelength first."""
    bands = modalities.get(name).bands
    for text in _GROUPS.get(name, []):
        words = text.split()
        group = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        if here := group.pop(band, None):
            nearest = sorted(group, key=lambda b: (abs(group[b] - here), group[b]))
            return tuple(bands.index(b) for b in nearest)
    return ()


def _copy_bands(
    values: np.ndarray, missing: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Copies raw values of the nearest present band into missing ones (the rule of v1).

    Args:
      values: [..., bands], any dtype.
      missing: bool of that shape; copies never serve as sources themselves.
      name: modality.

    Returns:
      (values with the copies, bool of what is still missing).
    """
    values, still = values.copy(), missing.copy()
    for channel, band in enumerate(modalities.get(name).bands):
        for source in stand_ins(name, band):
            if not still[..., channel].any():
                break
            take = still[..., channel] & ~missing[..., source]
            values[..., channel] = np.where(take, values[..., source], values[..., channel])
            still[..., channel] &= ~take
    return values, still


def _warn(name: str, copied: np.ndarray, zeroed: np.ndarray, version: Version) -> None:
    """Warns of much filling, by the bands of the worst pixel; of any 0 where models know none."""
    bands = zeroed.shape[-1]
    copies, zeros = (int(flags.sum(-1).max(initial=0)) for flags in (copied, zeroed))
    if copies / bands > _WARN_ABOVE:
        warnings.warn(
            f"{name}: up to {copies} of {bands} bands are missing at a pixel and were copied from "
            "their neighbours in wavelength; expect weaker embeddings",
            stacklevel=3,
        )
    if zeros / bands > _WARN_ABOVE or (version.copies_bands and zeros):
        seen = "never saw in training" if version.copies_bands else "saw only for a few bands"
        warnings.warn(
            f"{name}: up to {zeros} of {bands} bands are missing at a pixel and were set to 0, "
            f"which this model {seen}",
            stacklevel=3,
        )


def fill(
    values: np.ndarray,
    name: str,
    version: str,
    ends: tuple[np.ndarray, np.ndarray],
    unseen: np.ndarray | bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Normalises raw values and fills what is missing; warns if that is much.

    Args:
      values: raw [..., bands]; NaN or MISSING where there is no value.
      name: modality.
      version: 'v1' copies from neighbouring bands, then sets to 0; later versions set to 0 (what
        band dropout showed them); 'none' fills nothing.
      ends: (lo, hi) per band, which become 0 and 1.
      unseen: bool of that shape, elements that are masked anyway and call for no warning.

    Returns:
      (float64 normalised values, bool [..., bands]: set to 0 for want of any value).

    Raises:
      ValueError: unknown version or wrong number of bands.
    """
    known("model version", version, ("none", *VERSIONS))
    bands = modalities.get(name).bands
    if values.shape[-1] != len(bands):
        raise ValueError(f"{name} has {len(bands)} bands, got {values.shape[-1]}")
    missing = np.isnan(values) | (values == MISSING)
    if version == "none":
        still = np.zeros_like(missing)
    elif VERSIONS[version].copies_bands:
        values, still = _copy_bands(values, missing, name)
    else:
        still = missing
    if version != "none":
        seen = np.logical_not(unseen)
        _warn(name, missing & ~still & seen, still & seen, VERSIONS[version])
    lo, hi = ends
    out = (values.astype(np.float64) - lo) / (hi - lo)
    out[still] = 0.0
    return out, still
