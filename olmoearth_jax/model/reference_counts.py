"""Parameters as the reference counts them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.encodings import quarter_width
from olmoearth_jax.model.heads import map_tasks
from olmoearth_jax.model.latent_mim import flatten, graph, target_graph

_Path = tuple[str, ...]


def param_table(params: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], int]]:
    """Rows (path joined by '/', shape, number of values) of a (possibly abstract) tree."""
    return [
        ("/".join(path), tuple(leaf.shape), math.prod(leaf.shape)) for path, leaf in flatten(params)
    ]


def count(params: Mapping[str, Any]) -> int:
    """Number of values of a parameter tree."""
    return sum(row[2] for row in param_table(params))


def trainable(config: ModelConfig) -> Callable[[_Path], bool]:
    """Predicate on paths: False for parameters that the config freezes."""
    encoder, decoder = config.encoder_config, config.decoder_config

    def is_trainable(path: _Path) -> bool:
        if path[:2] == ("encoder", "patch_embeddings"):
            return not encoder.frozen_patch_embeddings
        if "encodings" not in path:
            return True
        if path[0] == "encoder":
            return encoder.learnable_channel_embeddings
        if path[0] == "reconstructor" and config.reconstructor_config is not None:
            return config.reconstructor_config.decoder_config.learnable_channel_embeddings
        return decoder is None or decoder.learnable_channel_embeddings

    return is_trainable


def _month_tables(config: ModelConfig) -> dict[str, int]:
    """Values of the fixed month tables, which published weights store, by top-level part."""
    out = {"encoder": 12 * quarter_width(config.encoder_config.embedding_size)}
    if config.decoder_config is not None:
        size = 12 * quarter_width(config.decoder_config.decoder_embedding_size)
        names = ("decoder_a", "decoder_b") if config.kind == "galileo" else ("decoder",)
        out.update(dict.fromkeys(names, size))
    if config.reconstructor_config is not None:
        inner = config.reconstructor_config.decoder_config.decoder_embedding_size
        out["reconstructor"] = 12 * quarter_width(inner)
    return out


def reference_counts(config: ModelConfig) -> dict[str, int]:
    """Counts the way the reference reports them (spec section 12).

    Month tables and the target encoder are included, although this package holds the tables as
    constants and stores only the target's projection.

    Returns:
      'patch_embeddings', 'blocks' (both of the encoder), one entry per part ('encoder',
      'decoder', ...), 'target', 'total', 'trainable', and 'keys', the number of tensors.
    """
    _, shapes = graph(config)
    months = _month_tables(config)
    counts = {part: count(shapes[part]) + months.get(part, 0) for part in shapes}
    out = {
        "patch_embeddings": count(shapes["encoder"]["patch_embeddings"]),
        "blocks": count(shapes["encoder"]["blocks"]),
        **counts,
    }
    heads = config.supervision_head_config
    tables = 0 if heads is None else sum(bool(t.class_values) for t in map_tasks(heads))
    keys = len(flatten(shapes)) + len(months) + tables
    target = 0
    if config.kind != "mae":
        only = config.projection_only_target
        _, target_shapes = target_graph(config, full=not only)
        target = count(target_shapes) + (0 if only else months["encoder"])
        keys += len(flatten(target_shapes)) + (0 if only else 1)
    is_trainable = trainable(config)
    out["target"] = target
    out["total"] = sum(counts.values()) + target
    out["trainable"] = sum(
        math.prod(leaf.shape) for path, leaf in flatten(shapes) if is_trainable(path)
    )
    out["keys"] = keys
    return out
