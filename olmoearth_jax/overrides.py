"""Command-line overrides: `--config.<path>=<value>` onto a typed config (spec/train.md 7.1).

Three kinds, applied in this order, so that a later kind wins: aliases (another name of a setting),
`common.*` (spread to every part that shares it), explicit paths. Within a kind the last one wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from olmoearth_jax import check
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib import gone, objectives, schema
from olmoearth_jax.configlib.schema import ConfigError, set_path
from olmoearth_jax.configlib.values import format_value, parse, parse_value, plain
from olmoearth_jax.model.config import exit_depths

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

_TASKS_TO_RUN = "trainer.callbacks.downstream_evaluator.tasks_to_run"
_OWN_MODALITIES = "common.extra_modalities"
_EXITS = ("token_exit_cfg", "token_exit_cfg_b")


@dataclasses.dataclass(frozen=True)
class _Override:
    path: str  # canonical, aliases resolved
    written: str
    value: Any  # texts for what the annotation makes of them, or plain values
    stage: int  # 0 alias, 1 common, 2 explicit


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
            parsed.append((written, parse(raw) if equals else True))
        except ValueError as e:
            problems.append(f"config path {schema.canonical(written, type(cfg))!r}: {e}")
    return _apply(cfg, parsed, problems, written=True)


def apply_values(cfg: ExperimentConfig, changes: Mapping[str, Any]) -> ExperimentConfig:
    """A copy of `cfg` with plain Python values set at paths, by the rules of `apply`.

    Raises:
      ConfigError: unknown paths or values of the wrong type, all listed.
    """
    return _apply(cfg, list(changes.items()), [], written=False)


def _apply(
    cfg: ExperimentConfig, parsed: list[tuple[str, Any]], problems: list[str], written: bool
) -> ExperimentConfig:
    cfg = cfg.copy()
    before = {path: values.get("type") for path, values in objectives.options(cfg).items()}
    parsed = _without_gone(parsed, problems, written)
    overrides = [o for name, value in parsed for o in _classify(name, value)]
    # Others may name these modalities and tasks; exits by name depend on the encoder's depth.
    first = (_OWN_MODALITIES, _TASKS_TO_RUN)
    overrides.sort(key=lambda o: (o.path not in first, "token_exit_cfg" in o.path))
    set_keys: set[str] = set()
    for stage in range(3):
        for override in (o for o in overrides if o.stage == stage):
            try:
                _set_one(cfg, override, written)
            except ConfigError as e:
                problems += [p.replace(override.path, override.written) for p in e.problems]
            if override.path == _TASKS_TO_RUN:
                _add_catalogue_tasks(cfg)
            set_keys |= {override.path, override.written}
            if isinstance(override.value, Mapping):
                set_keys.update(f"{override.path}.{k}" for k in override.value)
        if any(k.startswith("common.") for k in set_keys) and stage == 1:
            _spread_common(cfg)
    objectives.drop_stale(cfg, before, set_keys)
    problems += objectives.resolve_names(cfg)
    _settle(cfg, set_keys)
    if problems:
        raise ConfigError([*problems, *check.problems(cfg)])
    return cfg


def _without_gone(
    parsed: list[tuple[str, Any]], problems: list[str], written: bool
) -> list[tuple[str, Any]]:
    """The overrides without settings that are gone, of which wrong values become problems."""
    out = []
    for name, value in parsed:
        if schema.canonical(name, ExperimentConfig) != gone.ENGINE:
            out.append((name, value))
            continue
        try:
            gone.refuse(plain(value) if written else value)
        except ConfigError as e:
            problems += e.problems
    return out


def _classify(written: str, value: Any) -> list[_Override]:
    """The override, and what it means besides."""
    path = schema.canonical(written, ExperimentConfig)
    if path == "common" and isinstance(value, Mapping):
        return [o for name, part in value.items() for o in _classify(f"common.{name}", part)]
    for alias, target in ALIASES.items():
        if path == alias or path.startswith(alias + "."):
            out = [_Override(target + path.removeprefix(alias), path, value, 0)]
            owner, _, unit = alias.rpartition(".")
            if unit in ("epochs", "steps"):
                out.append(_Override(f"{owner}.unit", path, unit, 0))
            return out
    if path == "trainer.profile" and isinstance(value, list) and len(value) == 2:
        value = {"enabled": True, "start_step": value[0], "num_steps": value[1]}
    stage = 0 if path == _OWN_MODALITIES else 1 if path.startswith("common.") else 2
    return [_Override(path, path, value, stage)]


def _set_one(cfg: ExperimentConfig, override: _Override, written: bool) -> None:
    value = override.value
    if override.path == _OWN_MODALITIES:
        value, written = schema.register_modalities(plain(value) if written else value), False
    elif override.path.endswith(_EXITS) and isinstance(plain(value) if written else value, str):
        names, depth = cfg.common.training_modalities, cfg.model.encoder_config.depth
        try:
            value = exit_depths(str(value), names, depth)
        except ValueError as e:
            raise ConfigError(f"config path {override.path!r}: {e}") from e
    set_path(cfg, override.path, value, ALIASES, written=written)


def _spread_common(cfg: ExperimentConfig) -> None:
    """Brings model, dataset, masking, losses and exits in line with `common` (in place).

    Lists of modalities lose the ones that are no longer trained; tokenisations are taken from
    `common.tokenization`; a newly trained modality gets exit depth 0.
    """
    names = list(cfg.common.training_modalities)
    model, module, pixels = cfg.model, cfg.train_module, cfg.model.reconstructor_config
    parts: list[Any] = [model.encoder_config, model.decoder_config, pixels]
    parts.append(None if pixels is None else pixels.decoder_config)
    for part in filter(None, parts):
        part.supported_modality_names = list(names)
        part.tokenization_overrides = {
            k: [list(g) for g in v] for k, v in cfg.common.tokenization.items() if k in names
        }
    cfg.dataset.training_modalities = list(names)
    if (heads := model.supervision_head_config) is not None:
        heads.modality_configs = {m: v for m, v in heads.modality_configs.items() if m in names}
        model.supervision_head_config = heads if heads.modality_configs else None
    dropped = model.encoder_config.band_dropout_modalities
    if dropped is not None:
        model.encoder_config.band_dropout_modalities = [m for m in dropped if m in names]
    objectives.resolve_names(cfg)  # what is wrong with them is told later
    for path, values in objectives.options(cfg).items():
        for key in objectives.naming(path, values):
            value = values[key]
            if isinstance(value, Mapping):
                values[key] = {m: v for m, v in value.items() if m in names}
            elif value is not None:
                values[key] = [m for m in value if m in names]
    module.token_exit_cfg = {m: module.token_exit_cfg.get(m, 0) for m in names}
    if module.token_exit_cfg_b is not None:
        module.token_exit_cfg_b = {m: module.token_exit_cfg_b.get(m, 0) for m in names}


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
    encoder, decoder = cfg.model.encoder_config, cfg.model.decoder_config
    if decoder is not None and "model.encoder_config.embedding_size" in set_keys:
        fixed = "model.decoder_config.encoder_embedding_size"
        if fixed not in set_keys and encoder.output_embedding_size is None:
            decoder.encoder_embedding_size = encoder.embedding_size
    _add_catalogue_tasks(cfg)


def _add_catalogue_tasks(cfg: ExperimentConfig) -> None:
    """Adds tasks that `tasks_to_run` takes from the catalogue to the configured ones."""
    evaluator = cfg.trainer.callbacks.downstream_evaluator
    missing = [t for t in evaluator.tasks_to_run or () if t not in evaluator.tasks]
    if missing:
        from olmoearth_jax.configlib.tasks import catalogue

        known = catalogue()
        evaluator.tasks.update({t: known[t] for t in missing if t in known})
