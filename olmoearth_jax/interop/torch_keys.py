"""Two-way map between the reference's state dict and our parameter tree (spec section 13.1).

Strict in both directions: every tensor is used, every parameter is filled. Fixed month tables
and target tensors that we don't hold travel as *extras*, so that an imported state dict is
exported again bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from ml_dtypes import bfloat16

from olmoearth_jax import modalities
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.encodings import month_table, quarter_width
from olmoearth_jax.model.heads import DISTILLATION, SUPERVISION, WIDTH, map_tasks
from olmoearth_jax.model.latent_mim import Params, flatten, graph, target_graph, unflatten

_Path = tuple[str, ...]
_Layout = Literal["same", "linear", "conv", "transposed"]

_AXES = {"linear": (1, 0), "conv": (2, 3, 1, 0), "transposed": (0, 2, 3, 1)}
_STALE_SUFFIX = "composite_encodings.pos_embed"
_MONTH = "composite_encodings.month_embed.weight"

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_NAMES = {
    "query": "attn.q", "key": "attn.k", "value": "attn.v", "out": "attn.proj",
    "q_norm": "attn.q_norm", "k_norm": "attn.k_norm", "rope_freqs": "attn.rope_mixed_freqs",
    "layer_scale1": "ls1.gamma", "layer_scale2": "ls2.gamma",
    "self_blocks": "self_attn_blocks", "student": "student.0", "student_norm": "student.1",
    "embed": "encoder_to_decoder_embed", "output_proj": "to_output_embed",
    "embedding_projector": "embedding_projector.projection.0",
    "location_embed": "location_tokens_to_decoder_embed",
}  # fmt: skip
"""Parts of our paths that the reference calls otherwise; 'attention' is part of the name there."""

_HEADS = (SUPERVISION, DISTILLATION)
"""Heads that only training needs (spec/train_v1_3.md sections 3.4, 4.3)."""
_PARTS = {"first": "0", "norm": "1", "last": "3"}
"""Numbers of a back-projection's layers; the activation between them is number 2."""
_DECODERS = {
    "latent_mim": ["decoder."],
    "mae": ["decoder."],
    "galileo": ["decoder_a.", "decoder_b."],
}
_CHANNELS = "composite_encodings.per_modality_channel_embeddings"
_PATCHES = "patch_embeddings.per_modality_embeddings"
_RECONSTRUCTIONS = "per_modality_reconstructions"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its path and shape here, its key and shape in the reference."""

    path: _Path
    shape: tuple[int, ...]
    key: str
    layout: _Layout
    torch_shape: tuple[int, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Reference tensor -> our layout, float32."""
        x = np.asarray(tensor, np.float32).transpose(self._axes)
        return np.ascontiguousarray(x.reshape(self.shape))

    def to_torch(self, value: Any) -> np.ndarray:
        """Our array -> the reference's layout, float32."""
        x = np.asarray(value, np.float32).reshape([self.torch_shape[i] for i in self._axes])
        return np.ascontiguousarray(x.transpose(np.argsort(self._axes)))

    @property
    def _axes(self) -> tuple[int, ...]:
        """Axes of the reference's tensor in our order."""
        return _AXES.get(self.layout, tuple(range(len(self.torch_shape))))


def block_key(path: _Path) -> str:
    """Key of a path within a block, a pooler, or anything else without numbers of its own."""
    parts = [_NAMES.get(part, _LEAVES.get(part, part)) for part in path if part != "attention"]
    return ".".join(parts)


def _module_key(path: _Path) -> str:
    """Key of a path within an encoder, a decoder or a reconstructor."""
    head, rest = path[0], path[1:]
    if head == "encodings":
        return f"{_CHANNELS}.{rest[1]}"
    if head == "patch_embeddings":
        return _band_set_key(_PATCHES, rest[1:])
    if head == "heads":
        return _band_set_key(_RECONSTRUCTIONS, (*rest[:2], "proj", rest[-1]))
    if head == "project_and_aggregate":
        return f"{head}.projection.{2 * int(rest[1])}.{_LEAVES[rest[2]]}"
    return block_key(path)


