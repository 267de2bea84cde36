"""Masked-autoencoder loss on pixels (spec/train.md section 3.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.losses.rows import Groups, safe_divide
from olmoearth_jax.masks import DECODE, MISSING_TOKEN
from olmoearth_jax.modalities import MISSING, Tokenization, closest


def _smooth_l1(error: jax.Array, beta: float) -> jax.Array:
    size = jnp.abs(error)
    if beta == 0:
        return size
    return jnp.where(size < beta, 0.5 * error * error / beta, size - 0.5 * beta)


def _huber(error: jax.Array, delta: float) -> jax.Array:
    size = jnp.abs(error)
    return jnp.where(size < delta, 0.5 * error * error, delta * (size - 0.5 * delta))


_ELEMENTWISE: dict[str, tuple[Callable[..., jax.Array], str | None]] = {
    "MSELoss": (jnp.square, None),
    "L1Loss": (jnp.abs, None),
    "SmoothL1Loss": (_smooth_l1, "beta"),
    "HuberLoss": (_huber, "delta"),
}
"""Elementwise losses by name, and the parameter each takes."""


@dataclasses.dataclass(frozen=True)
class MAE:
    """Mean elementwise error over the pixel-band values of all modalities together."""

    loss_function: str = "MSELoss"
    """A key of `_ELEMENTWISE`."""
    only_decode: bool = True
    """Only decoder tokens count, else all that aren't missing."""
    weight: float = 1.0
    beta: float | None = None
    """Parameter of SmoothL1Loss."""
    delta: float | None = None
    """Parameter of HuberLoss."""
    tokenization_config: Any = None
    """{modality: [[band, ...], ...]} or a `Tokenization`; None: default."""

    name: ClassVar[str] = "MAE"

    def __post_init__(self) -> None:
        if self.loss_function not in _ELEMENTWISE:
            raise ValueError(
                f"unknown loss_function {self.loss_function!r}; "
                f"{closest(self.loss_function, _ELEMENTWISE)}"
            )
        takes = _ELEMENTWISE[self.loss_function][1]
        for parameter in ("beta", "delta"):
            value = getattr(self, parameter)
            if value is not None and parameter != takes:
                raise ValueError(f"{self.loss_function} has no parameter {parameter!r}")
            if value is not None and (isinstance(value, bool | str) or not value > 0):
                raise ValueError(f"{parameter} must be a number above 0, got {value!r}")
        if not isinstance(self.tokenization_config, Tokenization):
            overrides = self.tokenization_config or {}
            overrides = overrides.get("overrides", overrides) or {}
            object.__setattr__(self, "tokenization_config", Tokenization.from_mapping(overrides))

    def element(self, error: jax.Array) -> jax.Array:
        """Loss of each element's error."""
        function, parameter = _ELEMENTWISE[self.loss_function]
        if parameter is None:
            return function(error)
        value = getattr(self, parameter)
        return function(error, 1.0 if value is None else value)

    def __call__(
        self,
        preds: Mapping[str, jax.Array],
        targets: Mapping[str, jax.Array],
        masks: Mapping[str, jax.Array],
        groups: Groups | None = None,
    ) -> jax.Array:
        """Loss per group.

        Args:
          preds: per modality float [B, H, W, T, C], pixel predictions.
          targets: the same shapes, -99999 where missing; more modalities are ignored.
          masks: int [B, h, w, T, S] per token, or per pixel (h = H).
          groups: of the samples; None: all in one, without holes.

        Returns:
          float32 [groups]; 0 where nothing counts. Pixels of a band set in which any band
          is missing never count.
        """
        groups = Groups.given(groups, len(next(iter(preds.values()))))
        total = count = jnp.zeros(groups.count, jnp.float32)
        for name in modalities.in_sample_order(preds):
            if preds[name].ndim != 5:
                raise ValueError(
                    f"the MAE loss needs images [B, H, W, T, C], but {name!r} has the shape "
                    f"{preds[name].shape}"
                )
            errors, used = self._per_sample(name, preds[name], targets[name], masks[name])
            real = groups.weight > 0
            total = total + groups.sum(jnp.where(real, errors, 0.0))
            count = count + groups.sum(jnp.where(real, used, 0.0))
        return self.weight * safe_divide(total, count)

    def _per_sample(
        self, name: str, pred: jax.Array, target: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(summed loss [B], number of elements [B])."""
        sets = self.tokenization_config.band_sets(name)
        bands = np.concatenate([np.asarray(s) for s in sets])
        set_of_band = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
        for axis in (1, 2):
            mask = jnp.repeat(mask, pred.shape[axis] // mask.shape[axis], axis=axis)
        counts = mask == DECODE if self.only_decode else mask != MISSING_TOKEN
        gaps = jnp.stack(
            [jnp.any(target[..., np.asarray(s)] == MISSING, axis=-1) for s in sets], axis=-1
        )
        z = (counts & ~gaps)[..., set_of_band]
        error = pred[..., bands].astype(jnp.float32) - target[..., bands].astype(jnp.float32)
        loss = jnp.where(z, self.element(jnp.where(z, error, 0.0)), 0.0)
        axes = (1, 2, 3, 4)
        return jnp.sum(loss, axis=axes), jnp.sum(z, axis=axes).astype(jnp.float32)
