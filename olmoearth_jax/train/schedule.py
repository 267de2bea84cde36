"""Learning-rate schedules: float64 functions of the 1-based step, evaluated on the host.

spec/train.md section 5.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from olmoearth_jax import registry


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up from `warmup_min_lr`, then the subclass's shape.

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

    key: ClassVar[str] = ""

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
        assert self.warmup_fraction is not None
        return round((self.t_max or max_steps) * self.warmup_fraction)

    def lr(self, peak: float, step: int, max_steps: int) -> float:
        """Rate of the update at `step` (the first one is 1), for a peak rate `peak`."""
        warmup, horizon = self.warmup_steps(max_steps), self.t_max or max_steps
        if step < warmup:
            low = min(self.warmup_min_lr, peak)
            return low + (peak - low) * step / warmup
        return self.after_warmup(peak, step, warmup, horizon)

    def after_warmup(self, peak: float, step: int, warmup: int, horizon: int) -> float:
        """Rate once warm-up is over."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class CosWithWarmup(Schedule):
    """Half a cosine from the peak down to `alpha_f` times it, and constant afterwards."""

    alpha_f: float = 0.1
    key: ClassVar[str] = "CosWithWarmup"

    def after_warmup(self, peak: float, step: int, warmup: int, horizon: int) -> float:
        low = self.alpha_f * peak
        if step >= horizon:
            return low
        return (
            low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / (horizon - warmup))) / 2
        )


@dataclasses.dataclass(frozen=True)
class LinearWithWarmup(Schedule):
    """A straight line from the peak down to `alpha_f` times it, and constant afterwards."""

    alpha_f: float = 0.1
    key: ClassVar[str] = "LinearWithWarmup"

    def after_warmup(self, peak: float, step: int, warmup: int, horizon: int) -> float:
        low = self.alpha_f * peak
        if step >= horizon:
            return low
        return peak - (peak - low) * (step - warmup) / (horizon - warmup)


@dataclasses.dataclass(frozen=True)
class ConstantWithWarmup(Schedule):
    """The peak rate after warm-up."""

    key: ClassVar[str] = "ConstantWithWarmup"

    def after_warmup(self, peak: float, step: int, warmup: int, horizon: int) -> float:
        return peak


SCHEDULES: dict[str, type[Schedule]] = {
    cls.key: cls for cls in (CosWithWarmup, LinearWithWarmup, ConstantWithWarmup)
}


def build(config: Mapping[str, Any] | None) -> Schedule:
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
    return registry.build(SCHEDULES, arguments, "schedule", default=CosWithWarmup.key)
