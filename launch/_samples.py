"""How many samples a run will have, as far as that is known without opening any of them.

What is known is judged alike by `launch.train`, `launch.dry_run` and `launch.submit`. Plans are
made where the dataset is not, so a folder that is not here is worth a note, no refusal.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
from absl import flags

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data import index, order
from olmoearth_jax.data.remote import location

_NUM_SAMPLES_HELP = (
    "Samples of the dataset, where its folder is not here and its name does not tell them."
)


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is known of a run's samples.

    Attributes:
      count: samples that are trained on, by the folders' tables or at most; None if unknown.
      problems: why they cannot be trained on, one sentence each.
      notes: what could not be found out.
    """

    count: int | None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def steps_per_epoch(self, cfg: ExperimentConfig) -> int | None:
        """Optimiser steps of an epoch; None if unknown or if there is not one."""
        batch = cfg.data_loader.global_batch_size
        if self.count is None or self.count < batch:
            return None
        return order.steps_per_pass(self.count, batch) * cfg.data_loader.repeats


def define_flag() -> None:
    """Adds --num_samples to a verb."""
    flags.DEFINE_integer("num_samples", None, _NUM_SAMPLES_HELP, lower_bound=1)


def known(cfg: ExperimentConfig, given: int | None = None, look: bool = True) -> Samples:
    """What is known of the samples of a valid config.

    Args:
      cfg: the config.
      given: samples in the folder `dataset.h5py_dir`, where its table is not here.
      look: whether the config's folders, if they are here, are the ones of the run. They are not
        where a container will have something else in their place.
    """
    data = cfg.dataset
    if not data.h5py_dir and given is None:
        return Samples(None, notes=("no dataset is given yet (dataset.h5py_dir)",))
    counts: list[int | None] = []
    problems, notes = [], []
    folders = {data.h5py_dir or "": data.dataset_percentage, **data.more_h5py_dirs}
    for folder, share in folders.items():
        first = folder == (data.h5py_dir or "")
        path = location(folder)
        if look and folder and isinstance(path, Path) and path.is_dir():
            try:
                counts.append(len(_listed(cfg, path, share, first)))
            except ValueError as e:
                problems.append(str(e))
            continue
        if folder:
            notes.append(f"the dataset {folder} is not looked into here")
        total = given if first and given is not None else _by_name(folder)
        kept = share * (1 - data.validation_fraction)  # about: blocks are kept or not
        counts.append(None if total is None else math.floor(total * kept))
    if problems:
        return Samples(None, tuple(problems), tuple(notes))
    if any(n is None for n in counts):
        notes.append("how many samples it has is not known; --num_samples=N tells")
        return Samples(None, notes=tuple(notes))
    count = sum(n for n in counts if n is not None)
    try:
        order.steps_per_pass(count, cfg.data_loader.global_batch_size)
    except ValueError as e:
        problems.append(str(e))
    return Samples(count, tuple(problems), tuple(notes))


def _listed(cfg: ExperimentConfig, folder: Path, share: float, first: bool) -> np.ndarray:
    """Numbers of the samples that the table of a folder lists and the config keeps."""
    data = cfg.dataset
    return index.chosen_numbers(
        folder,
        index.trained_names(data.training_modalities),
        filter_idx_file=data.filter_idx_file if first else None,
        dataset_percentage=share,
        seed=data.seed,
        validation_fraction=data.validation_fraction,
    )


def _by_name(folder: str) -> int | None:
    """A folder's number of samples, which is its name by custom."""
    name = folder.rstrip("/").rpartition("/")[2]
    return int(name) if name.isascii() and name.isdigit() and len(name) < 13 else None
