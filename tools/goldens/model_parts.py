"""Goldens of single operations and modules of the model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoearth_jax import modalities
from olmoearth_jax.interop import torch_keys
from olmoearth_jax.modalities import Tokenization
from olmoearth_jax.model import latent_mim, pooling, rope, uniform_batch
from olmoearth_jax.model.blocks import Block, BlockShape, Reading
from olmoearth_jax.model.decoder import PatchReconstruction
from olmoearth_jax.model.encodings import CompositeEncodings, month_table, sincos
from olmoearth_jax.model.patch_embed import PatchEmbed, resize, to_patches
from olmoearth_jax.model.rope import RopeConfig
from olmoearth_jax.model.tokens import SlotTable, days_since_2000

from .common import Checks

Arrays = dict[str, np.ndarray]


def _under(arrays: Arrays, prefix: str) -> Arrays:
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


def _with_values(module_fn: Any, values: dict[tuple[str, ...], np.ndarray]) -> Any:
    """A module whose every parameter is given by path."""
    graph, shapes = latent_mim.split(nnx.eval_shape(module_fn))
    wanted = {path: tuple(leaf.shape) for path, leaf in latent_mim.flatten(shapes)}
    got = {path: tuple(v.shape) for path, v in values.items()}
    if got != wanted:
        raise ValueError(f"recorded parameters {got} do not fit {wanted}")
    params = latent_mim.unflatten({k: jnp.asarray(v) for k, v in values.items()})
    return latent_mim.merge(graph, params)


def _variant_tokens(
    names: list[str], shapes: dict[str, tuple[int, ...]], timestamps: Any, variant: Any
) -> tuple[SlotTable, Any, Any]:
    slots = SlotTable.build(names, Tokenization())
    layout = uniform_batch.layout_of(slots, shapes)
    tokens = uniform_batch.tokens_from_grid(
        slots, layout, timestamps, variant["patch_size"], variant["input_res"]
    )
    return slots, layout, tokens


def _label(variant: dict[str, Any]) -> str:
    mode, size, res = (variant[k] for k in ("position_encoding", "patch_size", "input_res"))
    return f"{mode}_ps{size}_res{res}"


def _composite_encodings(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    names = case["modalities"]
    inputs = {name: arrays[f"in/{name}"] for name in names}
    shapes = {name: x.shape[1:-1] for name, x in inputs.items()}
    width = case["embedding_size"]
    for variant in case["variants"]:
        slots, layout, tokens = _variant_tokens(names, shapes, arrays["in/timestamps"], variant)
        mode = variant["position_encoding"]
        values = {
            ("channel", name): arrays[f"params/per_modality_channel_embeddings.{name}"]
            for name in names
        }
        module = _with_values(
            lambda mode=mode, slots=slots: CompositeEncodings(slots, width, mode), values
        )
        added = layout.cut(module(tokens))
        for name in names:
            what = f"{_label(variant)}/{name}"
            checks.array(what, inputs[name] + added[name], arrays[f"out/{what}"])
    checks.array("month table", month_table(width // 4), arrays["params/month_embed.weight"])


def _rope_positions(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    names = case["modalities"]
    shapes = {name: tuple(s[1:]) for name, s in case["token_shapes"].items()}
    timestamps = arrays["in/timestamps"]
    checks.array("days", days_since_2000(timestamps), arrays["out/days"], rtol=1e-6)
    for variant in case["variants"]:
        _, layout, tokens = _variant_tokens(names, shapes, timestamps, variant)
        config = RopeConfig(
            variant["position_encoding"],
            coordinate_scale=variant["rope_coordinate_scale"],
            temporal_coordinate_scale=variant["rope_temporal_coordinate_scale"],
        )
        position = layout.cut(rope.coordinates(config, tokens))
        for name in names:
            what = f"{_label(variant)}/{name}"
            checks.array(what, position[name], arrays[f"out/{what}"], rtol=1e-6)


def _rotated(arrays: Arrays, config: RopeConfig, position: str, freqs: Any = None) -> jax.Array:
    x = jnp.asarray(arrays["in/x"]).swapaxes(1, 2)
    angle = rope.angles(config, jnp.asarray(arrays[f"in/{position}"]), x.shape[-1], freqs)
    return rope.rotate(x, angle).swapaxes(1, 2)


def _encoding_ops(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    expected = _under(arrays, "out/")
    rows, width = expected["sincos1d"].shape
    actual: dict[str, Any] = {
        "sincos1d": sincos(jnp.arange(rows), width),
        "month_table": month_table(expected["month_table"].shape[1]),
        "axial2d_base10000": _rotated(arrays, RopeConfig("rope"), "pos2"),
        "axial2d_base100": _rotated(arrays, RopeConfig("rope", base=100.0), "pos2"),
        "mixed2d": _rotated(arrays, RopeConfig("rope_mixed"), "pos2", arrays["in/freqs2"]),
        "mixed3d": _rotated(arrays, RopeConfig("rope_3d_mixed"), "pos3", arrays["in/freqs3"]),
        "axial3d_frac0.25": _rotated(arrays, RopeConfig("rope_3d"), "pos3"),
    }
    # The spatial base of this one is not recorded; 1000 is the only round number that fits.
    half_temporal = RopeConfig("rope_3d", base=1e3, temporal_base=50.0, temporal_dim_frac=0.5)
    actual["axial3d_frac0.5_tb50"] = _rotated(arrays, half_temporal, "pos3")
    actual["sincos2d_res2.5_h3_w5"] = _sincos_2d(expected["sincos2d_res2.5_h3_w5"].shape)
    for name, value in actual.items():
        checks.array(name, value, expected[name])
    _check_initial_frequencies(checks, expected)


def _sincos_2d(shape: tuple[int, ...]) -> jax.Array:
    """The 2-D part of the encodings of a 3 x 5 grid at scale 2.5, the same for every sample."""
    row, col = jnp.meshgrid(jnp.arange(3), jnp.arange(5), indexing="ij")
    half = shape[-1] // 2
    parts = [sincos(2.5 * col.reshape(-1), half), sincos(2.5 * row.reshape(-1), half)]
    return jnp.broadcast_to(jnp.concatenate(parts, axis=-1), shape)


def _check_initial_frequencies(checks: Checks, expected: Arrays) -> None:
    """Magnitudes along fixed directions, and the norms of randomly directed ones."""
    rng = np.random.Generator(np.random.Philox(0))
    for axes, base in ((3, 10000.0), (2, 10.0)):
        reference = expected[f"mixed{axes}d_init_norotate_base{int(base)}"]
        heads, half = reference.shape[1:]
        magnitude = rope.mixed_magnitudes(2 * half, base)
        plain = np.zeros(reference.shape)
        plain[0, :, : half // 2] = magnitude
        plain[1, :, half // 2 :] = magnitude
        checks.array(f"magnitudes {axes}d", plain, reference)
        drawn = rope.mixed_frequencies(rng, axes, heads, 2 * half, base)
        norm = np.linalg.norm(drawn, axis=0)
        checks.array(f"norms {axes}d", norm, np.linalg.norm(reference, axis=0))
        crossed = (drawn[..., : half // 2] * drawn[..., half // 2 :]).sum(0)
        checks.array(f"orthogonal {axes}d", crossed, np.zeros_like(crossed))
    checks.array(
        "mixed3d_init_norm",
        np.linalg.norm(
            rope.mixed_frequencies(rng, 3, *_heads_and_width(expected["mixed3d_init_norm"]), 1e4),
            axis=0,
        ),
        expected["mixed3d_init_norm"],
    )


def _heads_and_width(norms: np.ndarray) -> tuple[int, int]:
    return norms.shape[0], 2 * norms.shape[1]


def _embed_values(state: Arrays, linear: bool) -> dict[tuple[str, ...], np.ndarray]:
    """Parameters of a PatchEmbed from recorded tensors."""
    out = {}
    for key, value in state.items():
        stem, leaf = key.rsplit(".", 1)
        part, _, index = stem.partition(".")
        path: tuple[str, ...] = (part,)
        if index:
            path = (part, str(int(index) // 2))
        if leaf == "weight" and part == "proj" and not linear:
            value = value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        elif leaf == "weight":
            value = value.T
        out[(*path, "kernel" if leaf == "weight" else "bias")] = value
    return out


@functools.partial(nnx.jit, static_argnums=(2, 3))
def _embed(module: PatchEmbed, frames: jax.Array, pixels: int, base: int) -> jax.Array:
    return module.project(to_patches(frames, pixels, base))


def _flexi_patch_embed(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    for variant in case["variants"]:
        name = variant["name"]
        factor = modalities.get(variant["modality"]).image_factor
        base = variant["base_patch_size_at_16"] * factor
        values = _embed_values(_under(arrays, f"params/{name}/"), variant["use_linear_patch_embed"])
        module = _with_values(
            lambda variant=variant, base=base: PatchEmbed(
                base,
                variant["in_chans"],
                variant["embedding_size"],
                variant.get("patch_embed_hidden_sizes") or (),
                variant.get("post_proj_hidden_sizes") or (),
            ),
            values,
        )
        for size in variant["patch_sizes"]:
            x = jnp.asarray(arrays[f"in/{name}/ps{size}"])
            frames = x if variant["has_time"] else x[:, :, :, None]
            out = _embed(module, frames, size * factor, base)
            out = out if variant["has_time"] else out[:, :, :, 0]
            checks.array(f"{name}/ps{size}", out, arrays[f"out/{name}/ps{size}"])
    _check_resize(checks, arrays)


def _check_resize(checks: Checks, arrays: Arrays) -> None:
    """The resize alone, recorded for inputs of the first variant (base patch size 8)."""
    for key, expected in _under(arrays, "out/resize/").items():
        size = int(key.removeprefix("ps"))
        x = arrays[f"in/resize/{key}"] if f"in/resize/{key}" in arrays else arrays[f"in/conv/{key}"]
        if x.ndim == 5:
            got = jnp.moveaxis(resize(jnp.moveaxis(jnp.asarray(x), 3, 1), size, 8), 1, 3)
        else:
            got = resize(jnp.asarray(x), size, 8)
        checks.array(f"resize/{key}", got, expected)


def _flexi_patch_reconstruction(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    for variant in case["variants"]:
        name, base = variant["name"], variant["max_patch_size"]
        weight = arrays[f"params/{name}/proj.weight"]
        width, channels = weight.shape[:2]
        values = {
            ("kernel",): weight.transpose(0, 2, 3, 1).reshape(width, -1),
            ("bias",): arrays[f"params/{name}/proj.bias"],
        }
        module = _with_values(
            lambda width=width, channels=channels, base=base: PatchReconstruction(
                width, channels, base
            ),
            values,
        )
        tokens = jnp.asarray(arrays[f"in/{name}"])
        tokens = tokens if variant["has_time"] else tokens[:, :, :, None]
        for size in variant["patch_sizes"]:
            patches = module(tokens, size)
            batch, rows, cols, steps = patches.shape[:4]
            pixels = patches.transpose(0, 1, 4, 2, 5, 3, 6)
            pixels = pixels.reshape(batch, rows * size, cols * size, steps, channels)
            pixels = pixels if variant["has_time"] else pixels[:, :, :, 0]
            checks.array(f"{name}/ps{size}", pixels, arrays[f"out/{name}/ps{size}"])


def _block(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    x, y = (jnp.asarray(arrays[f"in/{k}"]) for k in ("x", "y"))
    for variant in case["variants"]:
        name = variant["name"]
        mode = variant.get("position_encoding", "none")
        config = RopeConfig(mode) if mode in rope.ROPE_MODES else None
        width, heads = case["dim"], case["num_heads"]

        def make(variant=variant, config=config, width=width, heads=heads) -> Block:
            shape = BlockShape(
                width,
                heads,
                variant["mlp_ratio"],
                variant.get("qk_norm", False),
                config,
                variant.get("init_values") is not None,
            )
            return Block(shape)

        state = _under(arrays, f"params/{name}/")
        values = {}
        for path, _ in latent_mim.flatten(latent_mim.split(nnx.eval_shape(make))[1]):
            value = state.pop(torch_keys.block_key(path))
            values[path] = value.T if path[-1] == "kernel" else value
        checks.equal(f"{name} unused tensors", sorted(state), [])
        block = _with_values(make, values)
        cross = variant["cross"]
        places = [jnp.asarray(arrays[f"in/pos_{k}"]) if config else None for k in ("x", "y")]
        key_mask = jnp.asarray(arrays["in/y_mask" if cross else "in/x_mask"]) == 1
        for what, mask in (("masked", key_mask), ("nomask", None)):
            attend = uniform_batch.attend_masked(mask)
            if cross:
                out = block(x, Reading(attend, places[0], y, places[1]))
            else:
                out = block(x, Reading(attend, places[0]))
            checks.array(f"{name}/{what}", out, arrays[f"out/{name}/{what}"])


def check_pooled(checks: Checks, tokens: Any, masks: Any, expected: Arrays) -> None:
    """Holds every recorded pooling to ours; names as 'spatial_mean', 'max', ..."""
    for name, reference in expected.items():
        if name.endswith("spatial_concat"):
            got = pooling.pool_spatial_concat(tokens, masks)
        else:
            how = "max" if name.endswith("max") else "mean"
            pool = pooling.pool_spatial if "spatial" in name else pooling.pool_instance
            got = pool(tokens, masks, how)
        checks.array(f"pooled {name}", got, reference)


def _pooling(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    names = case["modalities"]
    tokens = {name: arrays[f"in/{name}"] for name in names}
    for group in ("", "2"):
        masks = {name: arrays[f"in{group}/{name}_mask"] for name in names}
        check_pooled(checks, tokens, masks, _under(arrays, f"out{group}/"))


KINDS = {
    "composite_encodings": _composite_encodings,
    "rope_positions": _rope_positions,
    "encoding_ops": _encoding_ops,
    "flexi_patch_embed": _flexi_patch_embed,
    "flexi_patch_reconstruction": _flexi_patch_reconstruction,
    "block": _block,
    "pooling": _pooling,
}
