"""Recorded training trajectories, replayed step by step under both engines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from olmoearth_jax import losses, masking, modalities
from olmoearth_jax.config import (
    ExperimentConfig,
    OptimConfig,
    SchedulerConfig,
    TrainModuleConfig,
)
from olmoearth_jax.interop.torch_keys import from_state_dict, model_entries, to_state_dict
from olmoearth_jax.losses import NoTokenLoss, Objective, exit_pairs
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.modalities import SINGLE_BAND_SET_OVERRIDES
from olmoearth_jax.model import heads
from olmoearth_jax.model.config import (
    AttentionPoolerConfig,
    EncoderConfig,
    LocationTokenDistillationHeadConfig,
    ModelConfig,
    PredictorConfig,
    ReconstructorConfig,
    SupervisedMapConfig,
    SupervisionHeadConfig,
)
from olmoearth_jax.stream.stream_shape import MicroStepSize
from olmoearth_jax.train import assemble
from olmoearth_jax.train.step import TrainProgram

from .common import Case, Checks, Result, load_json, load_npz
from .dense_engine import dense_engine

_KINDS = {"contrastive_latentmim": "contrastive_latent_mim"}
"""Names of training modules that differ from ours."""

_KEY_BIAS = ".attn.k.bias"
"""Zero gradient in exact arithmetic under absolute encodings: Adam turns rounding into drift."""


def cases(folder: Path, engines: Sequence[str] = ("dense", "stream")) -> Iterator[Case]:
    """Each trajectory of the manifest, once per engine that trains it."""
    for entry in load_json(folder / "manifest.json")["files"]:
        if not entry["name"].startswith("traj_"):
            continue
        for engine in engines:
            yield Case(
                f"{entry['name']}/{engine}",
                lambda entry=entry, engine=engine: _replay(folder, entry, engine),
            )


def model_of(entry: dict[str, Any]) -> ModelConfig:
    """The model a trajectory was recorded with."""
    names = entry["modalities"]
    single = "single" in entry["tokenization"]
    tokens = SINGLE_BAND_SET_OVERRIDES if single else {}
    position = entry["position"]
    position = {"position_encoding": position} if isinstance(position, str) else dict(position)
    shared = {
        "supported_modality_names": names,
        "num_heads": entry["num_heads"],
        "mlp_ratio": entry["mlp_ratio"],
        "tokenization_overrides": {k: v for k, v in tokens.items() if k in names},
        "drop_path": entry["drop_path"],
        **position,
    }
    width = entry["embedding_size"]
    encoder = EncoderConfig(
        **shared,
        embedding_size=width,
        depth=entry["depth"],
        max_patch_size=entry["max_patch_size"],
        use_linear_patch_embed=entry["use_linear_patch_embed"],
        patch_embed_hidden_sizes=entry["patch_embed_hidden_sizes"],
    )
    decoder = PredictorConfig(
        **shared | entry.get("decoder_position", {}),
        encoder_embedding_size=width,
        decoder_embedding_size=width,
        depth=entry["decoder_depth"],
    )
    kind = entry["train_module"]["module"]
    if kind != "mae":
        kind = "galileo" if kind == "galileo" else "latent_mim"
        out = ModelConfig(kind, encoder, decoder)
        return _with_grid(out, entry) if "attention_pooler_config" in entry else out
    pixels = ReconstructorConfig(
        decoder,
        names,
        entry["max_patch_size"],
        encoder.tokenization_overrides,
    )
    return ModelConfig(kind, encoder, None, pixels)


def _with_grid(model: ModelConfig, entry: dict[str, Any]) -> ModelConfig:
    """What v1.3 adds: pooler, decoder on its grid, heads."""
    pooler = AttentionPoolerConfig(**entry["attention_pooler_config"])
    model.encoder_config.attention_pooler_config, decoder = pooler, model.decoder_config
    assert decoder is not None
    decoder.use_attention_pooler, decoder.pooler_dim = True, pooler.pooler_dim
    for name, value in PredictorConfig().__dict__.items():
        if "rope" in name and name not in entry["decoder_position"]:
            setattr(decoder, name, value)
    model.projection_only_target = entry["projection_only_target"]
    maps = {n: SupervisedMapConfig(**c) for n, c in entry["supervision_head_config"].items()}
    model.supervision_head_config = SupervisionHeadConfig(maps)
    model.location_token_distillation_head_config = LocationTokenDistillationHeadConfig(
        **entry["location_token_distillation_head_config"]
    )
    return model


def groups_of(arrays: dict[str, np.ndarray], entry: dict[str, Any], number: int) -> list[dict]:
    """The groups of one recorded batch, masks at token level."""
    names = modalities.in_sample_order(entry["modalities"])
    size, patch = entry["microbatch"], entry["patch_size"]
    root = f"batch{number}"
    out = []
    for first in range(0, entry["B"], size):
        mine = slice(first, first + size)
        masks = {}
        for key, view in (("mask_a", "viewa"), ("mask_b", "viewb")):
            if f"{root}/{view}/{names[0]}_mask" not in arrays:
                continue
            masks[key] = {}
            for name in names:
                step = patch * modalities.get(name).image_factor
                mask = arrays[f"{root}/{view}/{name}_mask"][mine]
                masks[key][name] = mask[:, ::step, ::step] if modalities.get(name).spatial else mask
        out.append(
            {
                "position": np.arange(first, first + size),
                "index": np.arange(first, first + size),
                "ok": np.ones(size, bool),
                "epoch": np.int64(1),
                "grid": np.int32(entry["H"] // patch),
                "patch_size": np.int32(patch),
                "timestamps": arrays[f"{root}/data/timestamps"][mine].astype(np.int32),
                "data": {n: arrays[f"{root}/data/{n}"][mine] for n in names},
                **masks,
            }
        )
    return out


def objective_of(entry: dict[str, Any], model: ModelConfig) -> Objective:
    """The terms that a trajectory was recorded with."""
    module = entry["train_module"]

    def build(*names: str) -> Any:
        found = [module[n] for n in names if n in module]
        return losses.build(found[0]) if found else None

    def exits(*names: str) -> Any:
        found = [module.get(n, entry.get(n)) for n in names if n in module or n in entry]
        return exit_pairs(found[0]) if found and isinstance(found[0], dict) else None

    kind = _KINDS.get(module["module"]) or str(module["module"])
    token, token_b = build("loss_config", "loss_config_a"), build("loss_config_b")
    nce = build("contrastive_config")
    names = ()
    if kind == "galileo":
        names = tuple(f"{entry['masking']['type']}_masking_{x.name}" for x in (token, token_b))
    return Objective(
        token_loss=token or NoTokenLoss(),
        contrastive=nce,
        kind=kind,
        token_loss_b=token_b,
        regularizer=build("regularizer_config"),
        mae=build("mae_loss_config"),
        exits=exits("token_exit_cfg", "token_exit_cfg_a") or (),
        exits_b=exits("token_exit_cfg_b"),
        moving=module.get("ema_decay", [1.0, 1.0]) != [1.0, 1.0],
        view_metrics=names,
        supervision=heads.supervision_of(model),
        distillation=heads.distillation_of(model),
    )


def _settings(entry: dict[str, Any], model: ModelConfig) -> ExperimentConfig:
    """The settings that the recorded optimiser had."""
    module = entry["train_module"]
    optim = {k: v for k, v in module["optim_config"].items() if k != "type"}
    plan = dict(module["scheduler"])
    plan = {"name": plan.pop("type"), "warmup": plan.pop("warmup_steps", None)} | plan
    settings = TrainModuleConfig(
        optim_config=OptimConfig(**optim),
        scheduler=SchedulerConfig(**plan),
        max_grad_norm=module["max_grad_norm"],
        ema_decay=list(module.get("ema_decay", (1.0, 1.0))),
    )
    return ExperimentConfig(model=model, train_module=settings, precision="float32")


def program_of(entry: dict[str, Any], model: ModelConfig, engine: str) -> TrainProgram:
    """The program that replays a trajectory under `engine`, 'dense' or 'stream'."""
    mesh = make_mesh(devices=jax.devices()[:1])
    config, objective = _settings(entry, model), objective_of(entry, model)
    size = entry["microbatch"]
    if engine == "dense":
        built: Any = dense_engine(config, objective, mesh, size)
    else:
        strategy = masking.build(entry["masking"])
        grids = {entry["H"] // entry["patch_size"]: entry["T"]}
        needs, step = assemble.StreamNeeds.of(objective), MicroStepSize(size)
        spec = assemble.stream_spec(model, [strategy], grids, step, needs)
        built = assemble.stream_engine(config, spec, [spec.top_rung()], objective, mesh)
    trained = assemble.trainable_leaves(model, objective.pools, objective)
    return TrainProgram(config, built, mesh, trained, entry["steps"])


def _state_dict(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _replay(folder: Path, entry: dict[str, Any], engine: str) -> Result:
    """Runs the recorded number of steps and compares metrics, gradients and final values."""
    arrays = load_npz(folder / entry["file"])
    model = model_of(entry)
    start = _state_dict(arrays, "params/")
    program = program_of(entry, model, engine)
    full = program.engine.objective.full_target and model.kind != "mae"
    params, target, extras = from_state_dict(start, model, full)
    state = program.state_from(params, target)
    batches = [groups_of(arrays, entry, b) for b in range(entry["n_batches"])]
    checks = Checks()
    grads, _ = program.gradients(state, batches[0])
    _check_gradients(checks, grads, arrays, model, entry)
    for step in range(1, entry["steps"] + 1):
        state, report = program.step(state, batches[(step - 1) % len(batches)], step)
        values = {k: float(v) for k, v in jax.device_get(report.metrics).items()}
        values |= report.host
        for name, expected in entry["metrics_per_step"][step - 1].items():
            what = f"step {step} {name}"
            if name not in values:
                checks.true(f"{what} is not reported", False)
                continue
            rtol = 5e-4 if "grad norm" in name else 1e-9 if "LR" in name else 1e-4
            checks.array(what, values[name], expected, rtol=rtol, atol=1e-7)
    _check_final(checks, state, arrays, model, entry, start, extras)
    return checks.result("losses 1e-4 |ref|, final values as recorded")


def _check_gradients(
    checks: Checks, grads: Any, arrays: dict, model: ModelConfig, entry: dict
) -> None:
    """Unclipped gradients of step 1: 1e-4 of each tensor's largest (1e-3 for frequencies)."""
    recorded = _state_dict(arrays, "grad_step1/")
    values = jax.device_get(grads)
    for item in model_entries(model):
        if item.key not in recorded or item.key.endswith(_KEY_BIAS):
            continue
        leaf = values
        for part in item.path:
            leaf = leaf[part]
        ours = item.to_torch(np.asarray(leaf))
        expected = recorded[item.key]
        loose = 1e-3 if "rope_mixed_freqs" in item.key else 1e-4
        atol = max(loose * float(np.abs(expected).max()), 1e-6)
        checks.array(f"gradient of {item.key}", ours, expected, atol=atol)


def _check_final(
    checks: Checks,
    state: dict[str, Any],
    arrays: dict[str, np.ndarray],
    model: ModelConfig,
    entry: dict[str, Any],
    start: dict[str, np.ndarray],
    extras: dict[str, np.ndarray],
) -> None:
    """Values after the last step; tensors without a recorded change must be bit-identical."""
    ours = to_state_dict(
        jax.device_get(state["params"]), model, jax.device_get(state["target"]), extras
    )
    final, noise = _state_dict(arrays, "final/"), entry["float64_rerun_max_abs_param_diff"]
    for key in start:
        if key.endswith(_KEY_BIAS):
            continue
        if key in final:
            limit = max(5e-5, 20 * noise.get(key, 0.0))
            checks.array(f"final {key}", ours[key], final[key], atol=limit)
        else:
            checks.array(f"unchanged {key}", ours[key], start[key])
    checks.true("a final value is not finite", all(math.isfinite(float(np.abs(v).max()))
                for v in ours.values() if v.size))  # fmt: skip
