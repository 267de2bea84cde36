"""Command-line overrides: `--config.<path>=<value>` onto a typed config (spec/train.md 7.1).

Three kinds, applied in this order, so that a later kind wins: aliases (another name of a setting),
`common.*` (spread to every part that shares it), explicit paths. Within a kind the last one wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from olmoearth_jax.configlib import objectives, propagate, schema, values
from olmoearth_jax.configlib.errors import ConfigError
from olmoearth_jax.configlib.paths import canonical, set_path
from olmoearth_jax.configlib.tree import ExperimentConfig
from olmoearth_jax.configlib.values import format_value, parse_value

__all__ = ["apply", "apply_values", "format_value", "parse_value", "take", "ALIASES"]

ALIASES: dict[str, str] = {
    "trainer.save_interval": "trainer.callbacks.checkpointer.save_interval",
    "trainer.max_duration.epochs": "trainer.max_duration.value",
    "trainer.max_duration.steps": "trainer.max_duration.value",
    "trainer.hard_stop.epochs": "trainer.hard_stop.value",
    "trainer.hard_stop.steps": "trainer.hard_stop.value",
    "train_module.scheduler.warmup_steps": "train_module.scheduler.warmup",
    "train_module.masking_config": "data_loader.masking_config",
    "train_module.masking_config_a": "data_loader.masking_config",
    "train_module.masking_config_b": "data_loader.masking_config_b",
    "train_module.loss_config_a": "train_module.loss_config",
    "train_module.token_exit_cfg_a": "train_module.token_exit_cfg",
}
"""Other names of settings; each also stands for the paths below it."""


@dataclasses.dataclass(frozen=True)
class _Override:
    path: str  # canonical, aliases resolved
    written: str
    value: Any
    unit: str | None = None  # of a duration given as .epochs or .steps


def take(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into (the other arguments, the `--config.` overrides)."""
    ours = [a for a in argv if a.lstrip("-").startswith("config.") and a.startswith("-")]
    return [a for a in argv if a not in ours], ours


def apply(cfg: ExperimentConfig, overrides: Sequence[str]) -> ExperimentConfig:
    """A copy of `cfg` with overrides written as `[--config.]path=value` or `path` (true).

    Raises:
      ConfigError: unknown paths or values of the wrong type; all are listed, together with what
        else is wrong with the config.
    """
    parsed, problems = [], []
    for text in overrides:
        written, equals, raw = text.partition("=")
        try:
            parsed.append((written, values.parse(raw) if equals else schema.Text("true", True)))
        except ValueError as e:
            problems.append(f"config path {canonical(written)!r}: {e}")
    return _apply(cfg, parsed, problems)


def apply_values(cfg: ExperimentConfig, changes: Mapping[str, Any]) -> ExperimentConfig:
    """A copy of `cfg` with plain Python values set at paths, by the rules of `apply`.

    Raises:
      ConfigError: unknown paths or values of the wrong type, all listed.
    """
    return _apply(cfg, list(changes.items()), [])


def _apply(
    cfg: ExperimentConfig, parsed: list[tuple[str, Any]], problems: list[str]
) -> ExperimentConfig:
    cfg = cfg.copy()
    before = objectives.types(cfg)
    stages: tuple[list[_Override], ...] = ([], [], [])  # aliases, common, explicit
    parsed = _with_modalities(parsed, problems)
    for written, value in parsed:
        override, stage = _classify(written, value)
        stages[stage].append(override)
    set_keys: set[str] = set()
    for stage, overrides in enumerate(stages):
        for override in overrides:
            try:
                _set_one(cfg, override, set_keys)
            except ConfigError as e:
                problems += e.problems
        if stage == 1 and overrides:
            propagate.spread_common(cfg)
    objectives.drop_stale(cfg, before, set_keys)
    _settle(cfg, set_keys)
    if problems:
        raise ConfigError([*problems, *cfg.validate()])
    return cfg


def _with_modalities(parsed: list[tuple[str, Any]], problems: list[str]) -> list[tuple[str, Any]]:
    """Registers the user's modalities first, since other overrides may name them."""
    out = []
    for written, value in parsed:
        if canonical(written) == "common.extra_modalities":
            try:
                value = schema.register_modalities(schema.plain(value))
            except ConfigError as e:
                problems += e.problems
                continue
        out.append((written, value))
    return out


def _classify(written: str, value: Any) -> tuple[_Override, int]:
    path = canonical(written)
    unit = path.rpartition(".")[2]
    for alias, target in ALIASES.items():
        if path == alias or path.startswith(alias + "."):
            unit = unit if unit in ("epochs", "steps") else None
            return _Override(target + path.removeprefix(alias), path, value, unit), 0
    stage = 1 if path.startswith("common.") else 2
    return _Override(path, path, value), stage


def _set_one(cfg: ExperimentConfig, override: _Override, set_keys: set[str]) -> None:
    try:
        set_path(cfg, override.path, override.value, tuple(ALIASES))
    except ConfigError as e:
        raise ConfigError([p.replace(override.path, override.written) for p in e.problems]) from e
    set_keys |= {override.path, override.written}
    if isinstance(override.value, Mapping):
        set_keys.update(f"{override.path}.{k}" for k in override.value)
    if override.unit:
        set_path(cfg, override.path.rpartition(".")[0] + ".unit", override.unit)


def _settle(cfg: ExperimentConfig, set_keys: set[str]) -> None:
    """Settings that give way to the ones that were overridden."""
    scheduler, prefix = cfg.train_module.scheduler, "train_module.scheduler."
    steps, share = prefix + "warmup" in set_keys, prefix + "warmup_fraction" in set_keys
    if share and not steps and scheduler.warmup_fraction is not None:
        scheduler.warmup = None
    if steps and not share and scheduler.warmup is not None:
        scheduler.warmup_fraction = None
    saves = cfg.trainer.callbacks.checkpointer
    if "trainer.save_interval" in set_keys and saves.ephemeral_save_interval is not None:
        fixed = "trainer.callbacks.checkpointer.ephemeral_save_interval"
        if fixed not in set_keys and saves.ephemeral_save_interval >= saves.save_interval:
            saves.ephemeral_save_interval = None  # kept checkpoints come at least as often
    decoder = cfg.model.decoder_config
    if decoder is not None and "model.encoder_config.embedding_size" in set_keys:
        fixed = "model.decoder_config.encoder_embedding_size"
        if fixed not in set_keys and cfg.model.encoder_config.output_embedding_size is None:
            decoder.encoder_embedding_size = cfg.model.encoder_config.embedding_size
    propagate.add_catalogue_tasks(cfg)
