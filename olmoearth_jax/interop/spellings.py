"""The three spellings of v1.3's tensor and config names (spec/train_v1_3.md section 8).

'register' is that of the training branch, 'perceiver' that of converted checkpoints, and
'attention_pooler' that of the released package. All are read; the last one is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Spelling = Literal["register", "perceiver", "attention_pooler"]
_RELEASED: Spelling = "attention_pooler"

_HEAD = "location_token_distillation_head."
# (old, released); a name matches at the start of a key or behind a dot. The first that fits wins.
_PARTS: dict[Spelling, list[tuple[str, str]]] = {
    "register": [
        ("register_projection_norm.", "attention_pooler.student.1."),
        ("register_projection.", "attention_pooler.student.0."),
        ("register_bottleneck.", "attention_pooler."),
        ("encoder.register_back_projections.", f"{_HEAD}back_projections."),
        ("register_to_decoder_embed.", "location_tokens_to_decoder_embed."),
    ],
    "perceiver": [
        ("register_student.", "attention_pooler.student."),
        ("perceiver.", "attention_pooler."),
        ("register_distillation_head.", _HEAD),
        ("register_to_decoder_embed.", "location_tokens_to_decoder_embed."),
    ],
}
_BLOCKS, _OLD_BLOCKS = "attention_pooler.self_attn_blocks.", "attention_pooler.latent_blocks."
_QUERY, _OLD_QUERY = "attention_pooler.learned_query", "attention_pooler.register"
_DUMPED_HEAD = "register_back_projections."
"""Training-only tensors in dumps of an encoder alone, whose keys have no 'encoder.' in front."""


def _swap(key: str, old: str, new: str) -> str | None:
    """The key with its first part that is `old` replaced, or None if there is none."""
    match = re.search(rf"(?:^|(?<=\.)){re.escape(old)}", key)
    return None if match is None else key[: match.start()] + new + key[match.end() :]


def spelling_of(keys: Iterable[str]) -> Spelling:
    """The spelling of a state dict, told by its first key that has different ones."""
    for key in keys:
        if _swap(key, "attention_pooler.", "") or _swap(key, _HEAD, ""):
            return _RELEASED
        for spelling, parts in _PARTS.items():
            # The decoder's layer has one name in two of them.
            if any(_swap(key, old, new) for old, new in parts[:-1]):
                return spelling
    return _RELEASED


def to_released(key: str, spelling: Spelling) -> str | None:
    """The released name of a key; None for a tensor that only training needed."""
    if spelling == _RELEASED:
        return key
    if spelling == "register" and key.startswith(_DUMPED_HEAD):
        return None
    for old, new in _PARTS[spelling]:
        renamed = _swap(key, old, new)
        if renamed is not None:
            renamed = _swap(renamed, _OLD_BLOCKS, _BLOCKS) or renamed
            ends = renamed == _OLD_QUERY or renamed.endswith("." + _OLD_QUERY)
            return renamed[: -len(_OLD_QUERY)] + _QUERY if ends else renamed
    return key


def from_released(key: str, spelling: Spelling) -> str:
    """Inverse of `to_released`."""
    if spelling == _RELEASED:
        return key
    key = _swap(key, _BLOCKS, _OLD_BLOCKS) or key
    if key == _QUERY or key.endswith("." + _QUERY):
        key = key[: -len(_QUERY)] + _OLD_QUERY
    for old, new in _PARTS[spelling]:
        renamed = _swap(key, new, old)
        if renamed is not None:
            return renamed
    return key


def released_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the released names.

    Raises:
      ValueError: two keys of it have the same released name.
    """
    spelling = spelling_of(state)
    out: dict[str, Any] = {}
    for key, value in state.items():
        name = to_released(key, spelling)
        if name is None:
            continue
        if name in out:
            raise ValueError(f"the weights hold {name} twice, under an old and a new name")
        out[name] = value
    return out


POOLER_MEMBERS = {
    "register_dim": "pooler_dim",
    "latent_depth": "pooler_depth",
    "num_heads": "num_heads",
    "per_depth_read_proj": "per_depth_read_proj",
    "attn_dim": "attn_dim",
    "student_dims": "student_dims",
    "student_output_norm": "student_output_norm",
}
"""Members of a `perceiver_config`, with their released names."""

