"""From a sample in raw units to the arrays a model takes: normalised, filled, masked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.inference import missing_bands
from olmoearth_jax.inference.sample import Sample, missing_tokens
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.tokens import SlotTable

VISIBLE, MISSING_TOKEN = 0, 3

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


def version_of(config: ModelConfig) -> str:
    """The family a model belongs to, which decides how missing bands are filled."""
    encoder = config.encoder_config
    if getattr(encoder, "attention_pooler_config", None) is not None:
        return "v1_3"
    if encoder.position_encoding != "absolute":
        return "v1_2"
    later = encoder.band_dropout_rate or encoder.use_linear_patch_embed
    return "v1_1" if later else "v1"


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
        raw = sample.data[name]
        modality = modalities.get(name)
        lo, hi = ranges[name]
        if sample.normalized:
            lo, hi = np.zeros_like(lo), np.ones_like(hi)
        pixels = patch_size * modality.image_factor if modality.spatial else 0
        shape = raw.shape[:-1]
        if pixels:
            shape = (shape[0], shape[1] // pixels, shape[2] // pixels, shape[3])
        gone = np.isnan(raw)
        if gone.any():
            # A batch or timestep without any data is masked: nothing is made up for it.
            axes = tuple(range(1, 3)) if modality.spatial else ()
            absent = gone.all((*axes, -1), keepdims=True)
            rule = "v1_1" if sample.normalized else version
            source = np.where(absent, np.float32(0), raw)
            values, still = missing_bands.fill(source, name, rule, lo, hi)
            still |= absent
            sets = [slots.slots[i].channels for i in slots.of(name)]
            lost = missing_tokens(still, gone & ~absent, pixels, sets, sample.nan_pixels)
            data[name] = np.where(absent, np.float32(0), values.astype(np.float32))
            masks[name] = np.where(lost, MISSING_TOKEN, VISIBLE).astype(np.int8)
        else:
            scale = (1.0 / (hi - lo)).astype(np.float32)
            data[name] = raw * scale
            data[name] += (-lo / (hi - lo)).astype(np.float32)
            masks[name] = np.zeros((*shape, len(slots.of(name))), np.int8)
    return Prepared(data, masks, sample.timestamps)
