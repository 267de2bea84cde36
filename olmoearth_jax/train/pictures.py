"""Pictures of a run for TensorBoard: inputs, masks, and the principal components of features.

They show one sample, always the same, so that what the encoder makes of it can be followed over
the steps. It is read apart from training: neither its state nor its batches notice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.data.pipeline import TrainStream
from olmoearth_jax.images import stretched
from olmoearth_jax.masks import CODES, MISSING_TOKEN
from olmoearth_jax.mesh import gathered
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.frozen import encoder_graph
from olmoearth_jax.model.uniform_batch import UniformBatch, encode_batch

_COLOURS = np.array([code.rgb for code in CODES], np.uint8)
"""Of the mask codes."""
_GREY = 0.85


_HEIGHT = 144
"""Pixels to which small images are enlarged."""


class Pictures:
    """Draws the first usable sample of the largest grid that the first step holds."""

    def __init__(self, stream: TrainStream, model: ModelConfig):
        # A stream of its own: what it reads does not count as training data.
        self._stream = dataclasses.replace(stream, host_index=0, host_count=1)
        self._graph = encoder_graph(model)
        self._names = [n for n in stream.index.modalities if modalities.get(n).spatial]
        self._sample: dict[str, Any] | None = None

    def __call__(self, params: Any) -> dict[str, np.ndarray]:
        """Pictures uint8 [H, W, 3] by name; every process must call it, the first one draws."""
        encoder = jax.tree.map(gathered, params["encoder"])
        if jax.process_index() or not self._names:
            return {}
        if self._sample is None:
            self._sample = self._read()
        if not self._sample:
            return {}
        return {**self._inputs(), "features": self._features(encoder)}

    def _read(self) -> dict[str, Any]:
        shapes = self._stream.shapes(0)
        group = self._stream.group(max(range(len(shapes)), key=lambda i: shapes[i][1]))
        if not group["ok"].any():
            return {}
        first = int(np.argmax(group["ok"]))
        sample = {k: group[k][first : first + 1] for k in ("timestamps",)}
        for key in ("data", "mask_a", "mask_b"):
            if key in group:
                sample[key] = {n: x[first : first + 1] for n, x in group[key].items()}
        return sample | {"patch_size": int(group["patch_size"])}

    def _inputs(self) -> dict[str, np.ndarray]:
        assert self._sample is not None
        found = {}
        for name in self._names:
            colours = stretched(name, self._sample["data"][name][0], _GREY)
            shown = np.round(255 * colours).astype(np.uint8)
            found[f"inputs/{name}"] = _enlarged(_in_a_row(shown))
        for view in ("mask_a", "mask_b"):
            for name, mask in self._sample.get(view, {}).items():
                if name in self._names:
                    found[f"{view}/{name}"] = _enlarged(_in_a_row(_COLOURS[mask[0, ..., 0]]))
        return found

    def _features(self, encoder: Any) -> np.ndarray:
        """The first three principal components of the patches' features, as red, green, blue."""
        assert self._sample is not None
        sample, patch = self._sample, self._sample["patch_size"]
        gone = MISSING_TOKEN
        masks = {n: np.where(m == gone, gone, 0) for n, m in sample["mask_a"].items()}
        arrays = (sample["data"], masks, sample["timestamps"])
        tokens = _encode(self._graph, patch, encoder, arrays)
        total: Any = 0.0
        for name in self._names:
            there = (masks[name] != gone)[0, ..., None]
            values = np.asarray(tokens[name], np.float64)[0]
            total = total + (values * there).sum((2, 3)) / np.maximum(there.sum((2, 3)), 1)
        flat = total.reshape(-1, total.shape[-1])
        flat = flat - flat.mean(0)
        axes = np.linalg.svd(flat, full_matrices=False)[2][:3]
        axes = axes * np.sign(axes.sum(1, keepdims=True))  # a component has no sign of its own
        shown = np.zeros((len(flat), 3))
        shown[:, : len(axes)] = flat @ axes.T
        span = np.maximum(np.abs(shown).max(0), 1e-12)
        colours = np.round(127.5 * (1 + shown / span)).astype(np.uint8)
        return _enlarged(colours.reshape(*total.shape[:2], 3))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(graph, patch_size, params, arrays):
    data, masks, timestamps = arrays
    batch = UniformBatch(data, masks, timestamps, patch_size)
    return encode_batch(latent_mim.merge(graph, params), batch).tokens


def _in_a_row(frames: np.ndarray) -> np.ndarray:
    """[H, W, T, 3] -> [H, T * W, 3], time from left to right."""
    height, width, steps = frames.shape[:3]
    return frames.transpose(0, 2, 1, 3).reshape(height, steps * width, 3)


def _enlarged(image: np.ndarray) -> np.ndarray:
    factor = max(1, _HEIGHT // len(image))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
