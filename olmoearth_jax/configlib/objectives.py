"""Losses and masking strategies as the config sees them: a `type` and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from olmoearth_jax import losses, masking
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib import schema

LOSSES = (
    "loss_config", "loss_config_b", "contrastive_config", "mae_loss_config", "regularizer_config",
)  # fmt: skip
_MASKINGS = ("masking_config", "masking_config_b")


def options(cfg: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Config path -> the mapping that holds a `type` and its parameters."""
    out = {}
    for name in _MASKINGS:
        found = getattr(cfg.data_loader, name)
        if found is not None:
            out[f"data_loader.{name}.strategy_config"] = found.strategy_config
    for name in LOSSES:
        found = getattr(cfg.train_module, name)
        if found is not None:
            out[f"train_module.{name}.loss_config"] = found.loss_config
    return out


def _registered(path: str) -> Mapping[str, type]:
    """Class of every type that may stand at a path of `options`."""
    return masking.STRATEGIES if path.startswith("data_loader.") else losses.LOSSES


def build(path: str, values: Mapping[str, Any]) -> Any:
    """The strategy or loss of an options mapping. Raises ValueError where it has none."""
    return (masking if path.startswith("data_loader.") else losses).build(values)


def naming(path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that name modalities, of those that an options mapping has -> their type."""
    key = values.get("type")
    cls = _registered(path).get(key) if isinstance(key, str) else None
    known = {} if cls is None else schema.hints(cls)
    parts = {name: schema.naming_part(known[name]) for name in values if name in known}
    return {name: part for name, part in parts.items() if part is not None}


def resolve_names(cfg: ExperimentConfig) -> list[str]:
    """Writes modality names in options as the registry has them (in place).

    Returns:
      One sentence per parameter whose value cannot be read.
    """
    problems = []
    for path, values in options(cfg).items():
        for name, hint in naming(path, values).items():
            if values[name] is None:
                continue
            try:
                values[name] = schema.convert(hint, values[name], f"{path}.{name}")
            except schema.ConfigError as e:
                problems += e.problems
    return problems


def drop_stale(cfg: ExperimentConfig, before: Mapping[str, Any], set_keys: set[str]) -> None:
    """Drops parameters that belonged to a type that was replaced (in place).

    A parameter that was itself overridden stays, so that a wrong one is reported.

    Args:
      cfg: after the overrides.
      before: path -> type before the overrides.
      set_keys: paths that were overridden.
    """
    for path, values in options(cfg).items():
        key = values.get("type")
        new = _registered(path).get(key) if isinstance(key, str) else None
        if new is None or values["type"] == before.get(path):
            continue
        known = {"type", *(f.name for f in dataclasses.fields(new) if f.init)}
        for key in [k for k in values if k not in known and f"{path}.{k}" not in set_keys]:
            del values[key]
