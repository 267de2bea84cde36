"""Learning rate by 1-based step, in float64 on the host (spec/train.md section 5.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from olmoearth_jax import registry


@dataclasses.dataclass(frozen=True)
class ConstantWithWarmup:
    """Linear warm-up, then the peak rate.

    Attributes:
      warmup: steps of warm-up.
      warmup_fraction: the same as a share of the horizon; give exactly one of the two.
      warmup_min_lr: rate that warm-up starts from, at step 0 (which is never run).
      t_max: horizon in steps; None: the run's last step.
    """

    warmup: int | None = None
    warmup_fraction: float | None = None
    warmup_min_lr: float = 0.0
    t_max: int | None = None

    def __post_init__(self) -> None:
        if (self.warmup is None) == (self.warmup_fraction is None):
            raise ValueError("Either 'warmup_fraction' or 'warmup' must be specified.")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must lie in 0..1, got {self.warmup_fraction}")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")

    def warmup_steps(self, max_steps: int) -> int:
        """Steps of warm-up for a run of `max_steps`."""
        if self.warmup is not None:
            return self.warmup
        return round((self.t_max or max_steps) * (self.warmup_fraction or 0.0))

    def lr(self, peak: float, step: int, max_steps: int) -> float:
        """Rate of the update at `step` (the first one is 1), for a peak rate `peak`."""
        warmup, horizon = self.warmup_steps(max_steps), self.t_max or max_steps
        if step < warmup:
            low = min(self.warmup_min_lr, peak)
            return low + (peak - low) * step / warmup
        return peak * self.after_warmup(
            1.0 if step >= horizon else (step - warmup) / (horizon - warmup)
        )

    def after_warmup(self, progress: float) -> float:
        """Share of the peak at `progress` 0..1 between the end of warm-up and the horizon."""
        del progress
        return 1.0


@dataclasses.dataclass(frozen=True)
class CosWithWarmup(ConstantWithWarmup):
    """Half a cosine from the peak down to `alpha_f` times it, and constant afterwards."""

    alpha_f: float = 0.1

    def after_warmup(self, progress: float) -> float:
        return self.alpha_f + (1 - self.alpha_f) * (1 + math.cos(math.pi * progress)) / 2


@dataclasses.dataclass(frozen=True)
class LinearWithWarmup(ConstantWithWarmup):
    """A straight line from the peak down to `alpha_f` times it, and constant afterwards."""

    alpha_f: float = 0.1

    def after_warmup(self, progress: float) -> float:
        return 1 - (1 - self.alpha_f) * progress


SCHEDULES: dict[str, type] = {
    cls.__name__: cls for cls in (CosWithWarmup, LinearWithWarmup, ConstantWithWarmup)
}


def build(config: Mapping[str, Any] | None) -> ConstantWithWarmup:
    """The schedule of {'type': 'CosWithWarmup', ...}; no config is a constant rate.

    `warmup_steps` is an alias that wins over `warmup` (quirk Q13); the type defaults to
    'CosWithWarmup'. The config is not changed.

    Raises:
      ValueError: unknown type or argument, or not exactly one of warmup and warmup_fraction.
    """
    if config is None:
        return ConstantWithWarmup(warmup=0)
    arguments = dict(config)
    alias = arguments.pop("warmup_steps", None)
    if alias is not None:
        arguments["warmup"] = alias
    return registry.build(SCHEDULES, arguments, "schedule", default="CosWithWarmup")
