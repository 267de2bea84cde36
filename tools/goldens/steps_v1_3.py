"""Recorded micro-batches and trajectories of v1.3 training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.interop.torch_keys import from_state_dict, model_entries
from olmoearth_jax.masks import DECODE
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.uniform_batch import UniformBatch, forward_batch, target_batch

from . import trajectories
from .common import Case, Checks, Result, load_json, load_npz
from .dense_engine import DenseEngine
from .model import under

VALUE = {"rtol": 1e-4, "atol": 1e-6}
NORM = {"rtol": 1e-3, "atol": 1e-6}
PARTS = {"base": "base", "supervision": "supervision", "distillation": "projection"}
"""Recorded names of the terms -> ours."""


def cases(folder: Path) -> Iterator[Case]:
    """Micro-batches and trajectories, under both engines."""
    files = {f["name"]: f for f in load_json(folder / "manifest.json")["files"]}
    for name, file in files.items():
        if name.startswith("forward_"):
            entry = files[file["trajectory"]]
            yield Case(name, lambda file=file, entry=entry: _forward(folder, file, entry, "dense"))
            yield Case(
                f"{name}/stream",
                lambda file=file, entry=entry: _forward(folder, file, entry, "stream"),
            )
    yield from trajectories.cases(folder)


def _forward(folder: Path, file: dict[str, Any], entry: dict[str, Any], kind: str) -> Result:
    """One micro-batch: terms, the gradient of each, and under the dense engine the outputs."""
    checks, arrays = Checks(atol=1e-4), load_npz(folder / file["file"])
    recorded = load_npz(folder / file["params_from"])
    model = trajectories.model_of(entry)
    program = trajectories.program_of(entry, model, kind)
    params, target, _ = from_state_dict(under(recorded, "params/"), model)
    engine = program.engine
    assert target is not None
    params, target = jax.tree.map(jnp.asarray, (params, target))
    group = trajectories.groups_of(recorded, entry, 0)[0]
    if isinstance(engine, DenseEngine):
        _check_outputs(checks, engine, params, target, group, arrays)
    prepared = engine.prepare([group])[0]
    inputs = prepared.inputs  # packed here, outside of any trace

    @jax.jit
    def run(params: Any) -> Any:
        def terms(params: Any) -> tuple[jax.Array, Any]:
            total, aux = engine.loss(params, target, inputs, jax.random.key(0), prepared.key)
            grid = {k: v for k, v in aux.items() if "/" in k}
            weights = {t.name: t.weight for t in engine.objective.supervision.tasks}  # pyright: ignore
            parts = [
                aux["base"].sum(),
                sum(w * grid[f"supervision/{n}"].sum() for n, w in weights.items()),
                sum(v.sum() for k, v in grid.items() if k.startswith("projection/")),
                total,
            ]
            return jnp.stack(parts), grid

        values, grid = terms(params)
        return values, grid, jax.jacrev(lambda p: terms(p)[0])(params)

    values, grid, grads = run(params)
    names = [*PARTS, "total"]
    for name, value in zip(names, values, strict=True):
        checks.array(name, value, np.float32(file["parts"][name]), **VALUE)
    for name, expected in file["supervision_losses"].items():
        checks.array(name, grid[f"supervision/{name}"][0], np.float32(expected), **VALUE)
    for name, expected in file["distillation"].items():
        checks.array(name, grid[name][0], np.float32(expected), **VALUE)
    flat = dict(latent_mim.flatten(grads))
    _check_gradients(checks, model, file, flat, arrays)
    every = np.sqrt(sum(float(np.sum(np.square(g[-1]))) for g in flat.values()))
    checks.array("gradient norm", every, file["total_grad_norm"], **NORM)
    return checks.result("outputs 1e-4, terms 1e-4 |ref|, norms 1e-3 |ref|, zeros exact")


def _check_gradients(checks: Checks, model: Any, file: Any, flat: Any, arrays: Any) -> None:
    """The norm of each part's gradient of each parameter, and some gradients whole."""
    names = [*PARTS, "total"]
    for item in model_entries(model):
        by_part = dict(zip(names, flat[item.path], strict=True))
        for part in PARTS:
            got = float(np.linalg.norm(by_part[part]))
            expected = file["grad_norms"][part].get(item.key)
            what = f"{part} gradient of {item.key}"
            if not expected:
                checks.true(f"{what} is not zero", got == 0)
            elif not item.key.endswith(".attn.k.bias"):
                checks.array(what, got, expected, **NORM)
        whole = arrays.get(f"out/grad/{item.key}")
        if whole is not None:
            limit = max(1e-4 * float(np.abs(whole).max()), 2e-6)
            if "rope_mixed_freqs" in item.key:
                limit *= 10
            got = item.to_torch(by_part["total"])
            checks.array(f"gradient of {item.key}", got, whole, rtol=0.0, atol=limit)


def _check_outputs(
    checks: Checks, engine: DenseEngine, params: Any, target: Any, group: dict, arrays: Any
) -> None:
    """Grid, student, predictions, targets and maps."""
    batch = UniformBatch(
        group["data"], group["mask_a"], group["timestamps"], int(group["patch_size"])
    )

    @jax.jit
    def run(params: Any) -> Any:
        model = latent_mim.merge(engine.graph, params)
        out = forward_batch(model, batch)
        frozen = latent_mim.merge(engine.target_graph, target)
        targets = target_batch(frozen, batch, dict.fromkeys(engine.names, 0))
        assert out.locations is not None
        sizes = {n: x.shape[1:3] for n, x in group["data"].items()}
        return out.locations, out.decoder, targets, model.supervision_head(
            out.locations.tokens, sizes
        )  # fmt: skip

    grid, decoded, targets, maps = run(params)
    for key, value in (
        ("location_tokens", grid.tokens),
        ("student_location_tokens", grid.student),
        ("location_query_positions", grid.positions),
    ):
        checks.array(key, value, arrays[f"out/{key}"])
    for name in modalities.in_sample_order(engine.names):
        mask = arrays[f"out/mask/{name}"]
        checks.array(f"mask of {name}", group["mask_a"][name], mask)
        keep = mask == DECODE
        expected = arrays[f"out/decoder/{name}"][keep]
        checks.array(f"predictions of {name}", np.asarray(decoded[name])[keep], expected)
        seen = mask != 3
        checks.array(
            f"targets of {name}", np.asarray(targets[name])[seen],
            arrays[f"out/target/{name}"][seen], rtol=1e-6,
        )  # fmt: skip
    for name, expected in under(arrays, "out/supervision/").items():
        checks.array(f"map of {name}", maps[name], expected)
