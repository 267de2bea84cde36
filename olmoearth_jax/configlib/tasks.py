"""Downstream tasks: their settings, the tasks of the official runs, and the catalogue."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, Literal

EvalMode = Literal["knn", "linear_probe", "finetune", "embedding_diagnostics"]


@dataclasses.dataclass
class EvalInterval:
    """How often a task runs during training."""

    value: int = 1
    unit: Literal["steps", "epochs"] = "epochs"


@dataclasses.dataclass
class EvalTaskConfig:
    """One downstream task (spec/evals.md section 2)."""

    dataset: str = ""
    """Key of the dataset, which need not be the name of the task."""
    num_workers: int = 8
    pooling_type: Literal["mean", "max"] = "mean"
    norm_stats_from_pretrained: bool = True
    """Normalise with the pretraining statistics instead of the dataset's own."""
    norm_method: str = "norm_no_clip_2_std"
    input_modalities: list[str] = field(default_factory=list)
    """Modalities given to the model; empty means all that the dataset has."""
    embedding_batch_size: int = 128
    probe_lr: float | None = None
    probe_batch_size: int = 32
    probe_type: str = "linear"
    linear_probe_eval_interval: int = 50
    ft_lr: float | None = None
    ft_batch_size: int = 32
    ft_grad_accum_steps: int = 1
    ft_head_type: Literal["linear", "unet"] = "linear"
    finetune_seed: int = 42
    epochs: int = 50
    patch_size: int = 4
    eval_interval: EvalInterval = field(default_factory=EvalInterval)
    eval_mode: EvalMode | None = None
    """Null means kNN for classification and a linear probe for the rest."""
    use_pooled_tokens: bool = False
    use_center_token: bool = False
    label_fraction: float = 1.0
    select_best_by_primary_metric: bool = False
    max_train_samples: int | None = None
    max_train_samples_seed: int = 42
    quantize_embeddings: bool = False
    quantize_bits: int | None = None
    quantile_config_path: str | None = None
    embedding_dim: int | None = None
    use_dice_loss: bool = False
    primary_metric: str | None = None
    primary_metric_class: int | None = None
    h5py_dir: str | None = None
    """Pretraining dataset of a pretrain_subset task (spec/evals.md section 13.7)."""
    pretrain_max_samples: int = 512
    pretrain_target_modality: str | None = None
    pretrain_label_seed: int = 42
    pretrain_train_samples: int = 512
    pretrain_valid_samples: int = 512
    pretrain_test_samples: int = 512
    pretrain_split_strategy: Literal["random", "geographic"] = "random"
    pretrain_geographic_bin_size_deg: float = 5.0


S1, S2, LANDSAT = "sentinel1", "sentinel2_l2a", "landsat"


def _knn(dataset: str, modality: str, metric: str, workers: int = 4, **kw: Any) -> EvalTaskConfig:
    return EvalTaskConfig(
        dataset=dataset,
        input_modalities=[modality],
        eval_mode="knn",
        primary_metric=metric,
        num_workers=workers,
        **{"eval_interval": EvalInterval(5), **kw},
    )


def _probe(
    dataset: str,
    inputs: list[str],
    metric: str | None,
    lr: float = 0.01,
    every: int = 10,
    **kw: Any,
) -> EvalTaskConfig:
    kw = {"embedding_batch_size": 32, "probe_batch_size": 8, **kw}
    return EvalTaskConfig(
        dataset=dataset,
        input_modalities=inputs,
        eval_mode="linear_probe",
        primary_metric=metric,
        probe_lr=lr,
        eval_interval=EvalInterval(every),
        **kw,
    )


def _mados() -> EvalTaskConfig:
    return _probe(
        "mados",
        [S2],
        "micro_f1",
        embedding_batch_size=128,
        probe_batch_size=128,
        norm_stats_from_pretrained=False,
    )


def _geobench() -> dict[str, EvalTaskConfig]:
    own = {"norm_stats_from_pretrained": False}
    tasks = {
        "m_eurosat": _knn("m-eurosat", S2, "accuracy", 0),
        "m_forestnet": _knn("m-forestnet", LANDSAT, "accuracy", embedding_batch_size=64, **own),
        "m_bigearthnet": _knn("m-bigearthnet", S2, "macro_f1", embedding_batch_size=64),
        "m_so2sat": _knn("m-so2sat", S2, "accuracy"),
        "m_brick_kiln": _knn("m-brick-kiln", S2, "accuracy"),
    }
    for name in ("m_sa_crop_type", "m_cashew_plant"):
        tasks[name] = _probe(name.replace("_", "-"), [S2], "miou", 0.1, num_workers=2, **own)
    for name in tasks:
        tasks[name].dataset = name.replace("_", "-")
    return tasks


def _by_sensor(dataset: str, workers: int, **kw: Any) -> dict[str, EvalTaskConfig]:
    """The Sentinel-2, Sentinel-1 and combined probes of a segmentation dataset."""
    out = {}
    for suffix, inputs, every in (
        ("sentinel2", [S2], 50),
        ("sentinel1", [S1], 50),
        ("sentinel1_sentinel2", [S1, S2], 20),
    ):
        out[f"{dataset}_{suffix}"] = _probe(
            dataset, inputs, "miou", 0.1, every, num_workers=workers, **kw
        )
    return out


