"""From labels and images to a run: what `launch.finetune` does."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.rasters import Raster
from olmoearth_jax.inference.model import PretrainedModel, load_pretrained
from olmoearth_jax.maps import (
    full_model,
    imagery,
    run_folder,
    run_report,
    scenes,
    stac,
    tile_map,
    token_head,
)
from olmoearth_jax.maps import labelled as labelling
from olmoearth_jax.maps import report as reporting
from olmoearth_jax.maps.archive_scenes import ArchiveOptions
from olmoearth_jax.maps.full_model import PixelReader
from olmoearth_jax.maps.labelled import Labelled, LabelOptions
from olmoearth_jax.maps.plan import Period
from olmoearth_jax.maps.samples import Target
from olmoearth_jax.maps.scenes import Scene
from olmoearth_jax.maps.token_cache import ImageTokens, Reader, Tokens, read_tokens
from olmoearth_jax.maps.token_head import HeadOptions
from olmoearth_jax.maps.tokens import Settings, TokenEncoder
from olmoearth_jax.outputs import SOFTWARE
from olmoearth_jax.proposals import known

MODES = ("probe", "full")
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """Which images there are; see `scenes`.

    Attributes:
      inputs: manifest, folder or file.
      name, modality, bands: of the rasters, where the manifest does not say.
      years, periods: one of them, or none.
      step: 'month' or 'date'.
      any_pixel_size, check_units: see `tools.embed`.
      items: what is said of STAC items.
    """

    inputs: str
    name: str | None = None
    modality: str | None = None
    bands: Sequence[str] = ()
    years: Sequence[str] = ()
    periods: Sequence[str] = ()
    step: str = "month"
    any_pixel_size: bool = False
    check_units: bool = True
    items: stac.Options = stac.Options()

    def rasters(self) -> tuple[list[Raster], list[str]]:
        """The rasters, and notes; see `imagery.list_rasters`."""
        return imagery.list_rasters(self.inputs, self.name, self.modality, self.bands, self.items)

    def open(self, rasters: Sequence[Raster], windows: Sequence[Period] | None = None) -> Any:
        """A context manager of the scenes; see `scenes.open_scenes`.

        Args:
          windows: take these instead of years and periods, as far as there are images.

        Raises:
          ValueError: see there; or no raster lies in any window.
        """
        if windows is None:
            spans = scenes.periods_of(self.years, self.periods)
        elif self.years or self.periods:
            raise ValueError("--months does not go with --years or --periods")
        else:
            spans = scenes.with_images(rasters, windows, self.step)
        return scenes.open_scenes(rasters, spans, self.step, self.any_pixel_size, self.check_units)


@dataclasses.dataclass(frozen=True)
class Options:
    """A run.

    Attributes:
      model: folder or published name.
      images, labels: what to learn from.
      output: folder of the run.
      mode: 'probe' or 'full'.
      settings: how windows become tokens.
      window, overlap: pixels of a window, and that tiles of the map share.
      batch: windows per call; does not change the results.
      head: how the head is trained.
      class_weights: 'auto', 'balanced', 'none' or a file of name -> weight.
      seed: of the split and the training.
    """

    model: str
    images: ImageOptions | ArchiveOptions
    labels: LabelOptions
    output: str
    mode: str = "probe"
    settings: Settings = Settings(4)
    window: int = 64
    overlap: int | None = None
    batch: int = 16
    head: HeadOptions = HeadOptions()
    class_weights: str = "auto"
    seed: int = 0

    @property
    def shared(self) -> int:
        """Pixels that tiles share: a quarter of the window by default, whole patches."""
        if self.overlap is not None:
            return self.overlap
        return self.window // 4 // self.settings.patch_size * self.settings.patch_size


def run(o: Options, say: Say = print) -> dict[str, Any]:
    """Trains a map as the options say; returns the report.

    Started again after a kill it goes on, to the same result.

    Raises:
      ValueError: what cannot be used; nothing is written then.
    """
    check(o)
    if o.mode == "full" and o.settings.pooling != "spatial":
        raise ValueError("--mode=full goes with --pooling=spatial")
    if o.overlap is not None:
        tile_map.check_overlap(o.window, o.overlap)
    folder = Path(o.output).expanduser()
    assert isinstance(o.images, ImageOptions)  # see `from_archive` for the other kind
    rasters, notes = o.images.rasters()
    model = load_pretrained(o.model)
    model.check_locations(o.settings.pooling, o.settings.patch_size, o.settings.location_size)
    windows = None if o.labels.months is None else o.labels.windows()
    with o.images.open(rasters, windows) as (opened, more):
        record = record_of(o, model, rasters, opened)
        step = o.settings.step if o.mode == "probe" else 1
        found = labelling.read(o.labels, opened, o.window, o.settings.patch_size, step, o.seed)
        found.notes[:0] = notes + more
        check_weights(o, found.target)
        if o.mode == "full":
            full_model.check_sizes(w.size for w in found.windows)
        fresh = not folder.exists()
        run_folder.claim(folder, record, {"software": SOFTWARE})
        with run_folder.alone(folder):
            done = folder / run_folder.REPORT
            if done.is_file():
                say(f"{folder} is finished already")
                return json.loads(done.read_text())
            for note in found.notes:
                say(note)
            say(_plan(o, found))
            return _train(o, folder, model, opened, found, fresh, say)


def check(o: Options) -> None:
    """Raises ValueError for options that mean nothing, whatever the images."""
    known("mode", o.mode, MODES)
    if not 0 < o.head.lr < math.inf:
        raise ValueError(f"--lr must be a number above 0, got {o.head.lr:g}")
    if o.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {o.seed}")
    o.labels.check()


def record_of(
    o: Options, model: PretrainedModel, rasters: Sequence[Raster], opened: Sequence[Scene]
) -> dict[str, Any]:
    """What determines the result of a run."""
    assert isinstance(o.images, ImageOptions)
    return settings_record(o) | {
        "model_digest": model.digest, "images": image_record(o.images, rasters, opened),
        "embedding": dataclasses.asdict(o.settings), "window": o.window, "overlap": o.shared,
    }  # fmt: skip


def settings_record(o: Options) -> dict[str, Any]:
    """What determines the result of a run, but for its images."""
    labels = dataclasses.asdict(o.labels)
    path = Path(labels.pop("path")).expanduser()
    if labels["months"] is None:
        labels.pop("months")  # as in runs that were begun before there was such a flag
    with path.open("rb") as file:
        labels["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if o.labels.colors:
        labels["colors"] = Path(o.labels.colors).expanduser().read_text()
    weights = o.class_weights
    if weights not in ("auto", "balanced", "none"):
        weights = read_weights(Path(weights))
    return {
        "mode": o.mode, "labels": labels, "head": dataclasses.asdict(o.head),
        "class_weights": weights, "seed": o.seed,
    }  # fmt: skip


def image_record(
    images: ImageOptions, rasters: Sequence[Raster], opened: Sequence[Scene]
) -> dict[str, Any]:
    """What determines the values of images, without the folders that they lie in.

    Tiles of a product have files of the same names, and often of the same sizes: the grids of the
    scenes tell them apart.
    """
    rows = []
    for raster in rasters:
        row = {k: v for k, v in dataclasses.asdict(raster).items() if v not in ("", (), [], None)}
        path = Path(row["path"])
        # The query of a URL holds a signature, which is another one every time.
        name = path.name.partition("?")[0] if "://" in row["path"] else path.name
        rows.append({**row, "path": name, "bytes": path.stat().st_size if path.exists() else 0})
    return {
        "rasters": rows, "years": list(images.years), "periods": list(images.periods),
        "step": images.step, "any_pixel_size": images.any_pixel_size,
        "grids": [_grid_of(scene) for scene in opened],
    }  # fmt: skip


def _grid_of(scene: Scene) -> dict[str, Any]:
    stack = scene.stack
    t: Any = stack.transform
    return {"period": scene.period.name, "crs": stack.crs.to_string(),
            "transform": [t.a, t.c, t.e, t.f], "shape": list(stack.shape)}  # fmt: skip


def read_weights(path: Path) -> dict[str, float]:
    """Weights by class name, of a .json object.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        held = json.loads(path.expanduser().read_text())
        found = {str(k): float(v) for k, v in held.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(
            f"--class_weights is 'balanced', 'none' or a .json file of weights by class; {path} "
            f"cannot be read: {e}"
        ) from None
    if not all(0 <= w <= 1e30 for w in found.values()) or not any(found.values()):
        raise ValueError(f"the weights in {path} must be numbers from 0 on, and not all 0")
    return found


def _plan(o: Options, found: Labelled) -> str:
    names = {s: len(found.split.rows(s)) for s in ("train", "valid", "test")}
    parts = ", ".join(f"{s} {n}" for s, n in names.items() if n)
    kind = "values" if found.target.classes is None else f"{len(found.target.classes)} classes"
    return f"{kind}; windows of {o.window} pixels: {parts}; written to {o.output}"


def weights_of(o: Options, target: Target, counts: np.ndarray, say: Say) -> np.ndarray | None:
    """Weight of each class in the loss, or None."""
    if target.classes is None:
        return None
    kind = o.class_weights
    if kind == "auto":
        kind = "balanced" if reporting.uneven(counts.tolist()) else "none"
        if kind == "balanced":
            say(
                "classes differ more than tenfold in size: they are weighted (--class_weights=none)"
            )
    if kind in ("balanced", "none"):
        return None if kind == "none" else reporting.class_weights(counts.tolist())
    held = read_weights(Path(kind))
    return np.array([held[c.name] for c in target.classes])


def check_weights(o: Options, target: Target) -> None:
    """Raises ValueError for weights of values, or a file that lacks a class or names others."""
    if target.classes is None and o.class_weights != "auto":
        raise ValueError("--class_weights are for classes, and the labels are values")
    if o.class_weights in ("auto", "balanced", "none") or target.classes is None:
        return
    held, names = read_weights(Path(o.class_weights)), [c.name for c in target.classes]
    if set(held) != set(names):
        raise ValueError(
            f"{o.class_weights} weights {', '.join(held)}; the classes are {', '.join(names)}"
        )


def read_splits(
    folder: Path, reader: Reader, opened: Sequence[Scene], found: Labelled,
    embed: Callable[[str], bool], fresh: bool, say: Say,
) -> dict[str, Tokens]:  # fmt: skip
    """The labelled tokens of every split that has any; those without data are counted.

    Args:
      embed: whether the embeddings of a split are needed.
      fresh: the folder was made just now; it goes if there is an error.

    Raises:
      ValueError: more than half have no data, or all of a split, or all of a class in training;
        or all in training weigh 0.
    """
    tokens = {
        s: read_tokens(reader, opened, found, s, folder / "cache", embed(s), say)
        for s in ("train", "valid", "test")
        if len(found.split.rows(s))
    }
    found.counts["on_nodata"] = sum(t.lost for t in tokens.values())
    if problem := _problem(found.target, tokens):
        if fresh:  # nothing is left of what cannot be
            shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(problem)
    return tokens


def _problem(target: Target, tokens: Mapping[str, Tokens]) -> str:
    """Why labels that have data cannot be learnt from; '' if they can."""
    lost = sum(t.lost for t in tokens.values())
    total = lost + sum(len(t.labels) for t in tokens.values())
    if 2 * lost > total:
        return f"{lost} of {total} labelled places have no image data in this period"
    for name, part in tokens.items():
        if not len(part.labels):
            return f"the {name} split has no label with image data"
    train = tokens["train"]
    counts = class_counts(target, train)
    if (counts == 0).any():
        names = ", ".join(
            c.name for c, n in zip(target.classes or (), counts, strict=True) if not n
        )
        return f"no training label with image data is of the classes {names}"
    if train.weights is not None and not train.weights.any():
        return "all labels of the training split have the weight 0"
    return ""


def class_counts(target: Target, train: Tokens) -> np.ndarray:
    """Labels of each class in training; none of values."""
    if target.classes is None:
        return np.zeros(0)
    return np.bincount(train.labels, minlength=len(target.classes))


def _train(
    o: Options, folder: Path, model: PretrainedModel, opened: Sequence[Scene], found: Labelled,
    fresh: bool, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Trains, scores the map that results, and writes the folder."""
    target, log = found.target, []
    probed = o.mode == "probe"
    encoder = (TokenEncoder if probed else PixelReader)(model, o.settings, o.batch)
    tokens = read_splits(
        folder, ImageTokens(encoder), opened, found, lambda s: probed and s != "test", fresh, say
    )
    train, valid = tokens["train"], tokens.get("valid", tokens["train"])
    counts = class_counts(target, train)
    weights = weights_of(o, target, counts, say)
    if probed:
        pairs = (train.x, train.labels), (valid.x, valid.labels)
        head = token_head.fit(target, *pairs, o.head, weights, log.append, train.weights)
        pixels: tile_map.PixelModel = tile_map.ProbedPixels(encoder, head, _channels(target))
        stored, scale = {"params": head.params, "stats": head.stats}, head.scale
        guesses = {s: head(t.x) for s, t in tokens.items() if s != "test"}
    else:
        parts = {"train": train, "valid": valid}
        windows = {s: [found.windows[i] for i in np.unique(t.window)] for s, t in parts.items()}
        pixels = full_model.fit(
            model, o.settings, opened, target, windows, o.head, weights, o.batch,
            folder / "cache", log.append,
        )  # fmt: skip
        stored, scale = pixels.params, pixels.scale
        guesses = {
            s: window_guesses(pixels, opened, found, t) for s, t in tokens.items() if s != "test"
        }
    say(f"trained for {len(log)} epochs")
    plain = o.head if probed else HeadOptions(seed=o.seed)
    raw = token_head.fit(
        target,
        (train.raw, train.labels),
        (valid.raw, valid.labels),
        plain,
        weights,
        weights=train.weights,
    )
    if "test" in tokens:
        guesses["test"], tokens["test"] = score_map(o, pixels, opened, found, tokens["test"])
    name = "head" if probed else "encoder"
    run_folder.save_arrays(folder / "weights" / f"{name}.npz", stored)
    task = _task(o, model, opened, target, scale, found, weights, counts)
    run_folder.write_json(folder / run_folder.TASK, task.to_json())
    baselines = {"raw bands": raw(tokens[run_report.scored_split(tokens)].raw)}
    return run_report.write(folder, o, found, tokens, guesses, baselines, counts, log, opened, say)


def window_guesses(
    model: tile_map.PixelModel, opened: Sequence[Scene], found: Labelled, tokens: Tokens
) -> np.ndarray:
    """What a model gives at labelled pixels within their own windows, float32 [N, K]."""
    out = np.zeros((len(tokens.labels), model.channels), np.float32)
    # Scene by scene: others may have windows of another size, or other numbers of timesteps.
    for scene in np.unique(tokens.scene):
        numbers = np.unique(tokens.window[tokens.scene == scene])
        for start in range(0, len(numbers), model.batch):
            part = numbers[start : start + model.batch]
            windows = [found.windows[i] for i in part]
            samples = [opened[w.scene].sample(w.row, w.col, *w.size) for w in windows]
            values, _ = model([s for s in samples if s is not None])
            for i, w, x in zip(part, windows, values, strict=True):
                mine = np.flatnonzero(tokens.window == i)
                out[mine] = x[tokens.row[mine] - w.row, tokens.col[mine] - w.col]
    return out


def _channels(target: Target) -> int:
    return 1 if target.classes is None else len(target.classes)


def score_map(
    o: Options, model: tile_map.PixelModel, opened: Sequence[Scene], found: Labelled, test: Tokens
) -> tuple[np.ndarray, Tokens]:  # fmt: skip
    """What the map of these images will show at the test samples, float32 [N, K], and they.

    The patches of the map's tiles lie elsewhere than those of the samples' windows: beside a hole
    in the images a sample may see data where the map has none. It is counted with those without.

    Raises:
      ValueError: the map shows none of them.
    """
    out = np.zeros((len(test.labels), model.channels), np.float32)
    shown = np.zeros(len(test.labels), bool)
    for number, scene in enumerate(opened):
        mine = np.flatnonzero(test.scene == number)
        if not len(mine):
            continue
        tiling = tile_map.tiling_of(scene.stack.shape, o.window, o.shared, model.patch)
        out[mine], shown[mine] = tile_map.map_pixels(
            model, scene, tiling, test.row[mine], test.col[mine]
        )
    if not shown.any():
        raise ValueError("the test split has no label where the map has data")
    found.counts["on_nodata"] += int((~shown).sum())
    return out[shown], test.where(shown)


def _task(
    o: Options, model: PretrainedModel, opened: Sequence[Scene], target: Target,
    scale: tuple[float, float], found: Labelled, weights: np.ndarray | None, counts: np.ndarray,
) -> run_folder.Task:  # fmt: skip
    names = [n for n in opened[0].stack.names if n in model.modalities]
    bands = {n: sorted({b for s in opened for b in s.stack.bands_of(n)}) for n in names
             if all(n in s.stack.names for s in opened)}  # fmt: skip
    more = {n for s in opened for n in s.stack.names if n in model.modalities} - set(bands)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    ranges = {n: [list(map(float, r)) for r in model.ranges[n]] for n in bands}
    about = {
        "column": o.labels.label_column or o.labels.value_column, "seed": o.seed,
        "overlap": o.shared, "labels": found.counts, "training_labels": counts.tolist(),
        "class_weights": None if weights is None else weights.tolist(),
        "normalization": ranges, "block": found.split.side, "created": now,
        "software": SOFTWARE, **({"some_images_show": sorted(more)} if more else {}),
    }  # fmt: skip
    steps = max(len(s.stack.dates) for s in opened)
    pixel = abs(opened[0].stack.transform.a)
    return run_folder.Task(
        o.mode, o.model, model.digest, o.settings, o.window, pixel, bands, steps, target, scale,
        about,
    )  # fmt: skip
