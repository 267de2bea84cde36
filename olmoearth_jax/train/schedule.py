"""Learning rate by 1-based step, in float64 on the host (spec/train.md section 5.2).

The schedules of optax compute in float32, which is not what the reference logs and applies.
"""

from __future__ import annotations

import math

from olmoearth_jax.config import SchedulerConfig


def warmup_steps(plan: SchedulerConfig, max_steps: int) -> int:
    """Steps of warm-up for a run of `max_steps`."""
    if plan.warmup is not None:
        return plan.warmup
    return round((plan.t_max or max_steps) * (plan.warmup_fraction or 0.0))


def learning_rate(plan: SchedulerConfig, peak: float, step: int, max_steps: int) -> float:
    """Rate of the update at `step` (the first one is 1), for a peak rate `peak`.

    Linear from `warmup_min_lr` at step 0 (which is never run) to the peak; then half a cosine, a
    straight line, or none, down to `alpha_f` times the peak at the horizon; constant afterwards.
    """
    warmup, horizon = warmup_steps(plan, max_steps), plan.t_max or max_steps
    if step < warmup:
        low = min(plan.warmup_min_lr, peak)
        return low + (peak - low) * step / warmup
    progress = 1.0 if step >= horizon else (step - warmup) / (horizon - warmup)
    if plan.name == "CosWithWarmup":
        return peak * (plan.alpha_f + (1 - plan.alpha_f) * (1 + math.cos(math.pi * progress)) / 2)
    return peak * (1 - (1 - plan.alpha_f) * progress if plan.name == "LinearWithWarmup" else 1.0)
