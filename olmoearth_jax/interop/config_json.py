"""The published ``config.json``: read with its compatibility rules, and written (section 13)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmoearth_jax.configlib import limits, schema
from olmoearth_jax.configlib.values import too_deep
from olmoearth_jax.files import is_pointer
from olmoearth_jax.interop import spellings
from olmoearth_jax.modalities import closest
from olmoearth_jax.model.config import (
    AttentionPoolerConfig,
    EncoderConfig,
    LocationTokenDistillationHeadConfig,
    ModelConfig,
    PredictorConfig,
    ReconstructorConfig,
    SupervisedMapConfig,
    SupervisionHeadConfig,
)
from olmoearth_jax.proposals import known

_MODULES = {
    "LatentMIMConfig": "latent_mim", "MAEConfig": "mae", "GalileoConfig": "galileo",
    "EncoderConfig": "flexi_vit", "PredictorConfig": "flexi_vit",
    "AttentionPoolerConfig": "flexi_vit", "ReconstructorConfig": "flexi_vit",
    "SupervisionHeadConfig": "supervision_head",
    "SupervisedMapConfig": "supervision_head",
    "LocationTokenDistillationHeadConfig": "location_token_distillation_head",
    "TokenizationConfig": "tokenization", "ModalityTokenization": "tokenization",
}  # fmt: skip
_KINDS = {"LatentMIMConfig": "latent_mim", "MAEConfig": "mae", "GalileoConfig": "galileo"}
# Members that the published files have and this package has no use for, with their defaults.
_INERT = {
    EncoderConfig: {"use_flash_attn": False, "log_token_norm_stats": False},
    PredictorConfig: {"use_flash_attn": False},
}


def _path(name: str) -> dict[str, Any]:
    """The member that tells a reader the class."""
    return {"_CLASS_": f"olmoearth_pretrain.nn.{_MODULES[name]}.{name}"}


def _class_name(doc: Mapping[str, Any], default: str) -> str:
    """Last component of `_CLASS_`: module paths have changed over time."""
    name = str(doc.get("_CLASS_", default)).rsplit(".", 1)[-1]
    return known("config class", name, _MODULES)


def _part(cls: type, doc: Any, where: str, required: str = "supported_modality_names") -> Any:
    """A config object; unknown members are ignored, null and missing ones take their defaults."""
    if not isinstance(doc, Mapping):
        raise ValueError(f"{where} must be an object, got {type(doc).__name__}")
    if not doc.get(required):
        raise ValueError(f"{where} has no {required}")
    if (name := _class_name(doc, cls.__name__)) != cls.__name__:
        raise ValueError(f"{where} cannot be of class {name!r}")
    fields = {f.name for f in dataclasses.fields(cls)}
    members = {k: v for k, v in doc.items() if k in fields and v is not None}
    if "position_encoding" in fields and doc.get("spatial_pos_encoding") is not None:
        members["position_encoding"] = doc["spatial_pos_encoding"]
    if "tokenization_overrides" in fields:
        members["tokenization_overrides"] = _overrides(doc.get("tokenization_config"), where)
    for key, kind, need in (
        ("attention_pooler_config", AttentionPoolerConfig, "pooler_dim"),
        ("decoder_config", PredictorConfig, "supported_modality_names"),
    ):
        if key in members or (key == "decoder_config" and key in fields):
            members[key] = _part(kind, members.get(key), f"{where}.{key}", need)
    parts = {k: v for k, v in members.items() if dataclasses.is_dataclass(v)}
    plain = {k: v for k, v in members.items() if k not in parts}
    out = schema.convert(cls, plain, where)
    if wrong := limits.judge(plain, where):
        raise ValueError("; ".join(wrong.values()))
    for key, value in parts.items():
        setattr(out, key, value)
    return out


def _overrides(doc: Any, where: str) -> dict[str, Any]:
    """{modality: groups of band names} of a tokenisation config."""
    groups = doc.get("overrides") if isinstance(doc, Mapping) else doc
    if groups is None:
        return {}
    if not isinstance(groups, Mapping):
        raise ValueError(f"{where}.tokenization_config must hold overrides by modality")
    out = {}
    for name, value in groups.items():
        if not isinstance(value, Mapping) or "band_groups" not in value:
            raise ValueError(f"{where}.tokenization_config: {name!r} has no band_groups")
        out[name] = value["band_groups"]
    return out


def from_json(doc: Mapping[str, Any]) -> ModelConfig:
    """Model config from a parsed ``config.json`` (or its `model` member alone).

    Raises:
      ValueError: not a model config; the message names the member at fault.
    """
    if too_deep(doc):
        raise ValueError("not a model config: its parts lie too deep in each other")
    model = doc.get("model", doc) if isinstance(doc, Mapping) else None
    if not isinstance(model, Mapping) or "encoder_config" not in model:
        raise ValueError("not a model config: it has no encoder_config")
    model = spellings.released_config(model)
    kind = _class_name(model, "LatentMIMConfig")
    if kind not in _KINDS:
        raise ValueError(f"a model cannot be of class {kind!r}; {closest(kind, _KINDS)}")
    encoder_doc = model["encoder_config"]
    encoder = _part(EncoderConfig, encoder_doc, "encoder_config")
    if "use_linear_patch_embed" not in encoder_doc:
        # Files written before that member existed belong to models with a convolution.
        encoder.use_linear_patch_embed = False
    parts = {
        key: None if model.get(key) is None else _part(cls, model[key], key)
        for key, cls in (
            ("decoder_config", PredictorConfig), ("reconstructor_config", ReconstructorConfig)
        )
    }  # fmt: skip
    return ModelConfig(
        kind=_KINDS[kind],
        encoder_config=encoder,
        **parts,
        **_heads(model),
        projection_only_target=schema.convert(
            bool, model.get("projection_only_target", False), "projection_only_target"
        ),
    )


def _heads(model: Mapping[str, Any]) -> dict[str, Any]:
    """The configs of the heads that only training needs, as far as the document has them."""
    out = {}
    for name, cls in (
        ("supervision_head_config", SupervisionHeadConfig),
        ("location_token_distillation_head_config", LocationTokenDistillationHeadConfig),
    ):
        if model.get(name) is not None:
            out[name] = schema.convert(cls, _known_members(cls, model[name], name), name)
            if wrong := limits.judge(model[name], name):
                raise ValueError("; ".join(wrong.values()))
    return out


def _known_members(cls: type, doc: Any, where: str) -> dict[str, Any]:
    """Members of a head's config that we know; others, and null ones, are left out."""
    if not isinstance(doc, Mapping):
        raise ValueError(f"{where} must be an object, got {type(doc).__name__}")
    fields = {f.name for f in dataclasses.fields(cls)}
    out = {k: v for k, v in doc.items() if k in fields and v is not None}
    if cls is SupervisedMapConfig and doc.get("norm_pix_loss"):
        raise ValueError(f"{where}.norm_pix_loss is set; heads with it can't be built")
    if isinstance(out.get("modality_configs"), Mapping):
        out["modality_configs"] = {
            str(n): _known_members(SupervisedMapConfig, v, f"{where}.modality_configs.{n}")
            for n, v in out["modality_configs"].items()
        }
    return out


