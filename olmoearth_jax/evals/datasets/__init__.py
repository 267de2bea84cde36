"""Readers of evaluation data sets: one class per format, found by the data set's key."""

from __future__ import annotations

from olmoearth_jax.configlib.tasks import EvalTaskConfig
from olmoearth_jax.evals.datasets.base import DataUnavailable, Reader
from olmoearth_jax.evals.datasets.brandenburg import Brandenburg
from olmoearth_jax.evals.tasks import check_task

__all__ = ["DataUnavailable", "Reader", "open_split", "reader_class", "why_unavailable"]


def reader_class(dataset: str) -> type[Reader]:
    """The reader of a data set, by its key."""
    return Brandenburg


def open_split(name: str, task: EvalTaskConfig, split: str) -> Reader:
    """Opens one split of a task's data.

    Raises:
      DataUnavailable: the files are not there; says which variable and layout are expected.
      ValueError: settings of the task that cannot work.
    """
    info = check_task(name, task)
    return reader_class(info.name)(task, info, split)


def why_unavailable(name: str, task: EvalTaskConfig) -> str | None:
    """Why the data of a task cannot be read, in one sentence; None if the files are there."""
    info = check_task(name, task)
    try:
        reader_class(info.name).check_available(task, info)
    except DataUnavailable as e:
        return str(e)
    return None
