"""Losses and masking strategies as the config sees them: a `type` and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from olmoearth_jax.configlib.tree import ExperimentConfig

LOSSES = (
    "loss_config",
    "loss_config_b",
    "contrastive_config",
    "mae_loss_config",
    "regularizer_config",
)
MASKINGS = ("masking_config", "masking_config_b")


def options(cfg: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Config path -> the mapping that holds a `type` and its parameters."""
    out = {}
    for name in MASKINGS:
        masking = getattr(cfg.data_loader, name)
        if masking is not None:
            out[f"data_loader.{name}.strategy_config"] = masking.strategy_config
    for name in LOSSES:
        loss = getattr(cfg.train_module, name)
        if loss is not None:
            out[f"train_module.{name}.loss_config"] = loss.loss_config
    return out


def types(cfg: ExperimentConfig) -> dict[str, Any]:
    """Config path -> the chosen type."""
    return {path: values.get("type") for path, values in options(cfg).items()}


def drop_stale(cfg: ExperimentConfig, before: dict[str, Any], set_keys: set[str]) -> None:
    """Drops parameters that belonged to a type that was replaced (in place).

    A parameter that was itself overridden stays, so that a wrong one is reported.

    Args:
      cfg: after the overrides.
      before: `types` before the overrides.
      set_keys: paths that were overridden.
    """
    for path, values in options(cfg).items():
        kind = values.get("type")
        if kind == before.get(path) or kind is None:
            continue
        for key in [k for k in values if k != "type" and f"{path}.{k}" not in set_keys]:
            if problem(path, {"type": kind, key: values[key]}, only_names=True):
                del values[key]


def builder(path: str) -> Callable[[dict[str, Any]], Any]:
    """The function that builds the object of an options mapping, or raises ValueError."""
    if path.startswith("data_loader."):
        from olmoearth_jax import masking

        return masking.build
    from olmoearth_jax import losses

    return losses.build


def problem(path: str, values: dict[str, Any], only_names: bool = False) -> str | None:
    """What is wrong with an options mapping, or None.

    Args:
      path: where it stands.
      values: `type` and parameters.
      only_names: report only a parameter that the type does not have.
    """
    try:
        builder(path)(values)
    except ValueError as e:
        text = str(e)
        if only_names and "has no argument" not in text:
            return None
        return f"{path}: {text}"
    return None
