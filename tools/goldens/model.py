"""Goldens of the model: whole models, encoders, releases, parameter shapes and initial values.

Operations and single modules are in `model_parts`. Tolerances are those of spec section 17.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.interop import checkpoints, config_json, torch_keys
from olmoearth_jax.masks import DECODE
from olmoearth_jax.model import config as model_config
from olmoearth_jax.model import latent_mim, uniform_batch
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.reference_counts import reference_counts
from olmoearth_jax.model.uniform_batch import UniformBatch

from . import model_parts, releases
from .common import Case, Checks, Result, load_json, load_npz, skipped

RTOL, ATOL = 1e-4, 2e-5
GRAD_TOLERANCE, GRAD_TOLERANCE_ROPE = 1e-4, 1e-3

Arrays = dict[str, np.ndarray]


def cases(folder: Path) -> Iterator[Case]:
    """All cases of a model golden folder.

    Raises:
      ValueError: malformed folder.
    """
    manifest = load_json(folder / "manifest.json")
    for name, case in manifest["cases"].items():
        kind = case["kind"]
        run = _KINDS.get(kind) or model_parts.KINDS.get(kind)
        if run is None:
            yield skipped(name, f"no check for cases of kind {kind!r}")
            continue
        yield Case(name, functools.partial(_run, run, folder / case["file"], case))
        if any(key.startswith("out_eval/") for key in case.get("arrays", ())):
            yield skipped(
                f"{name}/out_eval",
                "documented difference: the reference attends to padding in eval mode",
            )
    for release in sorted(p for p in folder.glob("release_*") if p.is_dir()):
        yield releases.release_case(release, _release, RTOL, ATOL)
    for file, maker in _FILES.items():
        if (folder / file).exists():
            yield from maker(folder / file)


def _run(run: Any, path: Path, case: dict[str, Any]) -> Result:
    checks = Checks(RTOL, ATOL)
    run(checks, case, load_npz(path))
    return checks.result()


def under(arrays: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    """The arrays below a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


def split_inputs(arrays: Arrays, slots: Any, patch_size: int) -> tuple[Arrays, Any, np.ndarray]:
    """(rasters, token masks, timestamps) of the arrays below 'in/'."""
    data = {k: v for k, v in arrays.items() if k in slots.names}
    pixels = {k: arrays[f"{k}_mask"] for k in data}
    masks = uniform_batch.token_masks_from_pixels(slots, pixels, patch_size)
    return data, masks, arrays["timestamps"]


def load_model(config: ModelConfig, state: Arrays) -> tuple[Any, Any, Any, Any]:
    """(graphdef, params, target graphdef, target params) from recorded tensors.

    A target that was not recorded is a copy of the encoder.
    """
    full = not config.projection_only_target
    if config.kind != "mae":
        shapes = torch_keys.state_dict_shapes(config)
        for key in shapes:
            if key.startswith("target_encoder.") and key not in state:
                state = {**state, key: state[key.replace("target_encoder.", "encoder.", 1)]}
    params, target, _ = torch_keys.from_state_dict(state, config, config.kind != "mae" and full)
    target_graph = None
    if target is not None:
        target_graph = latent_mim.target_graph(config, full)[0]
    return latent_mim.graph(config)[0], params, target_graph, target


def check_tokens(checks: Checks, what: str, got: Any, masks: Any, expected: Arrays) -> None:
    """Holds {modality: tokens} and their masks to the recorded ones."""
    names = {k for k in expected if not k.endswith("_mask")}
    checks.equal(f"{what} modalities", sorted(got), sorted(names))
    for name in sorted(names & set(got)):
        reference = expected[name]
        largest = float(np.max(np.abs(reference), initial=0.0))
        # Only embedded fill values are that large; they are compared to the largest.
        atol = 1e-4 * largest if largest > 100.0 else ATOL
        checks.array(f"{what}/{name}", got[name], reference, atol=atol)
        if f"{name}_mask" in expected:
            checks.array(f"{what}/{name}_mask", masks[name], expected[f"{name}_mask"], 0.0, 0.0)


