"""What the attributes of a labelled array say of its values: missing, valid, packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def filled(array: Any) -> np.ndarray:
    """The values of a DataArray in its shape, NaN where its attributes say that there are none.

    Those without gaps keep their dtype; others become float32 (of 8 or 16 bits) or float64.

    Raises:
      ValueError: a scale or offset is told but not applied, or attributes that are unclear.
    """
    for key, neutral in (("scale_factor", 1), ("add_offset", 0), ("scales", 1), ("offsets", 0)):
        told = np.asarray(array.attrs.get(key, neutral), float)
        if not (told == neutral).all():
            raise ValueError(
                f"its attribute {key} is {np.ravel(told)[0]:g} and has not been applied: open "
                "the file with mask_and_scale=True, or remove the attribute if the values are "
                "right as they are"
            )
    values = np.asarray(array.values)
    if values.dtype.kind not in "iuf":
        return values
    gone = np.zeros(values.shape, bool)
    for absent in _absent(array.attrs):
        # 1e20 as float64 is not the 1e20 of a float32 image.
        gone |= values == (values.dtype.type(absent) if values.dtype.kind == "f" else absent)
    low, high = _valid_range(array)
    gone |= (values < low) | (values > high)
    if not gone.any():
        return values
    out = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    out[gone] = np.nan
    return out


def _absent(attrs: Mapping[Any, Any]) -> set[float]:
    """The values that mean 'missing', under the names of readers; one under each, or ValueError."""
    out = set()
    for key in ("_FillValue", "missing_value", "nodata", "nodatavals"):
        told = np.ravel(np.asarray(attrs.get(key), float))  # None is NaN
        found = set(told[~np.isnan(told)].tolist())
        if len(found) > 1:
            raise ValueError(f"its attribute {key} holds several values: set NaN and remove it")
        out |= found
    return out


def _valid_range(array: Any) -> tuple[float, float]:
    """The least and greatest value that an array calls valid (CF conventions, section 2.5.1).

    Raises:
      ValueError: they are no numbers, or not as many as they should be.
    """
    attrs, packing = array.attrs, getattr(array, "encoding", {})
    try:
        low, high = (
            attrs.get(key, end) for key, end in (("valid_min", -np.inf), ("valid_max", np.inf))
        )
        low, high = np.asarray(attrs.get("valid_range", (low, high)), float).reshape(2)
        # They are written in the units of the file, which a reader may have unpacked.
        factor = float(packing.get("scale_factor", 1))
        low, high = (x * factor + float(packing.get("add_offset", 0)) for x in (low, high))
    except (TypeError, ValueError):
        raise ValueError(
            "its attributes valid_min and valid_max must be numbers, and valid_range two of them: "
            "correct or remove them"
        ) from None
    # Unpacking rounds.
    slack = 1e-6 * max(abs(x) for x in (low, high, 0) if np.isfinite(x)) if factor != 1 else 0.0
    return min(low, high) - slack, max(low, high) + slack
