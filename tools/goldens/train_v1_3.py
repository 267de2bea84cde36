"""Goldens of v1.3 training: heads, student, sampler, key names, balanced trials, trajectories.

Layouts and tolerances are those of the folder's ``manifest.json`` (spec/train_v1_3.md section 10).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoearth_jax import supervision_maps
from olmoearth_jax.configlib import official
from olmoearth_jax.interop import spellings, torch_keys
from olmoearth_jax.losses import distillation, supervision
from olmoearth_jax.model import heads, latent_mim, reference_counts
from olmoearth_jax.model.layers import LayerNorm
from olmoearth_jax.supervision_maps import MapTask

from . import balanced, shape_draws, steps_v1_3
from .common import Case, Checks, Result, load_json, load_npz, skipped
from .model import under

Arrays = Mapping[str, np.ndarray]
VALUE = {"rtol": 1e-5, "atol": 1e-6}
GRAD = {"rtol": 1e-4, "atol": 1e-6}


def cases(folder: Path) -> Iterator[Case]:
    """Every entry of every file of the manifest.

    Raises:
      ValueError: malformed folder.
    """
    for file in load_json(folder / "manifest.json")["files"]:
        make = _FILES.get(file["name"])
        if file["name"].startswith(("forward_", "traj_")):
            continue
        if make is None:
            yield skipped(file["name"], "no check is written for this file")
            continue
        yield from make(folder, file)
    yield from steps_v1_3.cases(folder)


def _entries(run: Callable[[dict[str, Any], Arrays], Result]) -> Callable[..., Iterator[Case]]:
    """One case per entry of a file; `run` gets the entry and its arrays."""

    def make(folder: Path, file: dict[str, Any]) -> Iterator[Case]:
        for entry in file["entries"]:
            arrays = functools.partial(load_npz, folder / file["file"])
            yield Case(
                f"{file['name']}/{entry['id']}",
                lambda entry=entry, arrays=arrays: run(entry, under(arrays(), entry["id"] + "/")),
            )

    return make


def _heads(folder: Path, file: dict[str, Any]) -> Iterator[Case]:
    yield from _entries(_head)(folder, file)
    path = folder / file["file"]
    for name in ("worldcover", "cdl"):
        yield Case(f"heads/table/{name}", lambda name=name: _table(load_npz(path), name))


def head_params(arrays: Arrays, tasks: tuple[MapTask, ...]) -> dict[str, dict[str, jax.Array]]:
    """{map: {kernel, bias}} of recorded heads."""
    return {
        t.name: {
            "kernel": jnp.asarray(arrays[f"params/heads.{t.name}.weight"].T),
            "bias": jnp.asarray(arrays[f"params/heads.{t.name}.bias"]),
        }
        for t in tasks
    }


def _head(entry: dict[str, Any], arrays: Arrays) -> Result:
    checks = Checks(**GRAD)
    tasks = tuple(supervision_maps.task_of(n, entry["base_weight"]) for n in entry["modalities"])
    for task in tasks:
        checks.array(f"weight of {task.name}", task.weight, entry["weights"][task.name], 1e-12)
    params = head_params(arrays, tasks)
    grid = jnp.asarray(arrays["in/location_tokens"])
    targets = {k: jnp.asarray(v) for k, v in under(arrays, "target/").items()}
    unfold, size = entry["max_patch_size"], entry["patch_size"]

    def draw(params: Any, grid: jax.Array) -> dict[str, jax.Array]:
        # The reference leaves the map of an absent target at the size of the head.
        sides = {t.name: size if t.name in targets else unfold for t in tasks}
        rows, cols = entry["grid"]
        return {
            t.name: supervision.draw_map(
                grid, params[t.name]["kernel"], params[t.name]["bias"], unfold,
                (rows * sides[t.name], cols * sides[t.name]),
            )
            for t in tasks
        }  # fmt: skip

    judge = supervision.Supervision(tasks)

    def losses(drawn: dict[str, jax.Array]) -> jax.Array:
        metrics = judge(drawn, targets)[1]
        return jnp.stack([metrics[f"supervision/{t.name}"][0] for t in tasks])

    @jax.jit
    def run(params: Any, grid: jax.Array) -> Any:
        drawn = draw(params, grid)
        total, grads = jax.value_and_grad(
            lambda p, g: judge(draw(p, g), targets)[0][0], argnums=(0, 1)
        )(params, grid)
        by_grid = jax.jacrev(lambda g: losses(draw(params, g)))(grid)
        return drawn, losses(drawn), jax.jacrev(losses)(drawn), by_grid, total, grads

    drawn, values, by_pixel, by_grid, total, (params_grad, grid_grad) = run(params, grid)
    for name, expected in under(arrays, "out/pred/").items():
        checks.array(f"map of {name}", drawn[name], expected, 1e-5, 1e-5)
    for i, task in enumerate(tasks):
        name, recorded = task.name, np.float32(entry["losses"][task.name])
        checks.array(f"loss of {name}", values[i], recorded, **VALUE)
        for what, got in (("grad_pred", by_pixel[name][i]), ("grad_grid", by_grid[i])):
            expected = arrays.get(f"out/{what}/{name}")
            if expected is not None:
                checks.array(f"{what} of {name}", got, expected)
            elif not recorded:
                checks.true(f"{what} of {name} is not zero", not np.any(got))
    checks.array("total", total, np.float32(entry["total"]), **VALUE)
    checks.array("gradient of the grid", grid_grad, arrays["out/grad_grid_total"])
    _check_head_gradients(checks, params_grad, entry, arrays)
    return checks.result("losses 1e-6 + 1e-5 |ref|, gradients 1e-6 + 1e-4 |ref|")


def _check_head_gradients(
    checks: Checks, grads: Any, entry: dict[str, Any], arrays: Arrays
) -> None:
    flat = {f"heads.{n}.weight": p["kernel"].T for n, p in grads.items()}
    flat |= {f"heads.{n}.bias": p["bias"] for n, p in grads.items()}
    for key, norm in entry["grad_param_norms"].items():
        checks.array(f"norm of {key}", np.linalg.norm(flat[key]), norm, 1e-4, 1e-6)
    for key, expected in under(arrays, "out/grad_params/").items():
        checks.array(f"gradient of {key}", flat[key], expected)


def _table(arrays: Arrays, name: str) -> Result:
    checks, table = Checks(), under(arrays, f"tables/{name}/")
    task = supervision_maps.task_of(name)
    checks.array("class values", np.asarray(task.class_values, np.float32), table["class_values"])
    values = supervision_maps.data_values(name, range(256))
    checks.array("values of codes", np.asarray(values, np.float32), table["value_of_code"], 1e-6)
    got = np.asarray(
        supervision.class_index(jnp.asarray(table["value_of_code"]), task.class_values)
    )
    sure = table["margin"] > 1e-6
    checks.array("classes of codes", got[sure], table["class_of_code"][sure])
    return checks.result("exact")


_BACK = {"0": "first", "1": "norm", "3": "last"}
"""Our names of the numbered parts of a back-projection."""


def _student(entry: dict[str, Any], arrays: Arrays) -> Result:
    checks = Checks(**GRAD)
    teacher = jnp.asarray(arrays["in/location_tokens"])
    dims, hidden = entry["student_dims"], entry["back_projection_hidden"]
    head_graph, shapes = latent_mim.split(
        nnx.eval_shape(lambda: heads.DistillationHead(dims, hidden, entry["width"]))
    )
    params = {k: jnp.asarray(v) for k, v in under(arrays, "params/").items()}
    judge = distillation.Distillation(tuple(dims), entry["gram_max_tokens"])
    scores = None
    if "in/permutation" in arrays:  # ranks instead of random numbers
        scores = jnp.asarray(np.argsort(arrays["in/permutation"]).astype(np.uint32))

    def student(params: Any, teacher: jax.Array) -> jax.Array:
        z = jax.lax.stop_gradient(teacher) @ params["student.0.weight"].T + params["student.0.bias"]
        if not entry["student_output_norm"]:
            return z
        norm = latent_mim.merge(
            *_with(LayerNorm(z.shape[-1]), params["student.1.weight"], params["student.1.bias"])
        )
        return norm(z)

    def loss(params: Any, teacher: jax.Array, z: jax.Array) -> Any:
        values = {}
        for path, _ in latent_mim.flatten(shapes):
            key = back_key(path)
            values[path] = params[key].T if path[-1] == "kernel" else params[key]
        head = latent_mim.merge(head_graph, latent_mim.unflatten(values))
        return judge(teacher, z, head.by_width, scores=scores)

    @jax.jit
    def run(params: Any, teacher: jax.Array) -> Any:
        z = student(params, teacher)
        by_z = jax.grad(lambda z: loss(params, teacher, z)[0])(z)
        (total, parts), grads = jax.value_and_grad(
            lambda p, t: loss(p, t, student(p, t)), argnums=(0, 1), has_aux=True
        )(params, teacher)
        return z, by_z, total, parts, grads

    z, by_z, total, parts, (by_params, by_teacher) = run(params, teacher)
    checks.array("student", z, arrays["out/student"], 1e-5, 1e-6)
    checks.array("total", total, np.float32(entry["total"]), **VALUE)
    checks.equal("parts", sorted(parts), sorted(entry["parts"]))
    for name, expected in entry["parts"].items():
        checks.array(name, parts[name], np.float32(expected), **VALUE)
    checks.array("gradient of the student", by_z, arrays["out/grad_student"])
    for key, expected in under(arrays, "out/grad_params/").items():
        checks.array(f"gradient of {key}", by_params[key], expected)
    checks.true("the teacher gets a gradient", not np.any(by_teacher))
    return checks.result("1e-6 + 1e-5 |ref|, gradients 1e-6 + 1e-4 |ref|")


def back_key(path: tuple[str, ...]) -> str:
    """Recorded key of a path within a distillation head."""
    ours = {v: k for k, v in _BACK.items()}
    width = path[1].removeprefix(heads.WIDTH)
    part = [] if path[2] == "linear" else [ours[path[2]]]
    return ".".join([path[0], width, *part, "bias" if path[-1] == "bias" else "weight"])


def _with(norm: LayerNorm, scale: jax.Array, bias: jax.Array) -> tuple[Any, Any]:
    return latent_mim.split(norm)[0], {"scale": scale, "bias": bias}


def _sampler(folder: Path, file: dict[str, Any]) -> Iterator[Case]:
    for entry in file["entries"]:
        key = f"prob/{entry['id']}/counts"
        yield Case(
            f"sampler/{entry['id']}",
            lambda entry=entry, key=key: shape_draws.check(
                entry, load_npz(folder / file["file"])[key]
            ),
        )


def _keys(folder: Path, file: dict[str, Any]) -> Iterator[Case]:
    path = folder / file["file"]
    yield Case("key_renaming/base", lambda: _renamed(load_json(path)))
    yield Case("key_renaming/counts", lambda: _counted(load_json(path)))


def _renamed(doc: dict[str, Any]) -> Result:
    checks = Checks()
    rows = [r[:3] for r in (*doc["v1_3_base_depth4"], *doc["differs_only"])]
    columns = ("register", "perceiver", "attention_pooler")
    for number, spelling in enumerate(columns):
        keys = [r[number] for r in rows]
        checks.equal("spelling", spellings.spelling_of(keys), spelling)
        for row in rows:
            released = spellings.to_released(row[number], spelling)
            checks.equal(f"released name of {row[number]}", released, row[2])
            checks.equal(f"{spelling} name", spellings.from_released(row[2], spelling), row[number])
        dumped = [r for r in doc["encoder_only_dump"] if r[number] is not None]
        for row in dumped:
            released = spellings.to_released(row[number], spelling)
            checks.equal(f"released name of {row[number]}", released, row[2])
    checks.equal("members", spellings.POOLER_MEMBERS, doc["config_members"]["encoder"])
    return checks.result()


def _counted(doc: dict[str, Any]) -> Result:
    checks = Checks()
    for depth, name in ((4, "counts_depth4"), (1, "counts_depth1_release")):
        model = official.trained_model("base", "v1_3")
        assert model.encoder_config.attention_pooler_config is not None
        model.encoder_config.attention_pooler_config.pooler_depth = depth
        ours = reference_counts.reference_counts(model)
        shapes = latent_mim.graph(model)[1]
        pooler = shapes["encoder"]["attention_pooler"]
        student = [pooler[part] for part in ("student", "student_norm")]
        got = {k: ours[k] for k in ("total", "trainable", "encoder", "decoder", "target")}
        got |= {
            "pooler": reference_counts.count(pooler),
            "student": sum(reference_counts.count(part) for part in student),
            "supervision_head": ours[heads.SUPERVISION],
            "distillation_head": ours[heads.DISTILLATION],
            "state_dict_keys": ours["keys"],
        }
        checks.equal(name, got, {k: doc[name][k] for k in got})
        if depth == 4:
            rows = {r[2]: tuple(r[3]) for r in doc["v1_3_base_depth4"]}
            checks.equal("shapes", torch_keys.state_dict_shapes(model), rows)
    return checks.result()


def _trials(folder: Path, file: dict[str, Any]) -> Iterator[Case]:
    yield from _entries(balanced.check)(folder, file)
    table = file["folds_by_n_per_class"]
    yield Case("balanced_trial/folds", lambda: balanced.check_folds(table))


_FILES: dict[str, Callable[[Path, dict[str, Any]], Iterator[Case]]] = {
    "heads": _heads,
    "student": _entries(_student),
    "sampler": _sampler,
    "key_renaming": _keys,
    "balanced_trial": _trials,
}