def _forward(graph: Any, params: Any, inputs: Any, patch_size: int, res: float, view: int = 0):
    @jax.jit
    def call(params, data, masks, timestamps):
        model = latent_mim.merge(graph, params)
        batch = UniformBatch(data, masks, timestamps, patch_size, res)
        out = uniform_batch.forward_batch(model, batch, view)
        return out.encoder, out.decoder, out.reconstructed, out.project_aggregated

    return call(params, *inputs)


def _check_forward(checks: Checks, prefix: str, out: Any, masks: Any, arrays: Arrays) -> None:
    encoded, decoded, _, pooled = out
    check_tokens(checks, "encoder", encoded, masks, under(arrays, f"{prefix}encoder/"))
    if decoded is not None:
        check_tokens(checks, "decoder", decoded, masks, under(arrays, f"{prefix}decoder/"))
    if f"{prefix}project_aggregated" in arrays:
        checks.array("project_aggregated", pooled, arrays[f"{prefix}project_aggregated"])


def _latent_mim(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    config = config_json.from_json(case["model_config"])
    patch_size, res = case["patch_size"], case.get("input_res", 10)
    graph, params, target_graph, target = load_model(config, under(arrays, "params/"))
    slots = latent_mim.slot_table(config.encoder_config)
    inputs = split_inputs(under(arrays, "in/"), slots, patch_size)
    masks = inputs[1]
    _check_forward(checks, "out/", _forward(graph, params, inputs, patch_size, res), masks, arrays)

    @jax.jit
    def targets(target, data, masks, timestamps):
        batch = UniformBatch(data, masks, timestamps, patch_size, res)
        encoder = latent_mim.merge(target_graph, target)
        return uniform_batch.target_batch(encoder, batch, case["target_token_exit_cfg"])

    seen = {k: np.where(np.asarray(m) == 3, 3, 0) for k, m in masks.items()}
    check_tokens(checks, "target", targets(target, *inputs), seen, under(arrays, "out/target/"))
    if "out/loss" in arrays:
        _check_gradients(checks, config, graph, params, inputs, case, arrays)


def _check_gradients(
    checks: Checks, config: Any, graph: Any, params: Any, inputs: Any, case: Any, arrays: Arrays
) -> None:
    @jax.jit
    @jax.value_and_grad
    def loss(params, data, masks, timestamps):
        model = latent_mim.merge(graph, params)
        batch = UniformBatch(data, masks, timestamps, case["patch_size"], case.get("input_res", 10))
        out = uniform_batch.forward_batch(model, batch)
        assert out.decoder is not None
        return sum(
            jnp.sum(jnp.where((masks[k] == DECODE)[..., None], x, 0.0) ** 2)
            for k, x in out.decoder.items()
        )

    value, grads = loss(params, *inputs)
    checks.array("loss", value, arrays["out/loss"], rtol=1e-4)
    flat = dict(latent_mim.flatten(grads))
    by_key = {e.key: e.to_torch(flat[e.path]) for e in torch_keys.model_entries(config)}
    for key, expected in under(arrays, "out/grad/").items():
        rope = key.endswith("rope_mixed_freqs")
        limit = (GRAD_TOLERANCE_ROPE if rope else GRAD_TOLERANCE) * float(np.abs(expected).max())
        checks.array(f"grad {key}", by_key[key], expected, rtol=0.0, atol=limit)


def _mae(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    config = config_json.from_json(case["model_config"])
    patch_size = case["patch_size"]
    graph, params, _, _ = load_model(config, under(arrays, "params/"))
    slots = latent_mim.slot_table(config.encoder_config)
    inputs = split_inputs(under(arrays, "in/"), slots, patch_size)
    out = _forward(graph, params, inputs, patch_size, case.get("input_res", 10))
    _check_forward(checks, "out/", out, inputs[1], arrays)
    pixel_masks = {
        k: np.repeat(np.repeat(np.asarray(m), patch_size, 1), patch_size, 2)
        for k, m in inputs[1].items()
    }
    check_tokens(checks, "reconstructed", out[2], pixel_masks, under(arrays, "out/reconstructed/"))


def _galileo(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    config = config_json.from_json(case["model_config"])
    patch_size = case["patch_size"]
    graph, params, _, _ = load_model(config, under(arrays, "params/"))
    slots = latent_mim.slot_table(config.encoder_config)
    view_a = under(arrays, "in/")
    views = {"a": view_a, "b": {**view_a, **under(arrays, "in/b/")}}
    res = case.get("input_res", 10)
    for number, (view, fields) in enumerate(views.items()):
        inputs = split_inputs(fields, slots, patch_size)
        out = _forward(graph, params, inputs, patch_size, res, number)
        _check_forward(checks, f"out/{view}/", out, inputs[1], arrays)


def _encoder_only(case: dict[str, Any], arrays: Arrays) -> tuple[Any, Any, Any]:
    """(graphdef, params, slots) of a case that records an encoder alone."""
    doc = {"_CLASS_": "MAEConfig", "encoder_config": case["model_config"]}
    config = config_json.from_json(doc)
    state = {f"encoder.{k}": v for k, v in under(arrays, "params/").items()}
    graph, params, _, _ = load_model(config, state)
    return graph, params, latent_mim.slot_table(config.encoder_config)


def _fast_pass(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    graph, params, slots = _encoder_only(case, arrays)
    inputs = split_inputs(under(arrays, "in/"), slots, case["patch_size"])
    tokens = _encode_fast(graph, params, inputs, case["patch_size"])
    masks = inputs[1]
    check_tokens(checks, "encoder", tokens, masks, under(arrays, "out/encoder/"))
    for name, expected in under(arrays, "out/feature_map/").items():
        checks.array(f"feature_map/{name}", jnp.mean(tokens[name], axis=(3, 4)), expected)
    model_parts.check_pooled(checks, tokens, masks, under(arrays, "out/pool_"))


def _encode_fast(graph: Any, params: Any, inputs: Any, patch_size: int) -> dict[str, Any]:
    @jax.jit
    def call(params, data, masks, timestamps):
        encoder = latent_mim.merge(graph, params).encoder
        batch = UniformBatch(data, masks, timestamps, patch_size)
        out = uniform_batch.encode_batch(encoder, batch, fast_pass=True)
        return out.tokens

    return call(params, *inputs)


def _token_exits(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    graph, params, slots = _encoder_only(case, arrays)
    patch_size = case["patch_size"]
    data, masks, timestamps = split_inputs(under(arrays, "in/"), slots, patch_size)
    seen = {k: np.where(np.asarray(m) == 3, 3, 0) for k, m in masks.items()}
    for name, exits in case["exit_cfgs"].items():

        @jax.jit
        def call(params, data, masks, timestamps, exits=exits):
            encoder = latent_mim.merge(graph, params).encoder
            batch = UniformBatch(data, masks, timestamps, patch_size)
            out = uniform_batch.encode_batch(encoder, batch, exits=exits)
            return out.tokens, out.project_aggregated

        tokens, pooled = call(params, data, seen, timestamps)
        expected = under(arrays, f"out/{name}/")
        reference_pooled = expected.pop("project_aggregated")
        check_tokens(checks, name, tokens, seen, expected)
        checks.array(f"{name}/project_aggregated", pooled, reference_pooled)


def _release(checks: Checks, loaded: checkpoints.Weights, arrays: Arrays) -> None:
    patch_size = int(arrays["patch_size"])
    slots = latent_mim.slot_table(loaded.config.encoder_config)
    inputs = split_inputs(under(arrays, "in/"), slots, patch_size)
    graph = latent_mim.graph(loaded.config)[0]
    tokens = _encode_fast(graph, loaded.params, inputs, patch_size)
    check_tokens(checks, "encoder", tokens, inputs[1], under(arrays, "out/encoder/"))


def _configs(path: Path) -> Iterator[Case]:
    for name, doc in load_json(path).items():
        yield Case(f"official_configs/{name}", functools.partial(_config, name, doc))


def preset(name: str) -> ModelConfig:
    """Our official model of a recorded preset name such as 'v1_2-base_faster'."""
    version, size = name.split("-")
    faster = size.endswith("_faster")
    return model_config.official_model(size.removesuffix("_faster"), version, faster=faster)


def _config(name: str, doc: Any) -> Result:
    checks = Checks()
    config = config_json.from_json(doc)
    checks.equal("config", config, preset(name))
    checks.equal("written config", config_json.to_json(config)["model"], doc)
    return checks.result()


def _shapes(path: Path) -> Iterator[Case]:
    for name, shapes in load_json(path).items():
        yield Case(f"param_shapes/{name}", functools.partial(_shape, name, shapes))


def _shape(name: str, expected: dict[str, list[int]]) -> Result:
    checks = Checks()
    config = preset(name)
    ours = {k: list(v) for k, v in torch_keys.state_dict_shapes(config).items()}
    for key in sorted(set(ours) | set(expected)):
        checks.equal(key, ours.get(key), expected.get(key))
    counts = reference_counts(config)
    total = sum(int(np.prod(shape)) for shape in expected.values())
    checks.equal("total", counts["total"], total)
    checks.equal("keys", counts["keys"], len(expected))
    return checks.result()


def _stats(path: Path) -> Iterator[Case]:
    for name, stats in load_json(path)["stats"].items():
        yield Case(f"init_stats/{name}", functools.partial(_init, name, stats))


def _init(name: str, stats: dict[str, dict[str, Any]]) -> Result:
    """Initial values by distribution: constants exactly, others within sampling error."""
    checks = Checks()
    config = preset(name)
    state = torch_keys.to_state_dict(latent_mim.initial_params(config), config)
    # The reference's target is a copy of its encoder, so only the trained parts are recorded.
    state = {k: v for k, v in state.items() if not k.startswith("target_encoder.")}
    checks.equal("tensors", sorted(state), sorted(stats))
    for key, expected in stats.items():
        x = state[key].astype(np.float64)
        frozen = key.endswith("month_embed.weight")
        checks.equal(f"{key} trainable", not frozen, expected["trainable"])
        if frozen or expected["max"] == expected["min"]:
            for stat in ("mean", "min", "max"):
                checks.array(f"{key} {stat}", getattr(x, stat)(), expected[stat], 0.0, 1e-6)
        elif key.endswith("rope_mixed_freqs"):
            # Directions are random, magnitudes are not: neither is the root mean square.
            square = expected["mean"] ** 2 + expected["std"] ** 2
            checks.array(f"{key} mean square", np.mean(x**2), square, rtol=0.01)
        else:
            # Means and standard deviations of both samples scatter by about std / sqrt(n).
            slack = 8.0 * expected["std"] / np.sqrt(x.size)
            checks.array(f"{key} mean", x.mean(), expected["mean"], 0.0, slack)
            checks.array(f"{key} std", x.std(), expected["std"], 0.0, slack)
            bound = max(abs(expected["min"]), abs(expected["max"]))
            checks.array(f"{key} bound", np.abs(x).max(), bound, rtol=20.0 / x.size)
    return checks.result("sampling error")


_KINDS = {
    "latent_mim": _latent_mim,
    "mae": _mae,
    "galileo": _galileo,
    "encoder_fast_pass": _fast_pass,
    "encoder_token_exits": _token_exits,
}
_FILES = {
    "official_configs.json": _configs,
    "param_shapes.json": _shapes,
    "init_stats.json": _stats,
}
