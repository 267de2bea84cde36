"""Two-way map between the reference's state dict and our parameter tree (spec section 13.1).

Strict in both directions: every tensor is used, every parameter is filled. Fixed month tables
and target tensors that we don't hold travel as *extras*, so that an imported state dict is
exported again bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.encodings import month_table, quarter_width
from olmoearth_jax.model.latent_mim import Params, flatten, graph, target_graph, unflatten

Path = tuple[str, ...]
Layout = Literal["same", "linear", "conv", "transposed"]

_STALE_SUFFIX = "composite_encodings.pos_embed"
_MONTH = "composite_encodings.month_embed.weight"

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_BLOCK_PARTS = {
    ("attention", "query"): "attn.q",
    ("attention", "key"): "attn.k",
    ("attention", "value"): "attn.v",
    ("attention", "out"): "attn.proj",
    ("attention", "q_norm"): "attn.q_norm",
    ("attention", "k_norm"): "attn.k_norm",
    ("norm1",): "norm1",
    ("norm2",): "norm2",
    ("mlp", "fc1"): "mlp.fc1",
    ("mlp", "fc2"): "mlp.fc2",
}
_BLOCK_LEAVES = {
    ("attention", "rope_freqs"): "attn.rope_mixed_freqs",
    ("layer_scale1",): "ls1.gamma",
    ("layer_scale2",): "ls2.gamma",
}
_MODULES = {
    "norm": "norm",
    "input_norm": "input_norm",
    "embed": "encoder_to_decoder_embed",
    "output_proj": "to_output_embed",
    "embedding_projector": "embedding_projector.projection.0",
    "location_embed": "location_tokens_to_decoder_embed",
}
_POOLER_MODULES = {
    "read_blocks": "read_blocks",
    "self_blocks": "self_attn_blocks",
    "student": "student.0",
    "student_norm": "student.1",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its path and shape here, its key and shape in the reference."""

    path: Path
    shape: tuple[int, ...]
    key: str
    layout: Layout
    torch_shape: tuple[int, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Reference tensor -> our layout, float32."""
        x = np.asarray(tensor, np.float32)
        if self.layout == "linear":
            x = x.T
        elif self.layout == "conv":
            x = x.transpose(2, 3, 1, 0)
        elif self.layout == "transposed":
            x = x.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(x.reshape(self.shape))

    def to_torch(self, value: Any) -> np.ndarray:
        """Our array -> the reference's layout, float32."""
        x = np.asarray(value, np.float32)
        if self.layout == "linear":
            x = x.T
        elif self.layout == "conv":
            out, channels, rows, cols = self.torch_shape
            x = x.reshape(rows, cols, channels, out).transpose(3, 2, 0, 1)
        elif self.layout == "transposed":
            d_in, channels, rows, cols = self.torch_shape
            x = x.reshape(d_in, rows, cols, channels).transpose(0, 3, 1, 2)
        return np.ascontiguousarray(x)


def block_key(rest: Path) -> str:
    """Key within a block of a path within a block."""
    if rest in _BLOCK_LEAVES:
        return _BLOCK_LEAVES[rest]
    return f"{_BLOCK_PARTS[rest[:-1]]}.{_LEAVES[rest[-1]]}"


def _module_key(path: Path) -> str:
    """Key of a path within an encoder or a decoder."""
    head, rest = path[0], path[1:]
    if head == "blocks":
        return f"blocks.{rest[0]}.{block_key(rest[1:])}"
    if head == "encodings":
        return f"composite_encodings.per_modality_channel_embeddings.{rest[1]}"
    if head == "patch_embeddings":
        return _patch_key(rest[1:])
    if head == "attention_pooler":
        return f"attention_pooler.{pooler_key(rest)}"
    if head == "project_and_aggregate":
        return f"project_and_aggregate.projection.{2 * int(rest[1])}.{_LEAVES[rest[2]]}"
    if head in ("mask_token", "register_tokens"):
        return head
    return f"{_MODULES[head]}.{_LEAVES[rest[0]]}"


def pooler_key(path: Path) -> str:
    """Key of a path within the attention pooler (spec/model_v1_3.md section 4.1)."""
    head, rest = path[0], path[1:]
    name = _POOLER_MODULES.get(head, head)
    if head in ("read_blocks", "self_blocks"):
        return f"{name}.{rest[0]}.{block_key(rest[1:])}"
    return ".".join([name, *rest[:-1], _LEAVES[rest[-1]]]) if rest else name


def _patch_key(rest: Path) -> str:
    name, band_set, part = rest[:3]
    stem = f"patch_embeddings.per_modality_embeddings.{name}.{name}__{band_set}"
    leaf = _LEAVES[rest[-1]]
    if not modalities.get(name).spatial:
        return f"{stem}.{leaf}"
    if part == "proj":
        return f"{stem}.proj.{leaf}"
    # ReLUs sit between the linear layers: after each one of the pixel MLP, before each one after.
    index = 2 * int(rest[3]) + (part == "post_proj")
    return f"{stem}.{part}.{index}.{leaf}"


def _layout(path: Path, shape: tuple[int, ...], conv_side: int | None, head_side: int):
    """(layout, reference shape) of a tensor; `conv_side` is set for convolution kernels."""
    if path[-1] != "kernel":
        return "same", shape
    if conv_side:
        return "conv", (shape[1], shape[0] // conv_side**2, conv_side, conv_side)
    if head_side:
        return "transposed", (shape[0], shape[1] // head_side**2, head_side, head_side)
    return "linear", shape[::-1]


def _entry(path: Path, shape: tuple[int, ...], prefix: str, config: ModelConfig) -> Entry:
    """Entry of a path that starts below the part named by `prefix`."""
    conv_side, head_side = None, 0
    encoder = config.encoder_config
    if path[0] == "heads":
        name, band_set = path[1:3]
        key = f"per_modality_reconstructions.{name}.{name}__{band_set}."
        if modalities.get(name).spatial:
            assert config.reconstructor_config is not None
            head_side = config.reconstructor_config.max_patch_size
            key += "proj."
        key += _LEAVES[path[-1]]
    else:
        key = _module_key(path)
    if path[0] == "patch_embeddings" and path[4] == "proj" and not encoder.use_linear_patch_embed:
        modality = modalities.get(path[2])
        if modality.spatial:
            conv_side = encoder.max_patch_size * modality.image_factor
    layout, torch_shape = _layout(path, shape, conv_side, head_side)
    return Entry(path, shape, prefix + key, layout, torch_shape)


def part_entries(part: Mapping[str, Any], prefix: str, config: ModelConfig) -> list[Entry]:
    """Entries of one encoder or decoder tree (arrays or shapes), keys prefixed by `prefix`."""
    return [_entry(path, tuple(leaf.shape), prefix, config) for path, leaf in flatten(part)]


def model_entries(config: ModelConfig) -> list[Entry]:
    """Entries of all trained parts, paths from the root of the parameter tree."""
    _, shapes = graph(config)
    out = []
    for part, tree in shapes.items():
        pieces = {part: tree}
        if part == "reconstructor":
            pieces = {"reconstructor/decoder": tree["decoder"], part: {"heads": tree["heads"]}}
        for name, piece in pieces.items():
            root = tuple(name.split("/"))
            for entry in part_entries(piece, ".".join(root) + ".", config):
                out.append(dataclasses.replace(entry, path=(*root, *entry.path)))
    return out


def target_entries(config: ModelConfig, full: bool) -> list[Entry]:
    """Entries of the target, paths from the root of the target tree; [] for an MAE model."""
    if config.kind == "mae":
        return []
    return part_entries(target_graph(config, full)[1], "target_encoder.", config)


def _months(config: ModelConfig) -> dict[str, np.ndarray]:
    """The fixed month tables by key."""
    out = {}
    widths = {"encoder.": config.encoder_config.embedding_size}
    if config.decoder_config is not None:
        names = ("decoder_a.", "decoder_b.") if config.kind == "galileo" else ("decoder.",)
        widths.update(dict.fromkeys(names, config.decoder_config.decoder_embedding_size))
    if config.reconstructor_config is not None:
        inner = config.reconstructor_config.decoder_config
        widths["reconstructor.decoder."] = inner.decoder_embedding_size
    if config.kind != "mae" and not config.projection_only_target:
        widths["target_encoder."] = config.encoder_config.embedding_size
    for prefix, width in widths.items():
        out[prefix + _MONTH] = month_table(quarter_width(width))
    return out


def state_dict_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the reference's full state dict."""
    entries = model_entries(config) + target_entries(config, not config.projection_only_target)
    shapes = {entry.key: entry.torch_shape for entry in entries}
    return shapes | {key: table.shape for key, table in _months(config).items()}


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
    for key, table in _months(config).items():
        if not np.allclose(state[key], table, atol=1e-5):
            raise ValueError(f"{key} differs from the fixed month table")
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
    out |= {key: table.copy() for key, table in _months(config).items()}
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


def num_values(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Total values of a {key: shape} mapping."""
    return sum(math.prod(shape) for shape in shapes.values())