def _band_set_key(stem: str, rest: _Path) -> str:
    name, band_set, part = rest[:3]
    stem, leaf = f"{stem}.{name}.{name}__{band_set}", _LEAVES[rest[-1]]
    if not modalities.get(name).spatial:
        return f"{stem}.{leaf}"
    if part == "proj":
        return f"{stem}.proj.{leaf}"
    # ReLUs sit between the linear layers: after each one of the pixel MLP, before each one after.
    index = 2 * int(rest[3]) + (part == "post_proj")
    return f"{stem}.{part}.{index}.{leaf}"


def _entry(path: _Path, shape: tuple[int, ...], prefix: str, config: ModelConfig) -> Entry:
    """Entry of a path that starts below the part named by `prefix`."""
    layout, torch_shape = "same", shape
    encoder, kernel = config.encoder_config, path[-1] == "kernel"
    if kernel:
        layout, torch_shape = "linear", shape[::-1]
    if kernel and path[0] == "heads" and modalities.get(path[1]).spatial:
        assert config.reconstructor_config is not None
        side = config.reconstructor_config.max_patch_size
        layout, torch_shape = "transposed", (shape[0], shape[1] // side**2, side, side)
    elif kernel and path[0] == "patch_embeddings" and not encoder.use_linear_patch_embed:
        modality = modalities.get(path[2])
        if path[4] == "proj" and modality.spatial:
            side = encoder.max_patch_size * modality.image_factor
            layout, torch_shape = "conv", (shape[1], shape[0] // side**2, side, side)
    return Entry(path, shape, prefix + _module_key(path), layout, torch_shape)


def model_entries(config: ModelConfig) -> list[Entry]:
    """Entries of all trained parts, paths from the root of the parameter tree."""
    out = []
    for path, leaf in flatten(graph(config)[1]):
        if path[0] in _HEADS:
            layout, shape = ("linear", leaf.shape[::-1]) if path[-1] == "kernel" else (
                "same", leaf.shape
            )  # fmt: skip
            out.append(Entry(path, leaf.shape, _head_key(path), layout, shape))
            continue
        root = path[: 2 if path[:2] == ("reconstructor", "decoder") else 1]
        entry = _entry(path[len(root) :], tuple(leaf.shape), ".".join(root) + ".", config)
        out.append(dataclasses.replace(entry, path=path))
    return out


def target_entries(config: ModelConfig, full: bool) -> list[Entry]:
    """Entries of the target, paths from the root of the target tree; [] for an MAE model."""
    if config.kind == "mae":
        return []
    leaves = flatten(target_graph(config, full)[1])
    return [_entry(path, tuple(leaf.shape), "target_encoder.", config) for path, leaf in leaves]


def _tables(config: ModelConfig) -> dict[str, np.ndarray]:
    """The fixed tables by key: those of months, and of the classes that heads tell apart."""
    widths = {"encoder.": config.encoder_config.embedding_size}
    if config.kind != "mae" and not config.projection_only_target:
        widths["target_encoder."] = config.encoder_config.embedding_size
    decoders = dict.fromkeys(_DECODERS[config.kind], config.decoder_config)
    if config.reconstructor_config is not None:
        decoders["reconstructor.decoder."] = config.reconstructor_config.decoder_config
    widths |= {name: d.decoder_embedding_size for name, d in decoders.items() if d is not None}
    months = {name + _MONTH: month_table(quarter_width(width)) for name, width in widths.items()}
    return months | _class_tables(config)


def state_dict_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the reference's full state dict."""
    entries = model_entries(config) + target_entries(config, not config.projection_only_target)
    shapes = {entry.key: entry.torch_shape for entry in entries}
    return shapes | {key: table.shape for key, table in _tables(config).items()}


def _check_keys(got: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
    missing = [k for k in wanted if k not in got]
    surplus = [k for k in got if k not in wanted]
    shapes = [
        f"{k} is {tuple(got[k].shape)}, expected {tuple(wanted[k])}"
        for k in wanted
        if k in got and tuple(got[k].shape) != tuple(wanted[k])
    ]
    problems = []
    for text, items in (
        ("missing from the weights", missing),
        ("not part of the model", surplus),
        ("of another shape", shapes),
    ):
        if items:
            shown = ", ".join(items[:8]) + (", ..." if len(items) > 8 else "")
            problems.append(f"{len(items)} tensors {text}: {shown}")
    if problems:
        raise ValueError("the weights do not fit the config: " + "; ".join(problems))


def read_entries(entries: list[Entry], state: Mapping[str, np.ndarray]) -> Params:
    """Tree of the entries from a state dict that has been checked."""
    return unflatten({entry.path: entry.to_ours(state[entry.key]) for entry in entries})


def _rounded(table: np.ndarray) -> list[np.ndarray]:
    """A table as it is, and as weights of half precision hold it."""
    return [table, *(table.astype(kind).astype(np.float32) for kind in (np.float16, bfloat16))]


def from_state_dict(
    state: Mapping[str, np.ndarray], config: ModelConfig, full_target: bool = False
) -> tuple[Params, Params | None, dict[str, np.ndarray]]:
    """Reads a full reference state dict.

    Args:
      state: {key: tensor}; tables of the old position embedding are ignored.
      config: the model it belongs to.
      full_target: return the target as a whole encoder, not only its projection.

    Returns:
      (parameters, target parameters or None for an MAE model, extras). Extras hold, by key, every
      tensor that is in neither tree: month tables and unused target tensors.

    Raises:
      ValueError: tensors missing, left over or of another shape; all are listed by side. Also if
        a month table differs from the fixed one, or the whole target is asked for but not stored.
    """
    if full_target and config.projection_only_target:
        raise ValueError("these weights hold only the target's projection, not a whole encoder")
    state = {k: np.asarray(v) for k, v in state.items() if not k.endswith(_STALE_SUFFIX)}
    _check_keys(state, state_dict_shapes(config))
    for key, table in _tables(config).items():
        if not any(np.allclose(state[key], t, atol=1e-5) for t in _rounded(table)):
            kind = "table of classes" if key.startswith(_HEADS) else "month table"
            raise ValueError(f"{key} differs from the fixed {kind}")
    entries, targets = model_entries(config), target_entries(config, full_target)
    params = read_entries(entries, state)
    target = read_entries(targets, state) if targets else None
    used = {entry.key for entry in entries + targets}
    return params, target, {k: v for k, v in state.items() if k not in used}


def to_state_dict(
    params: Params,
    config: ModelConfig,
    target_params: Params | None = None,
    extras: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The reference's full state dict, float32; inverse of `from_state_dict`.

    Target tensors given neither by `target_params` nor by `extras` are unused at exit depth 0;
    they are filled with the online encoder's, so that the reference can load the result.

    Raises:
      ValueError: parameters missing or of another shape.
    """
    ours = dict(flatten(params))
    entries = model_entries(config)
    _check_keys(
        {"/".join(k): v for k, v in ours.items()}, {"/".join(e.path): e.shape for e in entries}
    )
    out = {entry.key: entry.to_torch(ours[entry.path]) for entry in entries}
    out |= {key: table.copy() for key, table in _tables(config).items()}
    targets = target_entries(config, not config.projection_only_target)
    given = dict(flatten(target_params or {}))
    for entry in targets:
        source = given[entry.path] if entry.path in given else ours[("encoder", *entry.path)]
        out[entry.key] = entry.to_torch(source)
    held = {e.key for e in entries} | {e.key for e in targets if e.path in given}
    for key, value in (extras or {}).items():
        if key not in out:
            raise ValueError(f"extra tensor {key} is not part of the model")
        if key not in held:
            out[key] = np.asarray(value)
    return out


def _head_key(path: tuple[str, ...]) -> str:
    """Released name of a parameter whose path starts with one of `_HEADS`."""
    if path[0] == SUPERVISION:
        return ".".join((*path[:-1], _LEAVES[path[-1]]))
    root, group, width, part, leaf = path
    inner = [] if part == "linear" else [_PARTS[part]]
    return ".".join((root, group, width.removeprefix(WIDTH), *inner, _LEAVES[leaf]))


def _class_tables(config: ModelConfig) -> dict[str, np.ndarray]:
    """The tables of class values that the reference keeps beside the heads, by name."""
    head = config.supervision_head_config
    if head is None:
        return {}
    return {
        f"{SUPERVISION}._class_values_{task.name}": np.asarray(task.class_values, np.float32)
        for task in map_tasks(head)
        if task.class_values
    }
