"""Every override line of the pretraining guide does what it says, on the base config.

The lines are written as they stand there, for a shell; here `config.` comes before each path.
"""

import shlex

import pytest

from olmoearth_jax import check, overrides
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib.official import official
from olmoearth_jax.configlib.schema import get_path
from olmoearth_jax.overrides import parse_value

GUIDE = r"""
--dataset.h5py_dir=/path/to/data
--dataset.h5py_dir=/your/path/to/h5data/num_samples
--dataset.training_modalities='["SENTINEL2_L2A","SENTINEL1","LANDSAT"]'
--data_loader.global_batch_size=64
--data_loader.global_batch_size=256
--data_loader.global_batch_size=512
--data_loader.num_workers=4
--data_loader.num_workers=8
--data_loader.num_workers=16
--data_loader.token_budget=2250
--data_loader.prefetch_factor=4
--data_loader.seed=3622
--common.save_folder=path/to/savefolder
--common.training_modalities='[sentinel2_l2a]'
--train_module.rank_microbatch_size=8
--train_module.rank_microbatch_size=16
--train_module.rank_microbatch_size=32
--train_module.max_grad_norm=1.0
--train_module.optim_config.lr=0.0001
--train_module.optim_config.lr=0.0002
--train_module.optim_config.weight_decay=0.02
--train_module.scheduler.warmup_steps=5000
--train_module.scheduler.warmup_steps=8000
--train_module.contrastive_config.loss_config.weight=0.0
--train_module.masking_config.strategy_config.only_decode_modalities='[]'
--trainer.max_duration.value=100
--trainer.max_duration.value=300
--trainer.max_duration.epochs=100
--trainer.max_duration.epochs=300
--trainer.metrics_collect_interval=10
--trainer.save_interval=5000
--trainer.callbacks.wandb.enabled=False
--trainer.callbacks.downstream_evaluator.enabled=False
--trainer.callbacks.downstream_evaluator.tasks_to_run=\[mados,pastis_sentinel2\]
--model.encoder_config.depth=24
--model.encoder_config.num_heads=16
--model.encoder_config.embedding_size=768
--model.decoder_config.depth=8
"""
LINES = [line for line in GUIDE.splitlines() if line]

ABLATIONS = {  # of the guide and of the script that it names: the whole command line
    "no_contrastive": "--train_module.contrastive_config.loss_config.weight=0.0",
    "random_target": "--train_module.reinit_targets=True",
    "patch_disc": "--train_module.loss_config.loss_config.type=patch_discrimination_new",
    "ema": r"--train_module.ema_decay=\[0.996,1.0\]",
    "no_ag_maps": "--common.training_modalities='[sentinel2_l2a,sentinel1,landsat,worldcover,srtm,"
    "openstreetmap_raster,wri_canopy_height_map]' "
    "--train_module.masking_config.strategy_config.only_decode_modalities="
    "'[worldcover,srtm,openstreetmap_raster,wri_canopy_height_map]'",
    "no_maps": "--common.training_modalities='[sentinel2_l2a,sentinel1,landsat,srtm]' "
    "--train_module.masking_config.strategy_config.only_decode_modalities='[srtm]'",
    "no_decode": "--common.training_modalities='[sentinel2_l2a,sentinel1,landsat]' "
    "--train_module.masking_config.strategy_config.only_decode_modalities='[]'",
    "no_landsat": "--common.training_modalities='[sentinel2_l2a,sentinel1]' "
    "--train_module.masking_config.strategy_config.only_decode_modalities='[]'",
    "s2_only": "--common.training_modalities='[sentinel2_l2a]' "
    "--train_module.masking_config.strategy_config.only_decode_modalities='[]' "
    "--dataset.h5py_dir=/path/to/data",
}

COMMANDS = {
    "custom": "--data_loader.global_batch_size=256 --data_loader.num_workers=8 "
    "--train_module.rank_microbatch_size=8 --train_module.optim_config.lr=0.0002 "
    "--train_module.scheduler.warmup_steps=5000 --trainer.max_duration.epochs=100",
    "debug": "--data_loader.global_batch_size=64 --data_loader.num_workers=4 "
    "--train_module.rank_microbatch_size=16 --trainer.callbacks.wandb.enabled=False",
}


def given(command: str) -> ExperimentConfig:
    """The base config with a command line of the guide."""
    texts = [f"--config.{word.removeprefix('--')}" for word in shlex.split(command)]
    return overrides.apply(official("base"), texts)


@pytest.mark.parametrize("line", LINES)
def test_line_of_the_guide(line):
    config = given(line)
    path, _, text = shlex.split(line)[0].lstrip("-").partition("=")
    path = next(
        (path.replace(a, t) for a, t in overrides.ALIASES.items() if path.startswith(a)), path
    )
    value = parse_value(text)
    if path.endswith("training_modalities"):
        value = [name.lower() for name in value]
    assert get_path(config, path) == value
    assert check.problems(config) == []


@pytest.mark.parametrize("name", [*ABLATIONS, *COMMANDS])
def test_command_of_the_guide(name):
    assert check.problems(given({**ABLATIONS, **COMMANDS}[name])) == []


def test_durations_keep_their_unit():
    for line in ("--trainer.max_duration.value=100", "--trainer.max_duration.epochs=100"):
        assert given(line).trainer.max_duration.unit == "epochs"


def test_catalogue_task_named_in_the_guide_is_configured():
    config = given(next(line for line in LINES if "tasks_to_run" in line))
    tasks = config.trainer.callbacks.downstream_evaluator.tasks
    assert tasks["pastis_sentinel2"].dataset == "pastis"


def test_ablations_reach_model_and_masking():
    config = given(ABLATIONS["s2_only"])
    assert config.data_loader.masking_config is not None
    assert config.data_loader.masking_config.strategy_config["only_decode_modalities"] == []
    assert config.model.encoder_config.supported_modality_names == ["sentinel2_l2a"]
    assert list(config.train_module.token_exit_cfg) == ["sentinel2_l2a"]


def test_custom_run_is_cut_into_small_groups():
    config = given(COMMANDS["custom"])
    assert (config.groups_per_step, config.samples_per_shape) == (32, 64)
