"""Starts a run from weights that fit only in part: fewer or more modalities, a new sensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from olmoearth_jax.checkpoints import integrity
from olmoearth_jax.checkpoints.checkpoint import State, load_item, read_meta
from olmoearth_jax.mesh import path_text

ITEMS = ("params", "target")
Report = dict[str, list[str]]
"""'taken', 'fresh' and 'left_over' -> paths of parameters, item first."""


def compare(saved: Mapping[str, Mapping], wanted: Mapping[str, Mapping]) -> Report:
    """What of saved items fits wanted ones.

    Args:
      saved, wanted: item -> {path: [shape, dtype]}, as `integrity.describe` gives it.

    Raises:
      ValueError: a parameter of the same path has another shape, or none has the same path.
    """
    report: Report = {"taken": [], "fresh": [], "left_over": []}
    wrong = []
    for item, leaves in wanted.items():
        held = saved.get(item, {})
        for path, form in leaves.items():
            if path not in held:
                report["fresh"].append(f"{item}/{path}")
            elif list(held[path][0]) != list(form[0]):
                wrong.append(f"{item}/{path} is {list(held[path][0])}, wanted {list(form[0])}")
            else:
                report["taken"].append(f"{item}/{path}")
        report["left_over"] += [f"{item}/{path}" for path in held if path not in leaves]
    if wrong:
        raise ValueError(
            "trainer.load_partial takes parameters whose shapes agree, but "
            + "; ".join(wrong[:10])
            + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        )
    if not any(path.startswith("params/") for path in report["taken"]):
        raise ValueError("trainer.load_partial found no parameter that this model has too")
    return report


def restore(step_folder: Path, abstract: State, fresh: Callable[[], State]) -> tuple[State, Report]:
    """State of a new run with all parameters that a checkpoint has, the rest drawn anew.

    Args:
      step_folder: checkpoint of any model.
      abstract: the state wanted, of shapes and shardings.
      fresh: draws such a state; optimiser and step stay as it gives them.

    Raises:
      ValueError: see `compare`.
    """
    meta = read_meta(step_folder)
    wanted = {item: integrity.describe(abstract[item]) for item in ITEMS if item in abstract}
    report = compare(meta["items"], wanted)
    state = fresh()
    for item in wanted:
        if item in meta["items"]:
            held = integrity.leaf_paths(load_item(step_folder, item))
            state[item] = _replaced(state[item], held)
    return state, report


def _replaced(tree: Any, held: Mapping[str, Any]) -> Any:
    """`tree` with the leaves that `held` has under the same path, on the same devices."""

    def replace(path: Any, leaf: Any) -> Any:
        name = path_text(path)
        return _placed(np.asarray(held[name]), leaf) if name in held else leaf

    return jax.tree_util.tree_map_with_path(replace, tree)


def _placed(values: np.ndarray, like: Any) -> Any:
    values = values.astype(like.dtype)
    if not isinstance(like, jax.Array):
        return values
    return jax.make_array_from_callback(values.shape, like.sharding, lambda part: values[part])


def told(report: Report) -> str:
    """One line for the log."""
    counts = {key: len(paths) for key, paths in report.items()}
    modules = sorted({"/".join(path.split("/")[1:4]) for path in report["fresh"]})
    shown = ", ".join(modules[:6]) + (", ..." if len(modules) > 6 else "")
    return (
        f"{counts['taken']} parameters taken, {counts['fresh']} drawn anew"
        f"{f' ({shown})' if shown else ''}, {counts['left_over']} of the source left over; all are "
        "listed in config.json under trainer.loaded"
    )
