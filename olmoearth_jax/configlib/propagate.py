"""Settings that follow from others: shared modalities, band sets, evaluation tasks."""

from __future__ import annotations

from typing import Any

from olmoearth_jax.configlib import schema
from olmoearth_jax.configlib.tree import ExperimentConfig


def spread_common(cfg: ExperimentConfig) -> None:
    """Brings model, dataset, masking, losses and exits in line with `common` (in place).

    Lists of modalities lose the ones that are no longer trained; tokenisations are taken from
    `common.tokenization`; a newly trained modality gets exit depth 0.
    """
    names = list(cfg.common.training_modalities)
    tokenization = {k: v for k, v in cfg.common.tokenization.items() if k in names}
    model = cfg.model
    parts: list[Any] = [model.encoder_config, model.decoder_config]
    if model.reconstructor_config is not None:
        parts += [model.reconstructor_config, model.reconstructor_config.decoder_config]
    for part in parts:
        if part is not None:
            part.supported_modality_names = list(names)
            part.tokenization_overrides = {k: [list(g) for g in v] for k, v in tokenization.items()}
    cfg.dataset.training_modalities = list(names)
    dropped = model.encoder_config.band_dropout_modalities
    if dropped is not None:
        model.encoder_config.band_dropout_modalities = [m for m in dropped if m in names]
    loader, module = cfg.data_loader, cfg.train_module
    for masking in (loader.masking_config, loader.masking_config_b):
        if masking is not None:
            _keep(masking.strategy_config, names)
    losses = (module.loss_config, module.loss_config_b, module.mae_loss_config)
    for loss in losses:
        if loss is not None:
            _keep(loss.loss_config, names)
    module.token_exit_cfg = {m: module.token_exit_cfg.get(m, 0) for m in names}
    if module.token_exit_cfg_b is not None:
        module.token_exit_cfg_b = {m: module.token_exit_cfg_b.get(m, 0) for m in names}


def _keep(options: dict[str, Any], names: list[str]) -> None:
    """Removes modalities that are not in `names` from every list and mapping of modalities."""
    for key, value in options.items():
        if key in schema.MODALITY_LISTS and value is not None:
            options[key] = [m for m in value if m in names]
        elif key in schema.MODALITY_DICTS and value is not None:
            options[key] = {m: v for m, v in value.items() if m in names}


def add_catalogue_tasks(cfg: ExperimentConfig) -> None:
    """Adds tasks that `tasks_to_run` takes from the catalogue to the configured ones."""
    evaluator = cfg.trainer.callbacks.downstream_evaluator
    missing = [t for t in evaluator.tasks_to_run or () if t not in evaluator.tasks]
    if missing:
        from olmoearth_jax.evals.tasks import catalogue

        known = catalogue()
        evaluator.tasks.update({t: known[t] for t in missing if t in known})
