"""Training goldens: losses, schedule, EMA, AdamW, mask statistics, trajectories.

Layouts and tolerances are those of the folder's ``manifest.json`` (spec/train.md section 11).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from olmoearth_jax import losses
from olmoearth_jax.config import OptimConfig, SchedulerConfig
from olmoearth_jax.modalities import SINGLE_BAND_SET_OVERRIDES
from olmoearth_jax.train import optimizer, targets

from . import mask_stats
from .common import Case, Checks, Result, load_json, load_npz

Arrays = Mapping[str, np.ndarray]
VALUE = {"rtol": 1e-5, "atol": 1e-6}
GRAD = {"rtol": 1e-4, "atol": 1e-6}


def _under(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """{rest of the name: array} of the names that start with `prefix`/."""
    start = prefix + "/"
    return {k[len(start) :]: v for k, v in arrays.items() if k.startswith(start)}


@functools.lru_cache(maxsize=256)
def _value_and_grad(loss: Any, argument_count: int, **options: Any) -> Callable:
    def value(differentiated, *rest):
        return loss(*differentiated, *rest)[0] if argument_count > 1 else (
            loss(differentiated, *rest)[0]
        )  # fmt: skip

    return jax.jit(jax.value_and_grad(value))


def _flat(arrays: Arrays) -> dict[str, jax.Array]:
    return {m: jnp.asarray(a.reshape(len(a), -1, a.shape[-1])) for m, a in arrays.items()}


def _check_value(checks: Checks, value: Any, entry: Mapping[str, Any], arrays: Arrays) -> None:
    """Holds a value to the record; NaN and exceptions stand for our documented 0 or finite."""
    recorded = entry.get("value")
    if "raises" in entry or recorded in ("nan", "NaN") or (
        isinstance(recorded, float) and math.isnan(recorded)
    ):  # fmt: skip
        checks.true("the value is not finite", np.isfinite(value))
        if entry["case"] == "nothing":
            checks.true("the value is not 0 where nothing is decoded", value == 0)
        return
    checks.array("value", value, np.float32(recorded), **VALUE)
    stored = arrays.get(f"{entry['id']}/value")
    if stored is not None:
        checks.array("value", value, stored, **VALUE)


def _token_loss(entry: Mapping[str, Any], arrays: Arrays) -> Result:
    case, checks = entry.get("input_case", entry["case"]), Checks()
    loss = losses.build({"type": entry["loss"], **entry["kwargs"]})
    inputs = [_under(arrays, f"{case}/{part}") for part in ("pred", "target", "mask")]
    masks = {m: jnp.asarray(a.reshape(len(a), -1)) for m, a in inputs[2].items()}
    pred, target = _flat(inputs[0]), _flat(inputs[1])
    run = _value_and_grad(loss, 1)
    if entry["case"] == "bf16_demo":
        return _bf16(entry, checks, run, pred, target, masks)
    value, grads = run(pred, target, masks)
    _check_value(checks, value, entry, arrays)
    recorded = _under(arrays, f"{entry['id']}/grad")
    for m, grad in grads.items():
        checks.true(f"gradient of {m} is not finite", np.isfinite(grad).all())
        off = np.asarray(masks[m] != 2)[..., None]
        checks.true(f"gradient of {m} off the decoded tokens", not np.any(grad * off))
        expected = recorded.get(m)
        if expected is None or np.isnan(expected).any():
            if entry["case"] == "nothing" or m in entry.get("no_grad_modalities", ()):
                checks.true(f"gradient of {m} is not zero", not np.any(grad))
        else:
            checks.array(f"gradient of {m}", grad.reshape(expected.shape), expected, **GRAD)
    return checks.result("1e-6 + 1e-5 |ref|, gradients 1e-6 + 1e-4 |ref|")


def _bf16(entry, checks: Checks, run: Callable, pred, target, masks) -> Result:
    """We always compute in float32 (quirk Q18).

    So bfloat16 inputs must give what the reference's float32 losses give on them; where it
    computed in bfloat16, agreement to that type's resolution is all that can hold.
    """
    checks.array(
        "float32", run(pred, target, masks)[0], np.float32(entry["value_float32"]), **VALUE
    )
    low = [{m: x.astype(jnp.bfloat16) for m, x in d.items()} for d in (pred, target)]
    value = run(*low, masks)[0]
    checks.true("the value is not float32", value.dtype == jnp.float32)
    exact = entry["bf16_output_dtype"].endswith("float32")
    tolerance = VALUE if exact else {"rtol": 2.0**-7}
    checks.array("bfloat16", value, np.float32(entry["value_bf16_inputs"]), **tolerance)
    return checks.result("1e-6 + 1e-5 |ref|" if exact else "2^-7 |ref| (bfloat16)")


def _cross_entropy(entry: Mapping[str, Any], arrays: Arrays) -> Result:
    checks, loss = Checks(), losses.build({"type": "cross_entropy", **entry["kwargs"]})
    own = _under(arrays, entry["id"])
    pred, target = _flat({"m": own["pred"]})["m"], own["target"]
    args = ({"worldcover": jnp.asarray(target.reshape(len(target), -1).astype(np.int32))},
            {"worldcover": jnp.asarray(own["mask"].reshape(len(target), -1))})  # fmt: skip
    value, grads = _value_and_grad(loss, 1)({"worldcover": pred}, *args)
    _check_value(checks, value, entry, arrays)
    grad = grads["worldcover"].reshape(own["grad"].shape)
    checks.array("gradient", grad, own["grad"], **GRAD)
    return checks.result("1e-6 + 1e-5 |ref|, gradients 1e-6 + 1e-4 |ref|")


def _mae(entry: Mapping[str, Any], arrays: Arrays) -> Result:
    checks, kwargs = Checks(), dict(entry["kwargs"])
    if entry.get("tokenization", "default") != "default":
        kwargs["tokenization_config"] = SINGLE_BAND_SET_OVERRIDES
    loss = losses.build({"type": "mae", **kwargs})
    parts = [_under(arrays, f"{entry['id']}/{p}") for p in ("pred", "target", "mask")]
    value, grads = _value_and_grad(loss, 1)(*parts)
    _check_value(checks, value, entry, arrays)
    for m, expected in _under(arrays, f"{entry['id']}/grad").items():
        checks.array(f"gradient of {m}", grads[m], expected, **GRAD)
    return checks.result("1e-6 + 1e-5 |ref|, gradients 1e-6 + 1e-4 |ref|")


def _info_nce(entry: Mapping[str, Any], arrays: Arrays) -> Result:
    checks, loss = Checks(), losses.build({"type": "InfoNCE", **entry["kwargs"]})
    own = _under(arrays, entry["id"])
    value, grads = _value_and_grad(loss, 2)((own["a"], own["b"]))
    _check_value(checks, value, entry, arrays)
    for part, grad in zip("ab", grads, strict=True):
        checks.array(f"gradient of {part}", grad, own[f"grad_{part}"], **GRAD)
    return checks.result("1e-6 + 1e-5 |ref|, gradients 1e-6 + 1e-4 |ref|")


def _koleo(entry: Mapping[str, Any], arrays: Arrays) -> Result:
    checks, loss = Checks(), losses.build({"type": "KoLeo", **entry["kwargs"]})
    assert isinstance(loss, losses.KoLeo)
    own = _under(arrays, entry["id"])
    if "x" in own:
        value, grad = _value_and_grad(loss, 1)(own["x"])
        pairs = [("x", grad, own["grad"])]
    else:
        masks = {m: jnp.asarray(a.reshape(len(a), -1)) for m, a in _under(own, "mask").items()}

        def of_tokens(tokens):
            x, groups = loss.tokens_to_vectors(tokens, masks)
            return loss(x, groups)[0]

        value, grads = jax.value_and_grad(of_tokens)(_flat(_under(own, "pred")))
        pairs = [(m, grads[m].reshape(g.shape), g) for m, g in _under(own, "grad").items()]
    _check_value(checks, value, entry, arrays)
    for name, grad, expected in pairs:
        checks.array(f"gradient of {name}", grad, expected, **GRAD)
    return checks.result("1e-6 + 1e-5 |ref|, gradients 1e-6 + 1e-4 |ref|")


LOSS_RUNNERS = {"mae": _mae, "InfoNCE": _info_nce, "KoLeo": _koleo, "cross_entropy": _cross_entropy}


def _lr(entry: Mapping[str, Any], arrays: Arrays) -> Result:
    checks = Checks(rtol=1e-12)
    names = ("warmup", "warmup_fraction", "alpha_f", "warmup_min_lr", "t_max")
    given: dict[str, Any] = {"warmup": None} | {k: entry[k] for k in names if k in entry}
    plan = SchedulerConfig(**given)
    if "warmup_steps_used" in entry:
        used = optimizer.warmup_steps(plan, entry["t_max"])
        checks.equal("warm-up steps", used, entry["warmup_steps_used"])
    steps, rates = (arrays[f"{entry['id']}/{k}"] for k in ("steps", "lr"))
    ours = [optimizer.learning_rate(plan, entry["lr"], int(s), entry["t_max"]) for s in steps]
    checks.array("rates", np.array(ours), rates)
    return checks.result("1e-12 |ref|")


def _ema(entry: Mapping[str, Any], arrays: Arrays) -> Result:
    checks, own = Checks(rtol=1e-6, atol=1e-7), _under(arrays, entry["id"])
    online = {k: jnp.asarray(v) for k, v in _under(own, "enc0").items()}
    target = {k: jnp.asarray(v) for k, v in _under(own, "tgt0").items()}
    bounds = (entry["ema_decay"][0], entry["ema_decay"][1])
    for i, (step, recorded) in enumerate(zip(entry["steps"], entry["decay"], strict=True)):
        online = {k: v + np.float32(0.1 * (i + 1)) for k, v in online.items()}
        decay = targets.ema_decay_at(step, entry["max_steps"], bounds)
        if decay is None or recorded is None:
            checks.true(f"step {step}: one side updates, the other doesn't", decay is recorded)
        else:
            checks.array(f"decay at step {step}", decay, recorded, rtol=1e-12)
            target = targets.ema_update(target, online, decay)
        for k, expected in _under(own, f"tgt{i + 1}").items():
            checks.array(f"{k} after update {i + 1}", target[k], expected)
    return checks.result("1e-7 + 1e-6 |ref|")


def _adamw(entry: Mapping[str, Any], arrays: Arrays) -> Result:
    """Parameters are put into one optimiser per pattern of absent gradients.

    A parameter without a gradient has to stay as it is, count included. In a compiled step that
    is a fixed property of a parameter; the recorded run has one that alternates.
    """
    checks, own = Checks(rtol=1e-6, atol=1e-7), _under(arrays, entry["id"])
    params = {k: jnp.asarray(v) for k, v in _under(own, "init").items()}
    steps = range(1, len(entry["lr_per_step"]) + 1)
    config = OptimConfig(**entry["adamw"], count_offset=entry["count_offset"])
    clip = optimizer.clip_by_norm(entry["max_grad_norm"] or math.inf)
    present = {k: tuple(f"step{s}/grad/{k}" in own for s in steps) for k in params}
    groups: dict[tuple[bool, ...], tuple] = {}
    for pattern in set(present.values()):
        members = {k: v for k, v in params.items() if present[k] == pattern}
        transform = optimizer.adamw(config, dict.fromkeys(members, True))
        groups[pattern] = transform, transform.init(members)
    plan = SchedulerConfig(warmup=2, t_max=5)
    for s in steps:
        lr = optimizer.learning_rate(plan, config.lr, s, 5)
        checks.array("learning rate", lr, entry["lr_per_step"][s - 1], rtol=1e-12)
        grads = {k: jnp.asarray(v) for k, v in _under(own, f"step{s}/grad").items()}
        norm = optax.tree.norm(grads)
        clipped: Any = clip.update(grads, clip.init(grads))[0]
        if entry["grad_norm_before_clip"]:
            checks.array("gradient norm", norm, np.float32(entry["grad_norm_before_clip"][s - 1]))
        for k, expected in _under(own, f"step{s}/clipped").items():
            checks.array(f"clipped {k}", clipped[k], expected)
        for pattern, (transform, state) in groups.items():
            if pattern[s - 1]:
                members = {k: v for k, v in params.items() if present[k] == pattern}
                mine = {k: clipped[k] for k in members}
                updates, state = transform.update(mine, state, members, rate=lr)
                groups[pattern] = transform, state
                new: Any = optax.apply_updates(members, updates)
                params |= new
        _check_adamw_step(checks, _under(own, f"step{s}"), params, groups, s)
    return checks.result("1e-7 + 1e-6 |ref|")


def _check_adamw_step(checks: Checks, own: Arrays, params, groups, step: int) -> None:
    adams = [optax.tree.get(s, "ScaleByAdamState") for _, s in groups.values()]
    states = {k: adam for adam in adams for k in adam.mu}
    for k, expected in _under(own, "param").items():
        checks.array(f"{k} after step {step}", params[k], expected)
    for field, name in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        for k, expected in _under(own, name).items():
            checks.array(f"{name} of {k} after step {step}", getattr(states[k], field)[k], expected)
    for k, expected in _under(own, "count").items():
        checks.equal(f"count of {k} after step {step}", int(states[k].count), int(expected))


RUNNERS = {"lr_schedule": _lr, "ema": _ema, "adamw": _adamw}


def _trajectories(folder: Path) -> Iterator[Case]:
    from . import trajectories  # builds programs: seconds that the other cases need not wait for

    yield from trajectories.cases(folder)


def cases(folder: Path) -> Iterator[Case]:
    """Every entry of the manifest, every strategy of the mask statistics, every trajectory."""
    folder = Path(folder)
    files = {f["name"]: f for f in load_json(folder / "manifest.json")["files"]}
    for name, file in files.items():
        for entry in file.get("entries", ()):
            if name == "losses":
                runner = LOSS_RUNNERS.get(entry["loss"], _token_loss)
            else:
                runner = RUNNERS[name]
            path = folder / file["file"]
            yield Case(
                f"{name}/{entry['id']}",
                lambda runner=runner, entry=entry, path=path: runner(entry, load_npz(path)),
            )
    if "mask_stats" in files:
        yield from mask_stats.cases(folder)
    if any(name.startswith("traj_") for name in files):
        yield from _trajectories(folder)
