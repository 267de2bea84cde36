"""What every golden area shares: the case, its result, and how arrays are compared.

An area is a folder of recorded inputs and outputs. Its module yields one `Case` per recorded
item; running a case gives a `Result`. `tools.check_goldens` runs and prints them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

Status = Literal["passed", "failed", "skipped"]


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of one case.

    Attributes:
      worst_error: largest absolute error met (in the case's own unit; nan if nothing compared).
      tolerance: what it was held to, a number or a few words.
      status: 'passed', 'failed' or 'skipped'.
      reason: why it was skipped or failed.
    """

    worst_error: float = float("nan")
    tolerance: float | str = ""
    status: Status = "passed"
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded item: a name and a function that runs it."""

    name: str
    run: Callable[[], Result]


def skipped(name: str, reason: str) -> Case:
    """A case that is reported as skipped for `reason`."""
    return Case(name, lambda: Result(status="skipped", reason=reason))


def compare(actual: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> float:
    """Worst of |actual - expected| / (atol + rtol |expected|): within tolerance if <= 1.

    NaNs match NaNs and infinities match equal infinities. With both tolerances 0 an exact match
    gives 0 and anything else inf. Empty arrays of equal shape give 0.

    Raises:
      ValueError: the shapes differ.
    """
    a, e = np.asarray(actual), np.asarray(expected)
    if a.shape != e.shape:
        raise ValueError(f"shape {a.shape} differs from the recorded {e.shape}")
    same = a == e
    if a.dtype.kind in "fc" and e.dtype.kind in "fc":
        same |= np.isnan(a) & np.isnan(e)
    if same.all():
        return 0.0
    with np.errstate(all="ignore"):
        error = np.abs(a[~same].astype(np.float64) - e[~same].astype(np.float64))
        ratio = error / (atol + rtol * np.abs(e[~same].astype(np.float64)))
    return float(np.max(np.where(np.isnan(ratio), np.inf, ratio)))


def worst_absolute(actual: Any, expected: Any) -> float:
    """Largest |actual - expected| over non-equal elements; inf where only one is NaN."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    same = (a == e) | (np.isnan(a) & np.isnan(e))
    with np.errstate(all="ignore"):
        error = np.where(same, 0.0, np.abs(a - e))
    return float(np.max(np.where(np.isnan(error), np.inf, error), initial=0.0))


class Checks:
    """Gathers comparisons of one case into a `Result`.

    Args:
      rtol: relative tolerance of `array` unless overridden there.
      atol: absolute tolerance of `array` unless overridden there.
    """

    def __init__(self, rtol: float = 0.0, atol: float = 0.0):
        self.rtol, self.atol = rtol, atol
        self.worst, self.problems = 0.0, []

    def array(
        self,
        what: str,
        actual: Any,
        expected: Any,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> None:
        """Holds `actual` to `expected`; a shape difference or an excess is a problem."""
        rtol, atol = self.rtol if rtol is None else rtol, self.atol if atol is None else atol
        try:
            ratio = compare(actual, expected, rtol, atol)
        except ValueError as e:
            self.problems.append(f"{what}: {e}")
            return
        error = worst_absolute(actual, expected)
        self.worst = max(self.worst, error)
        if ratio > 1:
            self.problems.append(f"{what}: off by {error:.3g}, allowed {atol:g} + {rtol:g} |ref|")

    def equal(self, what: str, actual: Any, expected: Any) -> None:
        """Holds two plain values (strings, numbers, lists) to equality."""
        if actual != expected:
            self.problems.append(
                f"{what}: {_short(actual)} differs from the recorded {_short(expected)}"
            )

    def true(self, what: str, condition: Any) -> None:
        """Records `what` as a problem unless `condition`."""
        if not condition:
            self.problems.append(what)

    def result(self, tolerance: float | str | None = None) -> Result:
        """The result; the tolerance defaults to this object's own."""
        if tolerance is None:
            tolerance = (
                "exact"
                if not (self.rtol or self.atol)
                else (self.atol if not self.rtol else f"{self.atol:g} + {self.rtol:g} |ref|")
            )
        if self.problems:
            return Result(self.worst, tolerance, "failed", "; ".join(self.problems[:3]))
        return Result(self.worst, tolerance)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@functools.lru_cache(maxsize=64)
def load_json(path: Path) -> Any:
    """The parsed JSON file.

    Raises:
      ValueError: missing or malformed file; the message names it.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"golden file is missing: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"golden file is not valid JSON: {path}: {e}") from e


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, read once per path.

    Raises:
      ValueError: missing or malformed file; the message names it.
    """
    return _load_npz(Path(path))


@functools.lru_cache(maxsize=16)
def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as f:
            return {k: f[k] for k in f.files}
    except FileNotFoundError:
        raise ValueError(f"golden file is missing: {path}") from None
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"golden file is not a readable .npz: {path}: {e}") from e