_OLDER_MEMBERS = {
    "projection_dims": "student_dims",
    "projection_output_norm": "student_output_norm",
}
_FLAT_MEMBERS = {
    "register_dim": "pooler_dim",
    "register_latent_depth": "pooler_depth",
    "register_num_heads": "num_heads",
    "register_per_depth_read_proj": "per_depth_read_proj",
    "register_attn_dim": "attn_dim",
    "register_projection_dims": "student_dims",
    "register_projection_output_norm": "student_output_norm",
}
_DECODER_MEMBERS = {
    "use_register_bottleneck": "use_attention_pooler",
    "use_perceiver": "use_attention_pooler",
    "register_dim": "pooler_dim",
}
# Members of features that are gone: the values that change nothing.
_GONE_ENCODER: dict[str, tuple[Any, ...]] = {
    "register_grid_size": (0, None),
    "register_contrastive_source": ("registers", None),
    "register_projection_type": ("linear", None),
    "register_read_depth": (1, None),
    "register_interleave": (True, None),
    "register_latent_self_attn": (True, None),
    "register_learned_read_weighting": (False,),
}
_GONE_MODEL: dict[str, tuple[Any, ...]] = {"supervision_source": ("registers", None)}
_GONE_HEAD: dict[str, tuple[Any, ...]] = {"register_supervision": (True,)}
_GONE_MAP: dict[str, tuple[Any, ...]] = {
    "time_conditioned": (False,),
    "time_harmonics": (4,),
    "time_mlp_hidden_dim": (64,),
}


def _without(doc: Mapping[str, Any], gone: Mapping[str, tuple[Any, ...]], where: str) -> dict:
    """`doc` without the members of features that are gone.

    Raises:
      ValueError: one of them asks for its feature.
    """
    for name, inert in gone.items():
        if name in doc and not any(doc[name] is v or _same(doc[name], v) for v in inert):
            raise ValueError(
                f"{where}.{name} is {doc[name]!r}; models with this feature can't be built"
            )
    return {k: v for k, v in doc.items() if k not in gone}


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def released_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` member of a ``config.json`` under the released names.

    Members of features that later code dropped are left out where they change nothing.

    Raises:
      ValueError: a member asks for a feature that is gone, or the pooler is configured twice.
    """
    out = _without(model, _GONE_MODEL, "model")
    if isinstance(out.get("encoder_config"), Mapping):
        out["encoder_config"], hidden = _released_encoder(out["encoder_config"])
        out |= hidden if "location_token_distillation_head_config" not in out else {}
    if isinstance(out.get("decoder_config"), Mapping):
        out["decoder_config"] = _released_decoder(out["decoder_config"])
    if "register_distillation_head_config" in out:
        out["location_token_distillation_head_config"] = out.pop(
            "register_distillation_head_config"
        )
    if isinstance(out.get("supervision_head_config"), Mapping):
        out["supervision_head_config"] = _released_heads(out["supervision_head_config"])
    return out


def _released_decoder(doc: Mapping[str, Any]) -> dict[str, Any]:
    out = {k: v for k, v in doc.items() if k not in _DECODER_MEMBERS}
    old = {new: doc[k] for k, new in _DECODER_MEMBERS.items() if k in doc}
    if not old.get("use_attention_pooler", True):
        old.pop("pooler_dim", None)
    return old | out


def _released_encoder(doc: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The encoder under the released names, and what it says of the distillation head."""
    out = dict(doc)
    if not out.pop("use_register_bottleneck", False):
        flat = (*_FLAT_MEMBERS, *_GONE_ENCODER, "register_back_projection_hidden")
        out = {k: v for k, v in out.items() if k not in flat}
        return _released_perceiver(out), {}
    if out.get("attention_pooler_config") or out.get("perceiver_config"):
        raise ValueError("encoder_config describes its pooler twice, under an old and a new name")
    out = _without(out, _GONE_ENCODER, "encoder_config")
    pooler = {new: out.pop(old) for old, new in _FLAT_MEMBERS.items() if old in out}
    if pooler.get("pooler_dim") is None and isinstance(out.get("embedding_size"), int):
        pooler["pooler_dim"] = out["embedding_size"] // 2
    hidden = out.pop("register_back_projection_hidden", None)
    head = {"location_token_distillation_head_config": {"back_projection_hidden": hidden}}
    out["attention_pooler_config"] = pooler
    return out, head if pooler.get("student_dims") else {}


def _released_perceiver(doc: dict[str, Any]) -> dict[str, Any]:
    old = doc.pop("perceiver_config", None)
    if old is None:
        return doc
    if doc.get("attention_pooler_config"):
        raise ValueError("encoder_config describes its pooler twice, under an old and a new name")
    if isinstance(old, Mapping):
        names = POOLER_MEMBERS | _OLDER_MEMBERS
        old = {names.get(k, k): v for k, v in old.items() if k != "_CLASS_"}
    return doc | {"attention_pooler_config": old}


def _released_heads(doc: Mapping[str, Any]) -> dict[str, Any]:
    where = "supervision_head_config"
    out = _without(doc, _GONE_HEAD, where)
    if isinstance(out.get("modality_configs"), Mapping):
        out["modality_configs"] = {
            name: _without(one, _GONE_MAP, f"{where}.modality_configs.{name}")
            if isinstance(one, Mapping) else one
            for name, one in out["modality_configs"].items()
        }  # fmt: skip
    return out
