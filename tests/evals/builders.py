"""Small models and data for evaluation tests."""

import json
from pathlib import Path

import numpy as np

from olmoearth_jax.configlib.tasks import EvalTaskConfig
from olmoearth_jax.evals.models import EncoderModel
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import EncoderConfig, ModelConfig


def tiny_config(names=("sentinel2_l2a", "sentinel1")) -> ModelConfig:
    encoder = EncoderConfig(
        supported_modality_names=list(names), embedding_size=32, depth=1, num_heads=2, mlp_ratio=2.0
    )
    return ModelConfig(kind="mae", encoder_config=encoder, decoder_config=None)


def tiny_model(names=("sentinel2_l2a", "sentinel1"), seed=0) -> EncoderModel:
    config = tiny_config(names)
    return EncoderModel(config, latent_mim.initial_params(config, seed))


def write_windows(root: Path, counts, task="segmentation", side=16, steps=2, classes=3) -> None:
    """A windowed data set whose classes show in the brightness of the image."""
    rng = np.random.default_rng(0)
    number = 0
    for split, count in counts.items():
        for _ in range(count):
            folder = root / "windows" / "g" / f"w{number}"
            folder.mkdir(parents=True)
            (folder / "metadata.json").write_text(json.dumps({"options": {"eval_split": split}}))
            label = rng.integers(0, classes, (1, 1, side // 4, side // 4)).repeat(4, 2).repeat(4, 3)
            image = 800 + 600 * label + rng.normal(0, 30, (12, steps, side, side))
            if task == "classification":
                label = np.asarray(number % classes)
                image = 800 + 600 * label + rng.normal(0, 30, (12, steps, side, side))
            if "regression" in task:
                label = label.astype(np.float32)
            np.savez(folder / "arrays.npz", sentinel2_l2a=image.astype("f4"), label=label)
            number += 1


def task(dataset="yemen_crop", **settings) -> EvalTaskConfig:
    defaults = {
        "input_modalities": ["sentinel2_l2a"], "probe_lr": 0.05, "probe_batch_size": 4,
        "embedding_batch_size": 4, "epochs": 4,
    }  # fmt: skip
    return EvalTaskConfig(dataset=dataset, **{**defaults, **settings})
