"""Goldens of v1.3: pooler, location grids, decoder on the grid, searchlight, missing bands."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoearth_jax import modalities
from olmoearth_jax.inference import domain, prepare
from olmoearth_jax.inference.model import PretrainedModel
from olmoearth_jax.interop import checkpoints, config_json, torch_keys
from olmoearth_jax.masks import DECODE
from olmoearth_jax.model import config as model_config
from olmoearth_jax.model import latent_mim, searchlight, uniform_batch
from olmoearth_jax.model.config import AttentionPoolerConfig, EncoderConfig
from olmoearth_jax.model.pooler import AttentionPooler, GridSpec, LocationGrid
from olmoearth_jax.model.reference_counts import reference_counts
from olmoearth_jax.model.uniform_batch import UniformBatch

from . import releases
from .common import Case, Checks, Result, load_json, load_npz, skipped
from .model import (
    ATOL,
    GRAD_TOLERANCE,
    GRAD_TOLERANCE_ROPE,
    RTOL,
    Arrays,
    check_tokens,
    load_model,
    split_inputs,
    under,
)
from .unet_head import unet_head

SEARCHLIGHT_ATOL = 5e-5


def cases(folder: Path) -> Iterator[Case]:
    """All cases of a v1.3 golden folder.

    Raises:
      ValueError: malformed folder.
    """
    for name, case in load_json(folder / "manifest.json")["cases"].items():
        run = _KINDS.get(case["kind"])
        if run is None:
            yield skipped(name, f"no check for cases of kind {case['kind']!r}")
            continue
        yield Case(name, functools.partial(_run, run, folder / case["file"], case))
        if any(key.startswith("out_eval/") for key in case["arrays"]):
            yield skipped(
                f"{name}/out_eval",
                "documented difference: the reference attends to padding in eval mode",
            )
    for release in sorted(p for p in folder.glob("release_*") if p.is_dir()):
        yield releases.release_case(release, _release, RTOL, ATOL)
    for file, run in (("official_config.json", _config), ("param_shapes.json", _shapes)):
        if (folder / file).exists():
            yield Case(file.removesuffix(".json"), functools.partial(run, folder / file))


def _run(run: Any, path: Path, case: dict[str, Any]) -> Result:
    checks = Checks(RTOL, SEARCHLIGHT_ATOL if case["kind"] == "searchlight" else ATOL)
    run(checks, case, load_npz(path))
    return checks.result()


def _check_grid(checks: Checks, what: str, grid: LocationGrid | None, expected: Arrays) -> None:
    """Holds a location grid to the recorded arrays that are of it."""
    if grid is None:
        checks.true(f"{what}: no grid recorded", "location_tokens" not in expected)
        return
    for key, value in (
        ("location_tokens", grid.tokens),
        ("location_query_positions", grid.positions),
        ("student_location_tokens", grid.student),
    ):
        if key in expected:
            checks.array(f"{what}{key}", value, expected[key])
        else:
            checks.true(f"{what}{key} is not recorded", value is None or key not in expected)


def _latent_mim(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    config = config_json.from_json(case["model_config"])
    patch_size, res = case["patch_size"], case["input_res"]
    graph, params, target_graph, target = load_model(config, under(arrays, "params/"))
    slots = latent_mim.slot_table(config.encoder_config)
    inputs = split_inputs(under(arrays, "in/"), slots, patch_size)
    masks = inputs[1]

    @functools.partial(jax.jit, static_argnums=4)
    def forward(params, data, masks, timestamps, size):
        model = latent_mim.merge(graph, params)
        batch = UniformBatch(data, masks, timestamps, patch_size, res, size)
        out = uniform_batch.forward_batch(model, batch)
        return out.encoder, out.decoder, out.project_aggregated, out.locations

    for size in (None, *case["location_query_patch_sizes"]):
        prefix = "out/" if size is None else f"out/s{size}/"
        encoded, decoded, pooled, grid = forward(params, *inputs, size)
        expected = under(arrays, prefix)
        check_tokens(checks, "encoder", encoded, masks, under(arrays, "out/encoder/"))
        decoder = "out/decoder/" if size is None else f"out/decoder_s{size}/"
        if recorded := under(arrays, decoder):
            check_tokens(checks, "decoder", decoded, masks, recorded)
        checks.array("project_aggregated", pooled, expected["project_aggregated"])
        _check_grid(checks, prefix, grid, expected)

    targets = uniform_batch.target_batch(
        latent_mim.merge(target_graph, target), UniformBatch(*inputs, patch_size, res),
        dict.fromkeys(slots.names, 0),
    )  # fmt: skip
    seen = {k: np.where(np.asarray(m) == 3, 3, 0) for k, m in masks.items()}
    check_tokens(checks, "target", targets, seen, under(arrays, "out/target/"))
    if "out/loss" in arrays:
        _check_gradients(checks, config, graph, params, inputs, case, arrays)


def _check_gradients(
    checks: Checks, config: Any, graph: Any, params: Any, inputs: Any, case: Any, arrays: Arrays
) -> None:
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, data, masks, timestamps):
        model = latent_mim.merge(graph, params)
        batch = UniformBatch(data, masks, timestamps, case["patch_size"], case["input_res"])
        out = uniform_batch.forward_batch(model, batch)
        assert out.decoder is not None and out.locations is not None
        assert out.project_aggregated is not None and out.locations.student is not None
        decoded = sum(
            jnp.sum(jnp.where((masks[k] == DECODE)[..., None], x, 0.0) ** 2)
            for k, x in out.decoder.items()
        )
        parts = jnp.stack(
            [decoded, jnp.sum(out.locations.student**3), jnp.sum(out.project_aggregated**2)]
        )
        return parts.sum(), parts

    (value, parts), grads = loss(params, *inputs)
    checks.array("loss", value, arrays["out/loss"], rtol=1e-4)
    checks.array("loss parts", parts, arrays["out/loss_parts"], rtol=1e-4, atol=1e-3)
    flat = dict(latent_mim.flatten(grads))
    by_key = {e.key: e.to_torch(flat[e.path]) for e in torch_keys.model_entries(config)}
    for key, expected in under(arrays, "out/grad/").items():
        rope = key.endswith("rope_mixed_freqs")
        limit = (GRAD_TOLERANCE_ROPE if rope else GRAD_TOLERANCE) * float(np.abs(expected).max())
        checks.array(f"grad {key}", by_key[key], expected, rtol=0.0, atol=limit)


def _encoder(case: dict[str, Any], arrays: Arrays) -> tuple[Any, Any]:
    """(encoder module, slots) of a case that records an encoder alone."""
    doc = {"_CLASS_": "MAEConfig", "encoder_config": case["model_config"]}
    config = config_json.from_json(doc)
    state = {f"encoder.{k}": v for k, v in under(arrays, "params/").items()}
    graph, params, _, _ = load_model(config, state)
    return latent_mim.merge(graph, params).encoder, latent_mim.slot_table(config.encoder_config)


def _fast_pass(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    encoder, slots = _encoder(case, arrays)
    patch_size = case["patch_size"]
    data, masks, timestamps = split_inputs(under(arrays, "in/"), slots, patch_size)

    def run(names: Any, size: int | None) -> uniform_batch.Encoded:
        batch = UniformBatch(
            {n: data[n] for n in names}, {n: masks[n] for n in names}, timestamps, patch_size,
            location_size=size,
        )  # fmt: skip
        return uniform_batch.encode_batch(encoder, batch, fast_pass=True)

    out = run(data, None)
    check_tokens(checks, "encoder", out.tokens, masks, under(arrays, "out/encoder/"))
    checks.true("fast_pass pools nothing", out.project_aggregated is None)
    _check_grid(checks, "", out.locations, under(arrays, "out/"))
    assert out.locations is not None and out.locations.student is not None
    for width in (16, 8):
        short = out.locations.student[..., :width]
        checks.array(f"embedding_{width}", short, arrays[f"out/embedding_{width}"])
    _check_grid(checks, "s1/", run(data, 1).locations, under(arrays, "out/s1/"))
    restricted = run(case["restricted_to"], None).locations
    _check_grid(checks, "restricted/", restricted, under(arrays, "out/restricted/"))


def _pooler(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    members = {f.name for f in dataclasses.fields(AttentionPoolerConfig)}
    for variant in case["variants"]:
        number, patch_size = variant["index"], variant["patch_size"]
        config = EncoderConfig(
            embedding_size=variant["encoder_embedding_size"],
            mlp_ratio=variant["mlp_ratio"],
            position_encoding="rope",
            qk_norm=variant.get("qk_norm", False),
            rope_base=variant.get("rope_base", 10000.0),
            attention_pooler_config=AttentionPoolerConfig(
                **{k: v for k, v in variant.items() if k in members}
            ),
        )
        graph, shapes = latent_mim.split(nnx.eval_shape(lambda c=config: AttentionPooler(c)))
        state = under(arrays, f"params/{number}/")
        values = {}
        for path, _ in latent_mim.flatten(shapes):
            value = state.pop(torch_keys.block_key(path))
            values[path] = value.T if path[-1] == "kernel" else value
        checks.equal(f"{number}: unused tensors", sorted(state), [])
        pooler = latent_mim.merge(graph, latent_mim.unflatten(values))
        fields = under(arrays, f"in/{number}/")
        size = variant["location_query_patch_size"] or patch_size
        rows, cols = variant["patch_grid"]
        grid = GridSpec(rows, cols, patch_size // size, variant["gsd_ratio"])
        for what, mask in (("masked", jnp.asarray(fields["visible"]) == 1), ("nomask", None)):
            out = pooler.pool(
                jnp.asarray(fields["tokens"]), jnp.asarray(fields["positions"]), grid,
                uniform_batch.attend_masked(mask), uniform_batch.attend_masked(None),
            )  # fmt: skip
            _check_grid(checks, f"{number}/", out, under(arrays, f"out/{number}/{what}/"))
        expected = arrays[f"out/{number}/location_query_positions"]
        checks.array(f"{number}/positions", grid.positions(1.0)[None], expected)


def _searchlight(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    encoder, slots = _encoder(case, arrays)
    patch_size, window = case["patch_size"], case["neighborhood_attention_size_px"]
    data, masks, timestamps = split_inputs(under(arrays, "in/"), slots, patch_size)
    for what, size in (("searchlight", None), ("searchlight_s1", 1)):
        expected = under(arrays, f"out/{what}/")
        if not expected:
            continue
        batch = UniformBatch(data, masks, timestamps, patch_size, location_size=size)
        out = searchlight.encode_searchlight(encoder, batch, window)
        _check_grid(checks, what, out.locations, expected)
        checks.array(what, out.project_aggregated, expected["project_aggregated"])
        if recorded := under(expected, "encoder/"):
            check_tokens(checks, what, out.tokens, masks, recorded)
    whole = UniformBatch(data, masks, timestamps, patch_size)
    stock = uniform_batch.encode_batch(encoder, whole)
    _check_grid(checks, "stock", stock.locations, under(arrays, "out/stock/"))
    checks.array("stock", stock.project_aggregated, arrays["out/stock/project_aggregated"])
    for entry in case["embed_domain"]:
        ready = prepare.ModelInput(data, {k: np.asarray(v) for k, v in masks.items()}, timestamps)
        plan = domain.DomainPlan(
            patch_size, entry["crop_px"], entry["overlap_px"], window,
            entry["location_query_patch_size"],
        )  # fmt: skip
        got = domain.embed_domain(encoder, ready, plan)
        checks.array(entry["key"], got, arrays[entry["key"]])


def _missing_bands(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    for variant in case["variants"]:
        name, what = variant["modality"], variant["name"]
        statistics = modalities.get(name).computed
        assert statistics is not None
        mean, std = (np.asarray(v, np.float64) for v in statistics)
        spread = variant["std_multiplier"] * std
        for version, count in variant["number_of_warnings"].items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                ends = mean - spread, mean + spread
                got, _ = prepare.fill(arrays[f"in/{what}"], name, version, ends)
            checks.array(f"{what}/{version}", got, arrays[f"out/{what}/{version}"])
            checks.equal(f"{what}/{version} warnings", len(caught), count)


def _unet(checks: Checks, case: dict[str, Any], arrays: Arrays) -> None:
    for variant in case["variants"]:
        number = variant["index"]
        got = unet_head(
            under(arrays, f"params/{number}/"), jnp.asarray(arrays[f"in/{number}"]),
            variant["patch_size"], variant["conv_layers_per_resolution"],
        )  # fmt: skip
        checks.array(str(number), got, arrays[f"out/{number}"])


def _release(checks: Checks, loaded: checkpoints.Weights, arrays: Arrays) -> None:
    model = PretrainedModel(loaded, dtype=jnp.float32)
    patch_size = int(arrays["patch_size"])
    data, masks, timestamps = split_inputs(under(arrays, "in/"), model.slots, patch_size)
    checks.equal("decode-only", model.decode_only, ("worldcover",))
    data = {name: data[name] for name in data if name in model.modalities}
    out = uniform_batch.encode_batch(
        latent_mim.merge(model.graph, model.params),
        UniformBatch(data, masks, timestamps, patch_size),
        fast_pass=True,
    )
    check_tokens(checks, "encoder", out.tokens, masks, under(arrays, "out/encoder/"))
    _check_grid(checks, "", out.locations, under(arrays, "out/"))


def _config(path: Path) -> Result:
    checks = Checks()
    for name, doc in load_json(path).items():
        config = config_json.from_json(doc)
        version, size = name.split("-")
        checks.equal("config", config, model_config.official_model(size, version))
        checks.equal("written config", config_json.to_json(config)["model"], doc)
    return checks.result()


def _shapes(path: Path) -> Result:
    checks = Checks()
    for name, shapes in load_json(path).items():
        version, size = name.split("-")
        config = model_config.official_model(size, version)
        ours = {k: list(v) for k, v in torch_keys.state_dict_shapes(config).items()}
        for key in sorted(set(ours) | set(shapes)):
            checks.equal(key, ours.get(key), shapes.get(key))
        checks.equal("keys", reference_counts(config)["keys"], len(shapes))
    return checks.result()


_KINDS = {
    "latent_mim_v1_3": _latent_mim,
    "encoder_fast_pass_v1_3": _fast_pass,
    "attention_pooler": _pooler,
    "searchlight": _searchlight,
    "missing_band_normalization": _missing_bands,
    "unet_head": _unet,
}