def _geobench2() -> dict[str, EvalTaskConfig]:
    both = [S1, S2]
    probe = {"num_workers": 4, "embedding_batch_size": 8}
    large = {"num_workers": 4, "embedding_batch_size": 16, "probe_batch_size": 16}
    tasks = {
        "gb2_benv2": _knn("gb2-benv2", S2, "micro_map", 4, eval_interval=EvalInterval(50)),
        "gb2_biomassters": _probe("gb2-biomassters", both, "rmse", 0.001, 50, **probe),
        "gb2_burn_scars": _probe("gb2-burn_scars", [S2], "miou", 0.1, 10, **probe),
        "gb2_caffe": _probe("gb2-caffe", [S1], "miou", 0.1, 10, **probe),
        "gb2_cloudsen12": _probe("gb2-cloudsen12", [S2], "miou", 0.1, 50, **probe),
        "gb2_kuro_siwo": _probe("gb2-kuro_siwo", [S1, "srtm"], "miou", 0.1, 50, **large),
        "gb2_spacenet2": _probe("gb2-spacenet2", [S2], "miou", 0.1, 50, **probe),
        "gb2_spacenet7": _probe("gb2-spacenet7", [S2], "miou", 0.1, 10, **probe),
    }
    tasks["gb2_benv2"].input_modalities = both
    tasks["gb2_benv2"].embedding_batch_size = tasks["gb2_benv2"].probe_batch_size = 16
    return tasks


def _land_cover() -> dict[str, EvalTaskConfig]:
    """Segmentation datasets that share one recipe; the value is the primary metric."""
    metrics: dict[str, str | None] = dict.fromkeys(
        (
            "geo_ecosystem_annual_test",
            "africa_crop_mask",
            "canada_crops_coarse",
            "canada_crops_fine",
            "descals",
            "ethiopia_crops",
            "glance",
            "lcmap_lu",
            "us_trees",
            "surface_fuels",
            "kenya_intercropping",
        ),
        "overall_acc",
    )
    metrics.update(
        dict.fromkeys(
            ("forest_loss_driver", "nigeria_settlement", "nandi_crop_map", "awf_lulc_map")
        )
    )
    tasks = {name: _probe(name, [S2], metric) for name, metric in metrics.items()}
    tasks["tolbi_crop"] = _probe("tolbi_crop", [S2], None, 0.1, num_workers=16)
    tasks["yemen_crop"] = _probe("yemen_crop", [S2], None, 0.001, num_workers=2)
    return tasks


def _vessels() -> dict[str, EvalTaskConfig]:
    out = {}
    for sensor, modality in (("landsat", LANDSAT), ("sentinel1", S1), ("sentinel2", S2)):
        for what, metric in (("type", None), ("length", "rmse")):
            name = f"small_{sensor}_vessel_{what}"
            out[name] = _probe(name, [modality], metric, use_center_token=True)
    return out


def catalogue() -> dict[str, EvalTaskConfig]:
    """Every task that can be named in `tasks_to_run` without being configured first."""
    sen1floods11 = _probe(
        "sen1floods11",
        [S1],
        "miou",
        0.1,
        embedding_batch_size=128,
        probe_batch_size=128,
        num_workers=4,
    )
    pastis128 = _by_sensor("pastis128", 2)
    pastis128["pastis128_sentinel2"].pooling_type = "max"
    tasks = {
        **_geobench(),
        "mados": _mados(),
        "sen1floods11": sen1floods11,
        **_by_sensor("pastis", 2),
        **pastis128,
    }
    for dataset in ("fifty_cities", "fifty_cities_by_city", "fifty_cities_by_continent"):
        tasks.update(_by_sensor(dataset, 4))
    return {**tasks, **_land_cover(), **_vessels(), **_geobench2()}


def official_tasks(version: str) -> dict[str, EvalTaskConfig]:
    """The in-loop tasks of the official runs of a version (spec/evals.md section 3.5)."""
    known = catalogue()
    if version == "v1":
        tasks = {
            "m-eurosat": EvalTaskConfig(dataset="m-eurosat", num_workers=0),
            "m_so2sat": EvalTaskConfig(dataset="m-so2sat"),
            "mados": known["mados"],
            "pastis": known["pastis_sentinel2"],
        }
        tasks["mados"] = dataclasses.replace(
            tasks["mados"], input_modalities=[], eval_mode=None, primary_metric=None
        )
        tasks["pastis"] = dataclasses.replace(
            tasks["pastis"], num_workers=8, eval_mode=None, primary_metric=None
        )
    else:
        tasks = {
            "m-eurosat": known["m_eurosat"],
            "m_so2sat": known["m_so2sat"],
            "mados": known["mados"],
            "pastis": known["pastis_sentinel2"],
            "yemen_crop": known["yemen_crop"],
            "geo_ecosystem_annual_test": dataclasses.replace(
                known["geo_ecosystem_annual_test"], primary_metric=None
            ),
            "canada_wildfire_sat_eval_split": _probe(
                "canada_wildfire_sat_eval_split",
                [S2],
                "class_f1",
                0.1,
                num_workers=2,
                probe_batch_size=16,
                patch_size=5,
                use_dice_loss=True,
                primary_metric_class=1,
            ),
        }
    for name, task in tasks.items():
        every = 4000 if name in ("m-eurosat", "mados") else 20000
        task.eval_interval = EvalInterval(every, "steps")
    return tasks
