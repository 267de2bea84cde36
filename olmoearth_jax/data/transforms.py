"""Optional augmentations of a whole group, before masking (spec/data.md section 8.7)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.modalities import MISSING
from olmoearth_jax.registry import build as build_named

FLIPS = (
    "no_transform",
    "rotate_90",
    "rotate_180",
    "rotate_270",
    "hflip",
    "vflip",
    "hflip_rotate_90",
    "vflip_rotate_90",
)
"""The eight symmetries of a square; the last two rotate first, then flip."""


def flip(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Applies one of FLIPS to the (H, W) axes 1 and 2 of every spatial array [B, H, W, T, C].

    Raises:
      ValueError: unknown name.
    """
    if name not in FLIPS:
        raise ValueError(f"unknown transform {name!r}; {registry.closest(name, FLIPS)}")
    turns = {"rotate_90": 1, "rotate_180": 2, "rotate_270": 3}.get(name, 0)
    turns = 1 if name.endswith("flip_rotate_90") else turns
    axis = {"h": 2, "v": 1}.get(name[0]) if "flip" in name else None

    def apply(x: np.ndarray) -> np.ndarray:
        x = np.rot90(x, turns, axes=(1, 2))
        return np.ascontiguousarray(x if axis is None else np.flip(x, axis))

    return {n: apply(x) if registry.get(n).spatial else x for n, x in arrays.items()}


def mixup(
    arrays: Mapping[str, np.ndarray], timestamps: np.ndarray, lam: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Blends each sample with the next of its group: (1 - lam) x + lam partner.

    Timestamps are the partner's if lam >= 0.5. An element is MISSING if it is in either sample
    (the reference blends the fill value into the data).

    Arrays are [B, ...] per modality, timestamps [B, T, 3].
    """

    def blend(x: np.ndarray) -> np.ndarray:
        partner = np.roll(x, -1, axis=0)
        mixed = (np.float32(1 - lam) * x + np.float32(lam) * partner).astype(np.float32)
        mixed[(x == MISSING) | (partner == MISSING)] = MISSING
        return mixed

    stamps = np.roll(timestamps, -1, axis=0) if lam >= 0.5 else timestamps
    return {n: blend(x) for n, x in arrays.items()}, stamps


@dataclasses.dataclass(frozen=True)
class FlipAndRotate:
    """One of the eight symmetries per group, uniformly. A group may be split over hosts."""

    needs_whole_group: bool = dataclasses.field(default=False, init=False)

    def __call__(self, arrays, timestamps, rng: np.random.Generator):
        return flip(arrays, FLIPS[rng.integers(len(FLIPS))]), timestamps


@dataclasses.dataclass(frozen=True)
class Mixup:
    """One blend weight per group from Beta(alpha, alpha). Needs the whole group on one host."""

    alpha: float
    needs_whole_group: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self):
        if self.alpha <= 0:
            raise ValueError(f"mixup alpha must be positive, got {self.alpha}")

    def __call__(self, arrays, timestamps, rng: np.random.Generator):
        return mixup(arrays, timestamps, float(rng.beta(self.alpha, self.alpha)))


TRANSFORMS: dict[str, type] = {"flip_and_rotate": FlipAndRotate, "mixup": Mixup}


def build(options: Mapping[str, Any] | None) -> Any:
    """Augmentation of {'type': 'flip_and_rotate'} or {'type': 'mixup', 'alpha': ...}; or None.

    Raises:
      ValueError: unknown type or argument, or a value that does not fit.
    """
    return None if options is None else build_named(TRANSFORMS, options, "augmentation")