def _write_part(config: Any) -> dict[str, Any]:
    name = type(config).__name__
    out = _path(name)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        if field.name == "tokenization_overrides":
            if value:
                out["tokenization_config"] = {
                    **_path("TokenizationConfig"),
                    "overrides": {
                        m: {**_path("ModalityTokenization"), "band_groups": groups}
                        for m, groups in value.items()
                    },
                }
        elif field.name == "use_attention_pooler" and not value:
            continue  # readers of the first versions do not know it
        elif field.name == "layer_scale_init":
            raise ValueError("a model with layer scale cannot be written as a published config")
        elif field.name == "modality_configs":
            out[field.name] = {n: _write_part(v) for n, v in value.items()}
        else:
            out[field.name] = _write_part(value) if dataclasses.is_dataclass(value) else value
    return out | _INERT.get(type(config), {})


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` document of a model config; null members are left out."""
    name = next(cls for cls, kind in _KINDS.items() if kind == config.kind)
    model = _path(name)
    for member in ("encoder_config", "decoder_config", "reconstructor_config"):
        part = getattr(config, member)
        if part is not None:
            model[member] = _write_part(part)
    for member in ("supervision_head_config", "location_token_distillation_head_config"):
        if (head := getattr(config, member)) is not None:
            model[member] = _write_part(head)
    if config.kind == "latent_mim":
        model["projection_only_target"] = config.projection_only_target
    return {"model": model}


def read(path: Path, document: Any = None) -> ModelConfig:
    """The model config of a ``config.json`` file.

    Args:
      path: the file.
      document: what `load` gave of it, if that was asked for.

    Raises:
      ValueError: missing, not JSON or not a model config; the message names the file.
    """
    document = load(path) if document is None else document
    try:
        return from_json(document)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def load(path: Path) -> Any:
    """The JSON document of a file.

    Raises:
      ValueError: missing or not JSON; the message names the file.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is a folder, pipe or device")
        if path.exists() and is_pointer(path):
            raise ValueError("it is a Git LFS pointer; run 'git lfs pull' in its folder")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"there is no config file {path}") from None
    except RecursionError:
        raise ValueError(
            f"{path} is not valid JSON: its parts lie too deep in each other"
        ) from None
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from e
