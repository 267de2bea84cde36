"""One page for a training run: curves, pictures, settings and evaluations in a single file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax import html_page, outputs
from olmoearth_jax.checkpoints import integrity
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib.official import official
from olmoearth_jax.configlib.values import too_deep
from olmoearth_jax.evals import runner
from olmoearth_jax.files import write_atomically
from olmoearth_jax.html_page import escaped
from olmoearth_jax.train.comparison import series
from olmoearth_jax.train.metrics import is_timing, read_metrics
from olmoearth_jax.train.runfolder import RunFolder

NAME = "report.html"
_PNG = b"\x89PNG\r\n\x1a\n"


def write(run: Path, overwrite: bool = False) -> Path:
    """Writes the page of a run into its folder.

    Raises:
      ValueError: no run there, or a page that is not of this program.
    """
    path = run / NAME
    outputs.check(path, overwrite=overwrite)
    write_atomically(path, page(run))
    return path


def page(run: Path) -> str:
    """The page of a run.

    Raises:
      ValueError: the folder holds no metrics or config.
    """
    if (run / "job.json").is_file():  # as `maps.run_folder` names it; importing that takes long
        raise ValueError(f"{run} is a run of launch.finetune, which writes its own page at its end")
    records = read_metrics(run)
    config = run / "config.json"
    if not config.is_file():
        raise ValueError(f"{run} is no run folder: it has no config.json")
    try:
        cfg = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{config} cannot be read: {e}") from None
    if not isinstance(cfg, dict) or too_deep(cfg):
        raise ValueError(f"{config} cannot be read: it is no object, or one nested without end")
    name = str(_part(cfg, "common").get("run_name", run.name))
    parts = [f"<h1>{escaped(name)}</h1>", _head(records, cfg)]
    parts += ["<h2>Curves</h2>", *_curves(records)]
    if pictures := _pictures(RunFolder(run).pictures):
        parts += ["<h2>Pictures</h2>", pictures]
    if table := _evaluations(run / "evals"):
        parts += ["<h2>Evaluations</h2>", table]
    parts += ["<h2>Settings</h2>", _settings(cfg)]
    return html_page.document(name, parts)


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A member that is a mapping; an empty one where it is not, since files may hold anything."""
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    return html_page.table(head, [[escaped(cell) for cell in row] for row in rows], words)


def _head(records: Sequence[Mapping[str, Any]], cfg: Mapping[str, Any]) -> str:
    last = max((r["step"] for r in records), default=0)
    common, data = _part(cfg, "common"), _part(cfg, "dataset")
    names, share = common.get("training_modalities"), data.get("validation_fraction", 0)
    part = f"{100 * share:g} %" if type(share) in (int, float) and 0 <= share <= 1 else share
    rows = [
        ["recipe", common.get("recipe") or "own"],
        ["steps so far", f"{last:,}"],
        ["modalities", ", ".join(map(str, names)) if isinstance(names, list) else ""],
        ["dataset", data.get("h5py_dir") or ""],
        ["kept out for validation", part],
    ]
    for name in ("train/loss", "val/loss"):
        if found := [v for _, v in series(records, name) if math.isfinite(v)]:
            rows.append([name, f"{found[-1]:.4g} (first {found[0]:.4g})"])
    return _table(["", ""], rows, words=2)


def _curves(records: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {n for r in records for n in r}
    chosen = [n for n in names if n.startswith(("train/", "val/", "eval")) and not is_timing(n)]
    first = [n for n in ("train/loss", "val/loss") if n in chosen]
    rest = sorted(n for n in chosen if n not in first)
    return [_curve(records, name) for name in [*first, *rest, "optim/LR (group 0)"]]


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> str:
    color = html_page.RED if name.startswith(("val/", "eval")) else html_page.BLUE
    return html_page.curve(name, series(records, name), "step", color)


def _pictures(folder: Path) -> str:
    """Those of the first step beside the newest."""
    out = []
    for path in sorted(filter(Path.is_file, folder.glob("*.png")), key=_order):
        about, content = path.stem.replace("_", " "), path.read_bytes()
        if content.startswith(_PNG):  # the page is passed on: it takes in no other file
            out.append(html_page.figure(html_page.image(content, about), escaped(about)))
    return "".join(out)


def _order(path: Path) -> tuple[str, int]:
    found = re.fullmatch(r"(.*)_step_(\d+)", path.stem)
    return (found[1], int(found[2])) if found else (path.stem, 0)


def _evaluations(folder: Path) -> str:
    if not (folder / runner.LINES).is_file():
        return ""
    rows = []
    found = [item for item in runner.read_lines(folder) if _is_result(item)]
    # A run that stopped and went on may have evaluated a step twice: the last counts.
    for item in {runner.identity(item): item for item in found}.values():
        valid, test = (_score(item.get(part)) for part in ("valid", "test"))
        metric = (item.get("valid") or item.get("test") or {}).get("primary_key", "")
        about = (item.get(key, "") for key in ("task", "mode"))
        rows.append([*map(str, about), metric, str(item.get("checkpoint_step", "")), valid, test])
    return _table(["task", "mode", "metric", "step", "valid", "test"], rows, words=3)


def _is_result(item: Any) -> bool:
    parts = ("settings", "valid", "test")
    return all(isinstance(item.get(p) or {}, Mapping) for p in parts)


def _score(found: Mapping[str, Any] | None) -> str:
    value = (found or {}).get("primary")
    number = isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)
    return f"{value:.4f}" if number else ""


def _settings(cfg: Mapping[str, Any]) -> str:
    """What differs from the official recipe that the run was made from, or from the defaults."""
    size, version, *_ = [*str(_part(cfg, "common").get("recipe", "")).split(), "", ""]
    try:
        base, what = official(size, version), f"the official {size}, {version}"
    except (ValueError, KeyError):
        base, what = ExperimentConfig(), "the defaults"
    there = base.to_dict()
    lines = integrity.config_differences(_folded(there, cfg), _folded(cfg, there), ignored=())
    rows = []
    for line in lines:
        path, _, change = line.partition(": ")
        before, _, now = change.partition(" -> ")
        rows.append([path, _short(before), _short(now)])
    return f"<p>Different from {escaped(what)}:</p>" + _table(["", "there", "here"], rows, words=3)


def _folded(mine: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A config in which a group that the other lacks is its names: one row, not one a setting."""
    out = {}
    for name, value in mine.items():
        if isinstance(value, Mapping) and value:
            theirs = other.get(name)
            if isinstance(theirs, Mapping) and theirs:
                value = _folded(value, theirs)
            else:
                value = ", ".join(value)
        out[name] = value
    return out


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:110]} ..."
