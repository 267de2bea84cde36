"""Windows of images through an encoder: embeddings of tokens, whatever else is in the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.inference.model import PretrainedModel
from olmoearth_jax.inference.prepare import ModelInput
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.masks import MISSING_TOKEN, VISIBLE
from olmoearth_jax.model import pooling
from olmoearth_jax.model.pooling import PoolingType

POOLINGS = ("spatial", "location", "student")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How windows become tokens.

    Attributes:
      patch_size: pixels per side of a patch.
      pooling: one of POOLINGS.
      pooling_type: 'mean' or 'max' ('spatial').
      location_size: pixels per token of 'location' and 'student'; the patch by default.
    """

    patch_size: int
    pooling: str = "spatial"
    pooling_type: PoolingType = "mean"
    location_size: int | None = None

    @property
    def step(self) -> int:
        """Pixels per side of a token."""
        return self.location_size or self.patch_size


def drop_unknown(model: PretrainedModel, sample: Sample) -> Sample:
    """The sample without modalities that the encoder was not trained to see.

    Raises:
      ValueError: nothing is left.
    """
    data = {n: x for n, x in sample.data.items() if n in model.modalities}
    if not data:
        raise ValueError(
            f"the images show {', '.join(sample.data)}, but the model takes "
            f"{', '.join(model.modalities)}"
        )
    return dataclasses.replace(sample, data=data)


def groups_of(ready: ModelInput) -> Iterator[np.ndarray]:
    """Numbers of the samples that one program may take together without seeing each other.

    Pooling and the fast pass are chosen for a whole batch; samples for which they would be chosen
    differently are kept apart, so that a sample's values do not depend on its neighbours.
    """
    keys: dict[Any, list[int]] = {}
    for i in np.flatnonzero(ready.visible.any((1, 2))):
        masks = {n: m[i : i + 1] for n, m in ready.masks.items()}
        fast = not any((m == MISSING_TOKEN).any() for m in masks.values())
        keys.setdefault((pooling.spatial_names(masks), fast), []).append(int(i))
    for rows in keys.values():
        yield np.array(rows)


class TokenEncoder:
    """Embeds windows of equal size with a frozen encoder."""

    def __init__(self, model: PretrainedModel, settings: Settings, batch: int = 16):
        """Checks that the model has what the settings ask for.

        Args:
          batch: windows per call; every call has as many.

        Raises:
          ValueError: it has not.
        """
        model.check_locations(settings.pooling, settings.patch_size, settings.location_size)
        self.model, self.settings, self.batch = model, settings, batch

    def prepare(self, samples: Sequence[Sample]) -> ModelInput:
        """See `PretrainedModel.prepare`."""
        known = [drop_unknown(self.model, s) for s in samples]
        return self.model.prepare(known, self.settings.patch_size)

    def __call__(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of windows.

        Returns:
          float32 [B, h, w, D], 0 where nothing is seen, and bool [B, h, w] where something is.
        """
        return self.embed(self.prepare(samples))

    def seen(self, ready: ModelInput) -> np.ndarray:
        """bool [B, h, w]: the tokens with data."""
        factor = self.settings.patch_size // self.settings.step
        return ready.visible.repeat(factor, 1).repeat(factor, 2)

    def embed(self, ready: ModelInput) -> tuple[np.ndarray, np.ndarray]:
        """As a call, of what `prepare` gave."""
        s = self.settings
        seen, out = self.seen(ready), None
        for rows in groups_of(ready):
            for start in range(0, len(rows), self.batch):
                mine = rows[start : start + self.batch]
                # Always as many rows: one program, and sums in one order.
                padded = np.concatenate([mine, np.repeat(mine[-1:], self.batch - len(mine))])
                got = self.model.embed(
                    ready.rows(padded), s.patch_size, s.pooling, s.pooling_type,
                    location_size=s.location_size,
                )[: len(mine)]  # fmt: skip
                if out is None:
                    out = np.zeros((*seen.shape, got.shape[-1]), np.float32)
                out[mine] = got
        if out is None:
            out = np.zeros((*seen.shape, 0), np.float32)
        if not np.isfinite(out).all():
            raise ValueError("the model gives NaN or infinite embeddings; are its weights whole?")
        return out, seen


def raw_tokens(ready: ModelInput, settings: Settings, names: Sequence[str]) -> np.ndarray:
    """Normalised pixels of each token side by side, averaged over the timesteps with data.

    Args:
      names: modalities, in this order; 0 for those that the batch has not.

    Returns:
      float32 [B, h, w, D].
    """
    p, step = settings.patch_size, settings.step
    batch, rows, cols = ready.visible.shape
    factor, parts = p // step, []
    for name in names:
        own = modalities.get(name).image_factor * step  # pixels of the modality's size per token
        if name not in ready.data:
            width = own * own * len(modalities.get(name).bands)
            parts.append(np.zeros((batch, rows * factor, cols * factor, width), np.float32))
            continue
        x, there = ready.data[name], (ready.masks[name] == VISIBLE).any(-1)
        side = x.shape[1] // there.shape[1]  # and per patch
        weight = there.repeat(side, 1).repeat(side, 2).astype(np.float32)[..., None]
        mean = (x * weight).sum(3) / np.maximum(weight.sum(3), 1)
        b, height, width, c = mean.shape
        cut = mean.reshape(b, height // own, own, width // own, own, c)
        parts.append(cut.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // own, width // own, -1))
    return np.concatenate(parts, -1)
