"""Every ablation and every kind of training builds and takes a step on the sample data."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from olmoearth_jax import check, overrides
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.train import assemble, build

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ablations"
ABLATIONS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")
FEW = ("sentinel2_l2a", "worldcover")
"""Modalities of a step: each has a program of its own for every band set."""
STEPPED: set[str] = set()
"""Models and objectives that have taken a step, as text."""

pytestmark = pytest.mark.usefixtures("quick_compile")


def _shrunk(cfg: ExperimentConfig) -> ExperimentConfig:
    """The same objective on a model of width 32 and two samples."""
    pixels = cfg.model.reconstructor_config
    parts = [cfg.model.encoder_config, cfg.model.decoder_config]
    parts.append(None if pixels is None else pixels.decoder_config)
    for part in filter(None, parts):
        part.num_heads, part.mlp_ratio, part.depth = 2, 1.0, 1
        for name in ("embedding_size", "encoder_embedding_size", "decoder_embedding_size"):
            if hasattr(part, name):
                setattr(part, name, 32)
    pooler = cfg.model.encoder_config.attention_pooler_config
    if pooler is not None:
        pooler.pooler_dim = pooler.attn_dim = 32
        pooler.pooler_depth = 1
        pooler.student_dims = [8, 4] if pooler.student_dims else None
        assert cfg.model.decoder_config is not None
        cfg.model.decoder_config.pooler_dim = 32
    module = cfg.train_module
    module.token_exit_cfg = {n: min(d, 1) for n, d in module.token_exit_cfg.items()}
    cfg.data_loader.global_batch_size = module.rank_microbatch_size = 2
    cfg.data_loader.samples_per_shape = 2
    cfg.data_loader.sampled_hw_p_list = [1, 2]
    cfg.ladder.max_rungs = 1
    return cfg


def _ablation(name: str) -> ExperimentConfig:
    found = importlib.import_module(f"configs.ablations.{name}").get_config("smoke")
    cfg = _shrunk(ExperimentConfig.from_dict(found.to_dict()))
    if name == "high_entropy_dataset":
        cfg.dataset.filter_idx_file = None  # a list of samples of the published dataset
    return cfg


def _of_few(cfg: ExperimentConfig) -> ExperimentConfig:
    """The same training on FEW modalities."""
    head = cfg.model.supervision_head_config
    if head is not None:
        maps = head.modality_configs
        head.modality_configs = {n: one for n, one in maps.items() if n in FEW}
    names = [n for n in cfg.common.training_modalities if n in FEW]
    return overrides.apply_values(cfg, {"common.training_modalities": names})


def _step(cfg: ExperimentConfig) -> None:
    """Packs a group, and takes a step that changes parameters unless one like it was taken."""
    cfg = _of_few(cfg)
    assert check.problems(cfg) == []
    training = build.build_training(cfg, say=lambda line: None)
    program, group = training.program, training.stream.group(0)
    (packed,) = program.engine.prepare([group])
    assert packed.host["samples"] == 2 and packed.inputs
    settings = cfg.to_dict()
    key = json.dumps([settings["model"], settings["train_module"]], sort_keys=True)
    if key in STEPPED:
        return
    STEPPED.add(key)
    state = program.init_state()
    before = jax.device_get(state["params"])
    state, report = program.step(state, [group], 1)
    metrics = jax.device_get(report.metrics)
    assert np.isfinite(metrics[f"train/{program.engine.objective.metric_name}"])
    assert metrics["train/good_micro_steps"] == 1
    after = jax.device_get(state["params"])
    changed = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert any(changed)
    assert ("train/ema_decay" in report.host) == (cfg.train_module.ema_decay != [1.0, 1.0])


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_builds_its_objective(name):
    cfg = _ablation(name)
    assert check.problems(cfg) == []
    objective = build.build_objective(cfg)
    assert objective.views == cfg.data_loader.num_masked_views
    trained = assemble.trainable_leaves(cfg.model, objective.pools, objective)
    head = trained["encoder"]["project_and_aggregate"]
    assert all(jax.tree.leaves(head)) == (cfg.train_module.contrastive_config is not None)
    spec = build.stream_of(cfg, {1: 12, 2: 12}, 1, objective)
    assert spec.pixels == (name == "mae")
    assert spec.deep == name.endswith("emafull")
    assert bool(spec.loc_bound) == name.startswith("v1_3")


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_takes_a_step(name):
    _step(_ablation(name))


def _kind(kind: str) -> ExperimentConfig:
    from configs.ablations import ema

    cfg = _shrunk(ExperimentConfig.from_dict(ema.get_config("smoke").to_dict()))
    module = cfg.train_module
    module.kind = kind
    if kind == "latent_mim":
        module.contrastive_config = None
        cfg.data_loader.num_masked_views = 1
        module.regularizer_config = type(module.loss_config)({"type": "KoLeo"})
    else:
        cfg.model.kind = "galileo"
        module.loss_config_b = type(module.loss_config)({"type": "patch_discrimination"})
        module.token_exit_cfg_b = dict.fromkeys(module.token_exit_cfg, 1)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent_mim", "galileo"])
def test_every_other_kind_takes_a_step(kind):
    _step(_kind(kind))
