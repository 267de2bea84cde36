"""Checks this code against recorded outputs of the reference.

  python -m tools.check_goldens --goldens=DIR [--area=AREA]

AREA is one of model, model_v1_3, data, train, train_v1_3, evals, maps.

DIR holds one folder per area, or is itself the folder of one area. Prints one line per case (name,
status, worst error, tolerance, reason) and last 'N passed, N failed, N skipped'. Exits 1 if any
case failed or none was found.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from olmoearth_jax import commands
from olmoearth_jax.modalities import closest

from .goldens.common import Case, Result, load_json, skipped

AREAS = ("model", "model_v1_3", "data", "train", "train_v1_3", "evals", "maps")

_GOLDENS = flags.DEFINE_string("goldens", None, "Folder of all areas, or of one.")
_AREA = flags.DEFINE_string("area", None, f"Only this area: {', '.join(AREAS)}.")
_FAILURES_ONLY = flags.DEFINE_bool("failures_only", False, "Print only cases that did not pass.")


def area_of(folder: Path) -> str | None:
    """The area a folder holds, told by its manifest, or None if it holds none.

    Raises:
      ValueError: the manifest is malformed, or of no known area.
    """
    if not (folder / "manifest.json").is_file():
        return None
    manifest = load_json(folder / "manifest.json")
    if not isinstance(manifest, dict):
        raise ValueError(f"golden manifest is not an object: {folder / 'manifest.json'}")
    if "h5_dirs" in manifest:
        return "data"
    if manifest.get("suite") in ("train", "train_v1_3"):
        return manifest["suite"]
    if manifest.get("area") in ("evals", "maps"):
        return manifest["area"]
    if "cases" in manifest:
        return "model_v1_3" if "releases" in manifest or "package" in manifest else "model"
    if folder.name in AREAS:
        return folder.name
    raise ValueError(f"cannot tell the area of the golden manifest {folder / 'manifest.json'}")


def find_areas(root: Path, only: str | None) -> dict[str, Path]:
    """Golden folders by area.

    Raises:
      ValueError: the folder does not exist, or holds no goldens (of the area asked for).
    """
    if only is not None and only not in AREAS:
        raise ValueError(f"unknown area {only!r}; {closest(only, AREAS)}")
    if not root.is_dir():
        raise ValueError(f"golden folder does not exist: {root}")
    own = area_of(root)
    found = {own: root} if own else {}
    if not own:
        for area in AREAS:
            if (root / area / "manifest.json").is_file():
                found[area] = root / area
    if only is not None:
        found = {a: p for a, p in found.items() if a == only}
    if not found:
        what = f"goldens of area {only!r}" if only else "goldens (no manifest.json)"
        raise ValueError(f"found no {what} in {root}")
    return found


def area_cases(area: str, folder: Path) -> Iterator[Case]:
    """The cases of one area; all skipped if the area has no checker."""
    name = f"{__package__}.goldens.{area}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        yield from (skipped(n, "not built yet") for n in _manifest_names(folder))
        return
    try:
        yield from module.cases(folder)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"golden folder {folder} is malformed: {e!r}") from e


def _manifest_names(folder: Path) -> list[str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("cases", "files"):
        items = manifest.get(key)
        if isinstance(items, dict):
            return list(items)
        if isinstance(items, list):
            return [str(i.get("name", i)) if isinstance(i, dict) else str(i) for i in items]
    return [folder.name]


def run_case(case: Case) -> Result:
    """Runs a case; an exception is a failure that shows its message."""
    try:
        return case.run()
    except Exception as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Result(status="failed", reason=f"{type(e).__name__}: {e} ({where})")


def _line(name: str, result: Result) -> str:
    error = "-" if result.worst_error != result.worst_error else f"{result.worst_error:.3g}"
    tolerance = result.tolerance
    text = f"{tolerance:.3g}" if isinstance(tolerance, float) else str(tolerance) or "-"
    reason = f"  ({result.reason})" if result.reason else ""
    return f"{name:<64} {result.status:<8} worst {error:<10} tolerance {text}{reason}"


def check(root: Path, only: str | None = None, failures_only: bool = False) -> dict[str, int]:
    """Runs all cases below `root`, printing each; returns the number of each status.

    Raises:
      ValueError: nothing to check, or a malformed golden folder.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for area, folder in find_areas(root, only).items():
        for case in area_cases(area, folder):
            result = run_case(case)
            counts[result.status] += 1
            if not failures_only or result.status != "passed":
                print(_line(f"{area}/{case.name}", result), flush=True)
    return counts


def main() -> None:
    if not _GOLDENS.value:
        raise app.UsageError("give the folder: --goldens=DIR")
    counts = check(Path(_GOLDENS.value), _AREA.value, _FAILURES_ONLY.value)
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
    sys.exit(1 if counts["failed"] or not sum(counts.values()) else 0)


if __name__ == "__main__":
    commands.run_alone(main)
