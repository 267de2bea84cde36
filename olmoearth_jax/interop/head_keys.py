"""Released names of the heads that only training needs (spec/train_v1_3.md sections 3.4, 4.3)."""

from __future__ import annotations

import numpy as np

from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.heads import DISTILLATION, SUPERVISION, WIDTH, map_tasks

ROOTS = (SUPERVISION, DISTILLATION)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_PARTS = {"first": "0", "norm": "1", "last": "3"}
"""Numbers of a back-projection's layers; the activation between them is number 2."""


def head_key(path: tuple[str, ...]) -> str:
    """Released name of a parameter whose path starts with one of `ROOTS`."""
    if path[0] == SUPERVISION:
        return ".".join((*path[:-1], _LEAVES[path[-1]]))
    root, group, width, part, leaf = path
    inner = [] if part == "linear" else [_PARTS[part]]
    return ".".join((root, group, width.removeprefix(WIDTH), *inner, _LEAVES[leaf]))


def class_tables(config: ModelConfig) -> dict[str, np.ndarray]:
    """The tables of class values that the reference keeps beside the heads, by name."""
    head = config.supervision_head_config
    if head is None:
        return {}
    return {
        f"{SUPERVISION}._class_values_{task.name}": np.asarray(task.class_values, np.float32)
        for task in map_tasks(head)
        if task.class_values
    }
