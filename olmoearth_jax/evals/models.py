"""Models to evaluate: checkpoints of runs, converted weights, and baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmoearth_jax.checkpoints import checkpoint
from olmoearth_jax.configlib.tasks import known
from olmoearth_jax.evals.embeddings import EmbeddingModel, EncoderModel, RawBands
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.model import config as model_config
from olmoearth_jax.model import latent_mim

BASELINES = ("raw_bands", "random_init")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with what is to be said of it.

    Attributes:
      model: gives the embeddings.
      name: for tables and records.
      step: training step of the checkpoint, 0 for baselines.
      config: config of the run that made it, or {}.
    """

    model: EmbeddingModel
    name: str
    step: int
    config: Mapping[str, Any]


def load_checkpoint(path: str | Path, name: str | None = None, dtype: Any = None) -> Loaded:
    """The online encoder of a checkpoint; only its parameters are read.

    Args:
      path: run folder, checkpoints folder or step folder.
      name: for the records; the run folder's name by default.
      dtype: type of the matrix products.

    Raises:
      ValueError: no complete checkpoint there, damaged, or of a model that does not fit its config.
    """
    folder, meta = checkpoint.open_whole(path)
    loaded = checkpoints.read_opened(folder, meta, with_target=False)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    model = EncoderModel(loaded.config, loaded.params, dtype)
    return Loaded(model, name or run.name, int(meta["step"]), meta["config"])


def baseline(
    kind: str, size: str = "nano", version: str = "v1", seed: int = 0, dtype: Any = None
) -> Loaded:
    """A model without pretraining: 'raw_bands' (the pixels) or 'random_init' (an encoder).

    Raises:
      ValueError: another kind, or a size and version that were never defined.
    """
    known("baseline", kind, BASELINES)
    if kind == "raw_bands":
        names = ("sentinel2_l2a", "sentinel1", "landsat")
        return Loaded(RawBands(names), "raw_bands", 0, {})
    config = model_config.official_model(size, version)
    params = latent_mim.initial_params(config, seed)
    return Loaded(EncoderModel(config, params, dtype), f"random_init_{size}_{version}", 0, {})
