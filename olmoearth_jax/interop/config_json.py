"""The published ``config.json``: read with its compatibility rules, and written (section 13)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmoearth_jax.modalities import closest
from olmoearth_jax.model.config import (
    AttentionPoolerConfig,
    EncoderConfig,
    ModelConfig,
    PredictorConfig,
    ReconstructorConfig,
)

_PACKAGE = "olmoearth_pretrain.nn"
_CLASSES = {
    "LatentMIMConfig": f"{_PACKAGE}.latent_mim.LatentMIMConfig",
    "MAEConfig": f"{_PACKAGE}.mae.MAEConfig",
    "GalileoConfig": f"{_PACKAGE}.galileo.GalileoConfig",
    "EncoderConfig": f"{_PACKAGE}.flexi_vit.EncoderConfig",
    "PredictorConfig": f"{_PACKAGE}.flexi_vit.PredictorConfig",
    "AttentionPoolerConfig": f"{_PACKAGE}.flexi_vit.AttentionPoolerConfig",
    "ReconstructorConfig": f"{_PACKAGE}.flexi_vit.ReconstructorConfig",
    "TokenizationConfig": f"{_PACKAGE}.tokenization.TokenizationConfig",
    "ModalityTokenization": f"{_PACKAGE}.tokenization.ModalityTokenization",
}
_KINDS = {"LatentMIMConfig": "latent_mim", "MAEConfig": "mae", "GalileoConfig": "galileo"}
# Members that the published files have and this package has no use for, with their defaults.
_INERT = {
    EncoderConfig: {"use_flash_attn": False, "log_token_norm_stats": False},
    PredictorConfig: {"use_flash_attn": False},
}


def _class_name(doc: Mapping[str, Any], default: str) -> str:
    """Last component of `_CLASS_`: module paths have changed over time."""
    name = str(doc.get("_CLASS_", default)).rsplit(".", 1)[-1]
    if name not in _CLASSES:
        raise ValueError(f"unknown config class {name!r}; {closest(name, _CLASSES)}")
    return name


def _overrides(doc: Mapping[str, Any] | None) -> dict[str, list[list[str]]]:
    if not doc:
        return {}
    groups = doc.get("overrides") or {}
    return {name: [list(g) for g in value["band_groups"]] for name, value in groups.items()}


def _members(cls: type, doc: Mapping[str, Any]) -> dict[str, Any]:
    """Known, non-null members; unknown ones are ignored."""
    fields = {f.name for f in dataclasses.fields(cls)}
    out = {k: v for k, v in doc.items() if k in fields and v is not None}
    if "position_encoding" in fields and doc.get("spatial_pos_encoding") is not None:
        out["position_encoding"] = doc["spatial_pos_encoding"]
    if "tokenization_overrides" in fields:
        out["tokenization_overrides"] = _overrides(doc.get("tokenization_config"))
    return out


def _pooler(doc: Any) -> AttentionPoolerConfig:
    if not isinstance(doc, Mapping) or "pooler_dim" not in doc:
        raise ValueError("attention_pooler_config must be an object with a pooler_dim")
    if (name := _class_name(doc, "AttentionPoolerConfig")) != "AttentionPoolerConfig":
        raise ValueError(f"attention_pooler_config cannot be of class {name!r}")
    return AttentionPoolerConfig(**_members(AttentionPoolerConfig, doc))


def _part(cls: type, doc: Any, where: str) -> Any:
    if not isinstance(doc, Mapping):
        raise ValueError(f"{where} must be an object, got {type(doc).__name__}")
    if doc.get("attention_pooler_config") is not None:
        doc = {**doc, "attention_pooler_config": _pooler(doc["attention_pooler_config"])}
    if not doc.get("supported_modality_names"):
        raise ValueError(f"{where} has no supported_modality_names")
    _class_name(doc, cls.__name__)
    return cls(**_members(cls, doc))


def from_json(doc: Mapping[str, Any]) -> ModelConfig:
    """Model config from a parsed ``config.json`` (or its `model` member alone).

    Raises:
      ValueError: not a model config; the message names the member at fault.
    """
    model = doc.get("model", doc)
    if not isinstance(model, Mapping) or "encoder_config" not in model:
        raise ValueError("not a model config: it has no encoder_config")
    kind = _class_name(model, "LatentMIMConfig")
    if kind not in _KINDS:
        raise ValueError(f"a model cannot be of class {kind!r}; {closest(kind, _KINDS)}")
    encoder_doc = model["encoder_config"]
    encoder = _part(EncoderConfig, encoder_doc, "encoder_config")
    if "use_linear_patch_embed" not in encoder_doc:
        # Files written before that member existed belong to models with a convolution.
        encoder.use_linear_patch_embed = False
    decoder = reconstructor = None
    if model.get("decoder_config") is not None:
        decoder = _part(PredictorConfig, model["decoder_config"], "decoder_config")
    if model.get("reconstructor_config") is not None:
        inner = model["reconstructor_config"]
        reconstructor = _part(ReconstructorConfig, inner, "reconstructor_config")
        reconstructor.decoder_config = _part(
            PredictorConfig, inner.get("decoder_config"), "reconstructor_config.decoder_config"
        )
    return ModelConfig(
        kind=_KINDS[kind],
        encoder_config=encoder,
        decoder_config=decoder,
        reconstructor_config=reconstructor,
        projection_only_target=bool(model.get("projection_only_target", False)),
    )


def _write_part(config: Any) -> dict[str, Any]:
    name = type(config).__name__
    out: dict[str, Any] = {"_CLASS_": _CLASSES[name]}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        if field.name == "tokenization_overrides":
            if value:
                out["tokenization_config"] = {
                    "_CLASS_": _CLASSES["TokenizationConfig"],
                    "overrides": {
                        m: {"_CLASS_": _CLASSES["ModalityTokenization"], "band_groups": groups}
                        for m, groups in value.items()
                    },
                }
        elif field.name == "use_attention_pooler" and not value:
            continue  # readers of the first versions do not know it
        elif field.name == "layer_scale_init":
            raise ValueError("a model with layer scale cannot be written as a published config")
        else:
            out[field.name] = _write_part(value) if dataclasses.is_dataclass(value) else value
    return out | _INERT.get(type(config), {})


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` document of a model config; null members are left out."""
    name = next(cls for cls, kind in _KINDS.items() if kind == config.kind)
    model: dict[str, Any] = {"_CLASS_": _CLASSES[name]}
    for member in ("encoder_config", "decoder_config", "reconstructor_config"):
        part = getattr(config, member)
        if part is not None:
            model[member] = _write_part(part)
    if config.kind == "latent_mim":
        model["projection_only_target"] = config.projection_only_target
    return {"model": model}


def read(path: Path) -> ModelConfig:
    """Reads a ``config.json`` file.

    Raises:
      ValueError: missing, not JSON or not a model config; the message names the file.
    """
    path = Path(path)
    try:
        return from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"there is no config file {path}") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from e
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def write(config: ModelConfig, path: Path) -> None:
    """Writes a ``config.json`` file."""
    Path(path).write_text(json.dumps(to_json(config), indent=1) + "\n")
