"""Filling of missing bands, by the rule of a model's version (spec/model_v1_3.md section 8)."""

from __future__ import annotations

import functools
import warnings

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.modalities import MISSING, closest
from olmoearth_jax.model.versions import VERSIONS, Version

WARN_ABOVE = 0.2  # share of a pixel's bands that may be made up without a word

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


def copy_bands(values: np.ndarray, missing: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
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
    if copies / bands > WARN_ABOVE:
        warnings.warn(
            f"{name}: up to {copies} of {bands} bands are missing at a pixel and were copied from "
            "their neighbours in wavelength; expect weaker embeddings",
            stacklevel=3,
        )
    if zeros / bands > WARN_ABOVE or (version.copies_bands and zeros):
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
    lo: np.ndarray,
    hi: np.ndarray,
    unseen: np.ndarray | bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Normalises raw values and fills what is missing; warns if that is much.

    Args:
      values: raw [..., bands]; NaN or MISSING where there is no value.
      name: modality.
      version: 'v1' copies from neighbouring bands, then sets to 0; later versions set to 0 (what
        band dropout showed them); 'none' fills nothing.
      lo, hi: range per band that becomes 0..1.
      unseen: bool of that shape, elements that are masked anyway and call for no warning.

    Returns:
      (float64 normalised values, bool [..., bands]: set to 0 for want of any value).

    Raises:
      ValueError: unknown version or wrong number of bands.
    """
    if version not in ("none", *VERSIONS):
        known = ("none", *VERSIONS)
        raise ValueError(f"unknown model version {version!r}; {closest(version, known)}")
    bands = modalities.get(name).bands
    if values.shape[-1] != len(bands):
        raise ValueError(f"{name} has {len(bands)} bands, got {values.shape[-1]}")
    missing = np.isnan(values) | (values == MISSING)
    if version == "none":
        still = np.zeros_like(missing)
    elif VERSIONS[version].copies_bands:
        values, still = copy_bands(values, missing, name)
    else:
        still = missing
    if version != "none":
        _warn(name, missing & ~still & ~unseen, still & ~unseen, VERSIONS[version])
    out = (values.astype(np.float64) - lo) / (hi - lo)
    out[still] = 0.0
    return out, still
