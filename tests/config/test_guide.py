"""Every override line of the pretraining guide does what it says, on the base config."""

import pytest

from olmoearth_jax import overrides
from olmoearth_jax.configlib.official import official
from olmoearth_jax.configlib.schema import get_path

SAVER = "trainer.callbacks.checkpointer"
EVALUATOR = "trainer.callbacks.downstream_evaluator"
SENSORS = ["sentinel2_l2a", "sentinel1", "landsat"]

LINES = [
    ("dataset.h5py_dir=/path/to/data", {"dataset.h5py_dir": "/path/to/data"}),
    ("data_loader.global_batch_size=64", {"data_loader.global_batch_size": 64}),
    ("data_loader.global_batch_size=512", {"data_loader.global_batch_size": 512}),
    ("data_loader.global_batch_size=256", {"data_loader.global_batch_size": 256}),
    (
        "trainer.max_duration.value=100",
        {"trainer.max_duration.value": 100, "trainer.max_duration.unit": "epochs"},
    ),
    ("trainer.max_duration.value=300", {"trainer.max_duration.value": 300}),
    (
        f"{EVALUATOR}.tasks_to_run=[mados,pastis_sentinel2]",
        {f"{EVALUATOR}.tasks_to_run": ["mados", "pastis_sentinel2"]},
    ),
    (f"{EVALUATOR}.enabled=False", {f"{EVALUATOR}.enabled": False}),
    ("trainer.callbacks.wandb.enabled=False", {"trainer.callbacks.wandb.enabled": False}),
    ("common.save_folder=path/to/savefolder", {"common.save_folder": "path/to/savefolder"}),
    (
        "train_module.contrastive_config.loss_config.weight=0.0",
        {"train_module.contrastive_config.loss_config.weight": 0.0},
    ),
    ("data_loader.num_workers=8", {"data_loader.num_workers": 8}),
    ("data_loader.num_workers=4", {"data_loader.num_workers": 4}),
    ("train_module.rank_microbatch_size=8", {"train_module.rank_microbatch_size": 8}),
    ("train_module.rank_microbatch_size=16", {"train_module.rank_microbatch_size": 16}),
    ("train_module.optim_config.lr=0.0002", {"train_module.optim_config.lr": 0.0002}),
    ("train_module.scheduler.warmup_steps=5000", {"train_module.scheduler.warmup": 5000}),
    (
        "trainer.max_duration.epochs=100",
        {"trainer.max_duration.value": 100, "trainer.max_duration.unit": "epochs"},
    ),
    (
        'dataset.training_modalities=["SENTINEL2_L2A","SENTINEL1","LANDSAT"]',
        {"dataset.training_modalities": SENSORS},
    ),
    ("data_loader.num_workers=16", {"data_loader.num_workers": 16}),
    ("data_loader.token_budget=2250", {"data_loader.token_budget": 2250}),
    ("data_loader.prefetch_factor=4", {"data_loader.prefetch_factor": 4}),
    ("data_loader.seed=3622", {"data_loader.seed": 3622}),
    ("train_module.rank_microbatch_size=32", {"train_module.rank_microbatch_size": 32}),
    ("train_module.max_grad_norm=1.0", {"train_module.max_grad_norm": 1.0}),
    ("train_module.optim_config.lr=0.0001", {"train_module.optim_config.lr": 0.0001}),
    (
        "train_module.optim_config.weight_decay=0.02",
        {"train_module.optim_config.weight_decay": 0.02},
    ),
    ("train_module.scheduler.warmup_steps=8000", {"train_module.scheduler.warmup": 8000}),
    ("trainer.max_duration.epochs=300", {"trainer.max_duration.value": 300}),
    ("trainer.metrics_collect_interval=10", {"trainer.metrics_collect_interval": 10}),
    ("trainer.save_interval=5000", {f"{SAVER}.save_interval": 5000}),
    ("model.encoder_config.depth=24", {"model.encoder_config.depth": 24}),
    ("model.encoder_config.num_heads=16", {"model.encoder_config.num_heads": 16}),
    ("model.encoder_config.embedding_size=768", {"model.encoder_config.embedding_size": 768}),
    ("model.decoder_config.depth=8", {"model.decoder_config.depth": 8}),
]


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
def test_line_of_the_guide(line, expected):
    config = overrides.apply(official("base"), [f"--config.{line}"])
    assert {path: get_path(config, path) for path in expected} == expected
    assert config.validate() == []


def test_catalogue_task_named_in_the_guide_is_configured():
    config = overrides.apply(
        official("base"), [f"--config.{EVALUATOR}.tasks_to_run=[mados,pastis_sentinel2]"]
    )
    assert get_path(config, f"{EVALUATOR}.tasks.pastis_sentinel2.dataset") == "pastis"


def test_s2_only_ablation_of_the_guide():
    config = overrides.apply(
        official("base"),
        [
            "--config.common.training_modalities=[sentinel2_l2a]",
            "--config.train_module.masking_config.strategy_config.only_decode_modalities=[]",
            "--config.dataset.h5py_dir=/path/to/data",
        ],
    )
    assert config.data_loader.masking_config is not None
    assert config.data_loader.masking_config.strategy_config["only_decode_modalities"] == []
    assert config.model.encoder_config.supported_modality_names == ["sentinel2_l2a"]
    assert config.validate() == []


def test_custom_run_of_the_guide():
    config = overrides.apply(
        official("base"),
        [
            "--config.data_loader.global_batch_size=256",
            "--config.data_loader.num_workers=8",
            "--config.train_module.rank_microbatch_size=8",
            "--config.train_module.optim_config.lr=0.0002",
            "--config.train_module.scheduler.warmup_steps=5000",
            "--config.trainer.max_duration.epochs=100",
        ],
    )
    assert config.groups_per_step == 32
    assert config.samples_per_shape == 64
    assert config.train_module.scheduler.warmup == 5000
    assert config.validate() == []
