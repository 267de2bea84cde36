"""Which maps a location grid can be trained to draw, one record per modality.

The records lie in ``supervision.json`` beside this file. A new map is one more record: a modality
that a user registers brings its own under the member ``supervision``, of the same form.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.modalities import closest

_TASKS = ("classification", "binary_classification", "regression")
_REGRESSION_LOSSES = ("l1", "mse")

_RECORDS: dict[str, Mapping[str, Any]] = json.loads(
    (Path(__file__).parent / "supervision.json").read_text()
)["maps"]
_MEMBERS = ("task_type", "weight", "scale", "codes", "pos_weight", "regression_loss_type")
_LARGEST_CODE = 1 << 24
"""Codes up to here are exact in float32."""


@dataclasses.dataclass(frozen=True)
class MapTask:
    """One map as a target.

    Attributes:
      name: its modality.
      task_type: 'classification' (one class per pixel), 'binary_classification' (yes or no per
        channel) or 'regression'.
      channels: values that the head gives per pixel.
      weight: of its loss.
      class_values: value of each class as the loss looks it up; () unless a classification.
      known_values: value of each class in the units of the data set; () if not known.
      ignore_unknown: pixels with a value off `known_values` are left out.
      pos_weight: weigh the rare answer of each channel up.
      regression_loss_type: 'l1' or 'mse'.
    """

    name: str
    task_type: str
    channels: int
    weight: float = 1.0
    class_values: tuple[float, ...] = ()
    known_values: tuple[float, ...] = ()
    ignore_unknown: bool = False
    pos_weight: bool = False
    regression_loss_type: str = "l1"

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise ValueError(f"supervision by {self.name!r}: {problem}")

    def _problem(self) -> str:
        if self.task_type not in _TASKS:
            return f"unknown task_type {self.task_type!r}; {closest(self.task_type, _TASKS)}"
        if self.regression_loss_type not in _REGRESSION_LOSSES:
            known = closest(self.regression_loss_type, _REGRESSION_LOSSES)
            return f"unknown regression_loss_type {self.regression_loss_type!r}; {known}"
        if self.channels < 1:
            return f"num_output_channels must be positive, got {self.channels}"
        if not 0 <= self.weight < float("inf"):
            return f"weight must be a number that is not negative, got {self.weight}"
        bands = modalities.get(self.name).num_bands
        if self.task_type != "classification":
            if self.channels != bands:
                return f"num_output_channels must be its {bands} bands, got {self.channels}"
            return ""
        if bands != 1:
            return f"class_values need a map with one band, this one has {bands}"
        if not self.class_values:
            return "a classification needs class_values"
        if len(self.class_values) != self.channels:
            return (
                f"num_output_channels is {self.channels}, but class_values has "
                f"{len(self.class_values)}"
            )
        return ""


def codes_of(record: Mapping[str, Any]) -> tuple[int, ...]:
    """The codes of a record's classes, in order; ranges [first, last] are written out."""
    out: list[int] = []
    for entry in record.get("codes", ()):
        first, last = entry if isinstance(entry, list | tuple) else (entry, entry)
        out.extend(range(int(first), int(last) + 1))
    return tuple(out)


def names() -> tuple[str, ...]:
    """Modalities that have a record, ours first."""
    own = [n for n, r in modalities.user_records().items() if "supervision" in r]
    return (*_RECORDS, *own)


def record_of(name: str) -> Mapping[str, Any]:
    """The record of a modality, checked.

    Raises:
      ValueError: there is none, or it is malformed; the message says how.
    """
    name = modalities.get(name).name
    record = _RECORDS.get(name) or modalities.user_records().get(name, {}).get("supervision")
    if record is None:
        raise ValueError(
            f"modality {name!r} has no record as a map for supervision; {closest(name, names())}"
        )
    if problem := _record_problem(record):
        raise ValueError(f"supervision record of {name!r}: {problem}")
    return record


def _record_problem(record: Any) -> str:
    if not isinstance(record, Mapping):
        return f"it must be an object, got {record!r}"
    for key in record:
        if key not in _MEMBERS:
            return f"unknown member {key!r}; {closest(str(key), _MEMBERS)}"
    if "task_type" not in record:
        return "it has no task_type"
    if record["task_type"] == "classification":
        if not isinstance(record.get("codes"), list | tuple) or not record["codes"]:
            return "a classification needs codes, a list of whole numbers or of [first, last]"
        for entry in record["codes"]:
            ends: list[Any] = list(entry) if isinstance(entry, list | tuple) else [entry, entry]
            whole = len(ends) == 2 and all(_whole(e) and 0 <= e <= _LARGEST_CODE for e in ends)
            if not whole or ends[0] > ends[1]:
                return f"codes must be whole numbers or ranges [first, last], got {entry!r}"
        if len(set(codes_of(record))) != len(codes_of(record)):
            return "codes has the same code twice"
    scale = record.get("scale", 1)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e30:
        return f"scale must be a positive number, got {scale!r}"
    return ""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def data_values(name: str, codes: Iterable[int]) -> tuple[float, ...]:
    """What the data set makes of the codes of a one-band map, rounded to float32 as there."""
    lo_hi = modalities.get(name).norm_range()
    x = np.asarray(list(codes), np.float64)
    if lo_hi is not None:
        lo, hi = (float(v[0]) for v in lo_hi)
        x = (x - lo) / (hi - lo)
    return tuple(float(v) for v in x.astype(np.float32))


def task_of(name: str, base_weight: float = 1.0, fix_class_values: bool = False) -> MapTask:
    """The task that the registry has for a modality.

    Args:
      name: the modality.
      base_weight: factor on the weight of the record.
      fix_class_values: look classes up in the units of the data set and leave out pixels whose
        code is off the table. The reference does neither: WorldCover's classes come out shifted
        by two, and CDL's background as corn (spec/train_v1_3.md 11.2, S1 and S2).

    Raises:
      ValueError: no record, or a malformed one.
    """
    record, name = record_of(name), modalities.get(name).name
    codes = codes_of(record)
    known = data_values(name, codes)
    scale = record.get("scale")
    by_scale = known if scale is None else tuple(c / scale for c in codes)
    return MapTask(
        name=name,
        task_type=record["task_type"],
        channels=len(codes) or modalities.get(name).num_bands,
        weight=base_weight * float(record.get("weight", 1.0)),
        class_values=known if fix_class_values else by_scale,
        known_values=known,
        ignore_unknown=fix_class_values and bool(codes),
        pos_weight=bool(record.get("pos_weight", False)),
        regression_loss_type=record.get("regression_loss_type", "l1"),
    )


@functools.lru_cache(maxsize=64)
def spacing(values: tuple[float, ...]) -> float:
    """Smallest distance between two class values; inf for a single class."""
    ordered = np.sort(np.asarray(values, np.float64))
    return float(np.diff(ordered).min()) if len(ordered) > 1 else float("inf")
