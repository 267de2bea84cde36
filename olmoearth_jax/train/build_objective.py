"""From `config.train_module` to the terms of the loss."""

from __future__ import annotations

import dataclasses
from typing import Any

from olmoearth_jax import losses, modalities
from olmoearth_jax.config import ExperimentConfig, LossConfig
from olmoearth_jax.losses import NoTokenLoss, Objective, exit_pairs
from olmoearth_jax.model import heads


def _loss(config: LossConfig | None, path: str, kind: Any, what: str) -> Any:
    """The loss at `path`, which must be of class `kind`; None if it is not configured."""
    if config is None:
        return None
    loss = losses.build(config.loss_config)
    if not isinstance(loss, kind):
        raise ValueError(f"train_module.{path} must be {what}, got {loss.name}")
    return loss


def _compares_vectors(kind: type) -> bool:
    """Whether a loss can be one between tokens: classes are no targets of any training."""
    return issubclass(kind, losses.TokenLoss) and not issubclass(kind, losses.CrossEntropy)


def _pixel_loss(config: ExperimentConfig) -> losses.MAE | None:
    """The pixel loss, cut into the band sets of the model unless it names its own."""
    given = config.train_module.mae_loss_config
    loss = _loss(given, "mae_loss_config", losses.MAE, "the loss 'mae'")
    if loss is None or given is None:
        return None
    flat = [n for n in config.dataset.training_modalities if not modalities.get(n).spatial]
    if flat:
        raise ValueError(
            f"train_module.mae_loss_config compares images, which {', '.join(flat)} has not; "
            "leave it out of common.training_modalities"
        )
    if given.loss_config.get("tokenization_config") is None:
        tokens = config.model.encoder_config.tokenization
        loss = dataclasses.replace(loss, tokenization_config=tokens)
    return loss


def _view_metrics(config: ExperimentConfig, pair: tuple[Any, Any]) -> tuple[str, ...]:
    """'<strategy>_masking_<loss>' of both views of a Galileo run."""
    loader = config.data_loader
    first = loader.masking_config
    assert first is not None
    second = loader.masking_config_b or first
    kinds = [m.strategy_config.get("type") for m in (first, second)]
    return tuple(f"{kind}_masking_{x.name}" for kind, x in zip(kinds, pair, strict=True))


def build_objective(config: ExperimentConfig) -> Objective:
    """The terms of `config.train_module`.

    Raises:
      ValueError: a loss that is missing or stands where it can't be used.
    """
    module, kind = config.train_module, config.train_module.kind
    between = [n for n, kind in losses.LOSSES.items() if _compares_vectors(kind)]
    tokens = f"a loss between tokens ({', '.join(between)})"
    token = _loss(module.loss_config, "loss_config", losses.TokenLoss, tokens)
    token_b = _loss(module.loss_config_b, "loss_config_b", losses.TokenLoss, tokens)
    pixels = _pixel_loss(config)
    for path, loss in {"loss_config": token, "loss_config_b": token_b}.items():
        if loss is not None and not _compares_vectors(type(loss)):
            raise ValueError(f"train_module.{path} must be {tokens}, got {loss.name}")
    if token is None and kind != "mae":
        raise ValueError("train_module.loss_config is missing")
    if token is None and pixels is None:
        raise ValueError("train_module.mae_loss_config is missing")
    if kind == "mae" and token is not None and config.model.decoder_config is None:
        raise ValueError("train_module.loss_config needs model.decoder_config for kind 'mae'")
    if pixels is not None and config.model.reconstructor_config is None:
        raise ValueError("train_module.mae_loss_config needs model.reconstructor_config")
    nce = _loss(
        module.contrastive_config, "contrastive_config", losses.InfoNCE, "the loss 'InfoNCE'"
    )
    spread = _loss(
        module.regularizer_config, "regularizer_config", losses.KoLeo, "the loss 'KoLeo'"
    )
    galileo = kind == "galileo"
    return Objective(
        token_loss=token or NoTokenLoss(),
        contrastive=nce,
        kind=kind,
        token_loss_b=token_b,
        regularizer=spread,
        mae=pixels,
        exits=exit_pairs(module.token_exit_cfg) or (),
        exits_b=exit_pairs(module.token_exit_cfg_b),
        moving=kind != "mae" and list(module.ema_decay) != [1.0, 1.0],
        view_metrics=_view_metrics(config, (token, token_b or token)) if galileo else (),
        supervision=heads.supervision_of(config.model),
        distillation=heads.distillation_of(config.model),
    )
