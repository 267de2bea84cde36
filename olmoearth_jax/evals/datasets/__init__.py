"""Readers of evaluation data sets: one class per format, found by the data set's key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from olmoearth_jax.configlib.tasks import (
    OWN,
    DatasetInfo,
    EvalTaskConfig,
    check_task,
    modalities_of,
)
from olmoearth_jax.evals.datasets import pretrain, windowed
from olmoearth_jax.evals.datasets.base import DataUnavailable, Reader, of_another_form
from olmoearth_jax.evals.datasets.geobench import GeoBench, GeoBench2
from olmoearth_jax.evals.datasets.pretrain import (
    Brandenburg,
    PretrainSubset,
    SimilarButDifferent,
)
from olmoearth_jax.evals.datasets.series import BreizhCrops, CropHarvest, Sickle
from olmoearth_jax.evals.datasets.tensors import FiftyCities, Mados, Pastis, Sen1Floods11
from olmoearth_jax.evals.datasets.windowed import Windowed

__all__ = [
    "DataUnavailable",
    "Reader",
    "open_split",
    "split_available",
    "state_of",
    "why_unavailable",
]

_PREFIXES: dict[str, type[Reader]] = {
    "pretrain_subset": PretrainSubset,
    "gb2-": GeoBench2,
    "m-": GeoBench,
    "mados": Mados,
    "sen1floods11": Sen1Floods11,
    "pastis_year_aligned": Windowed,
    "pastis": Pastis,
    "fifty_cities": FiftyCities,
    "breizhcrops": BreizhCrops,
    "cropharvest": CropHarvest,
    "sickle": Sickle,
    "brandenburg": Brandenburg,
    "similar_but_different": SimilarButDifferent,
}
"""Which reader a data set's key names, by its beginning; all others are windowed rasters."""


def _reader_class(dataset: str) -> type[Reader]:
    """The reader of a data set, by its key."""
    if dataset in OWN:
        return Windowed
    return next((r for prefix, r in _PREFIXES.items() if dataset.startswith(prefix)), Windowed)


def open_split(name: str, task: EvalTaskConfig, split: str) -> Reader:
    """Opens one split of a task's data.

    Raises:
      DataUnavailable: the files are not there; says which variable and layout are expected.
      ValueError: settings of the task that cannot work.
    """
    info = check_task(name, task)
    with of_another_form(f"the {split} split of {info.name!r}"):
        reader = _reader_class(info.name)(task, info, split)
    if not len(reader):
        raise ValueError(f"the {split} split of {info.name!r} is empty")
    return reader


def state_of(task: EvalTaskConfig, info: DatasetInfo) -> str | None:
    """What tells a user's own data from what it was before; None for published data."""
    if info.folder:
        return windowed.state_of(info.folder)
    return None if task.h5py_dir is None else pretrain.state_of(task.h5py_dir)


def why_unavailable(name: str, task: EvalTaskConfig) -> str | None:
    """Why the data of a task cannot be read, in one sentence; None if the files are there."""
    info = check_task(name, task)
    try:
        _reader_class(info.name).find(task, info)
    except DataUnavailable as e:
        return str(e)
    return None


def split_available(
    tasks: Mapping[str, EvalTaskConfig], modalities: Sequence[str] | None
) -> tuple[dict[str, EvalTaskConfig], dict[str, str]]:
    """Tasks that can run, and for the others the reason why not.

    Args:
      modalities: what the model takes; None does not check it.

    Raises:
      ValueError: a task's settings are wrong.
    """
    able, skipped = {}, {}
    for name, task in tasks.items():
        info = check_task(name, task)
        missing = [m for m in modalities_of(task, info) if modalities and m not in modalities]
        if missing:
            skipped[name] = f"the model does not take {', '.join(missing)}"
        elif reason := why_unavailable(name, task):
            skipped[name] = reason
        else:
            able[name] = task
    return able, skipped
