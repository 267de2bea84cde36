"""Whether pretraining has taught features anything: trained against untrained, and raw bands.

    python -m tools.learned local_output/learn_1 local_output/learn_2 local_output/learn_3

Evaluates the encoders of the runs, the same encoders before their first step (of the same seeds),
and the raw bands of the same patches, on the packaged land-use task by kNN and linear probe. Prints
means over the seeds with 95 % intervals (Student's t), the difference that training made, and
whether that interval leaves out 0. `make learn` trains the runs and calls this. `--picture` shows
what the first run made of its features.
"""

from __future__ import annotations

import colorsys
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from absl import logging as absl_logging

from olmoearth_jax import commands, modalities, outputs
from olmoearth_jax.checkpoints import checkpoint
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib import tasks
from olmoearth_jax.evals import models
from olmoearth_jax.evals.datasets import open_split
from olmoearth_jax.evals.embeddings import (
    EmbeddingModel,
    EncoderModel,
    Extraction,
    Samples,
    extract,
    fit_pca,
    pooling_of,
)
from olmoearth_jax.evals.runner import Hooks, run_task
from olmoearth_jax.files import replacing
from olmoearth_jax.images import RGB, png
from olmoearth_jax.model import latent_mim

TASKS = ("brandenburg_knn", "brandenburg_probe")
SPLITS = ("valid", "test")

FLAGS = flags.FlagValues()
"""This program's own flags; other programs have flags of the same names."""

_PATCH = flags.DEFINE_integer(
    "patch_size", 2, "Side of a patch in pixels.", lower_bound=1, flag_values=FLAGS
)
_PICTURE = flags.DEFINE_string(
    "picture", None, "PNG file of images, land use and the features of the first run.",
    flag_values=FLAGS,
)  # fmt: skip

_SHOWN, _ZOOM, _GAP = 3, 3, 6

Scores = dict[tuple[str, str], float]
"""(task, split) -> primary metric."""

_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantiles of Student's t, by the number of values."""


def scores(model: EmbeddingModel, patch_size: int) -> Scores:
    """What a model reaches on the packaged tasks."""
    found = tasks.change_all(tasks.select(tasks.catalogue(), list(TASKS)), patch_size=patch_size)
    out: Scores = {}
    options = tasks.RunOptions(run_on_test=True)
    hooks = Hooks(lambda: False, cache={})  # both judge the same embeddings, made once
    for name, task in found.items():
        result = run_task(name, task, model, options, hooks)
        for split in SPLITS:
            part = getattr(result, split)
            out[name, split] = math.nan if part is None else float(part.primary)
    return out


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of the 95 % interval); the half is NaN for one value."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), math.nan
    wide = _T[min(len(x), max(_T))]  # that of ten is a little too wide for more
    return float(x.mean()), float(wide * x.std(ddof=1) / math.sqrt(len(x)))


def table(
    trained: Sequence[Scores], fresh: Sequence[Scores], raw: Scores
) -> tuple[list[str], list[str]]:
    """(Markdown rows, one sentence per task and split)."""
    lines = [
        "| task, split | trained | untrained | difference | raw bands |",
        "|---|--:|--:|--:|--:|",
    ]
    said = []
    for task in TASKS:
        for split in SPLITS:
            key = (task, split)
            ours, theirs = [s[key] for s in trained], [s[key] for s in fresh]
            gain, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
            cells = [_text(*interval(ours)), _text(*interval(theirs)), _text(gain, half, "+"),
                     f"{raw[key]:.3f}"]  # fmt: skip
            lines.append(f"| {task}, {split} | " + " | ".join(cells) + " |")
            if math.isnan(half):
                verdict = "one seed says nothing of chance"
            elif gain - half > 0:
                verdict = "better than untrained beyond the interval"
            else:
                verdict = "not better than untrained beyond the interval"
            above = "above" if np.mean(ours) > raw[key] else "below"
            said.append(f"{task}, {split}: {verdict}; {above} raw bands")
    return lines, said


def _text(mean: float, half: float, sign: str = "") -> str:
    text = f"{mean:{sign}.3f}"
    return text if math.isnan(half) else f"{text} ± {half:.3f}"


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Some samples of a split."""

    split: Samples
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        return self.split[int(self.numbers[index])]


def _stretched(x: np.ndarray) -> np.ndarray:
    """Values [..., 3] as colours in 0..1, each channel over all of it."""
    low, high = np.percentile(x.reshape(-1, 3), (2, 98), axis=0)
    return np.clip((x - low) / np.maximum(high - low, 1e-9), 0, 1)


def picture(before: EmbeddingModel, after: EmbeddingModel, patch_size: int) -> np.ndarray:
    """uint8 [H, W, 3]: test crops by row; image, land use, features before and after training.

    The crops are those with the most kinds of land use. Features are their three first principal
    components, as red, green and blue, over all crops shown.
    """
    name = TASKS[0]
    task = tasks.change_all(tasks.select(tasks.catalogue(), [name]), patch_size=patch_size)[name]
    split = open_split(name, task, "test")
    kinds = [len(np.unique(split[i][1])) for i in range(len(split))]
    crops = _Chosen(split, np.argsort(kinds, kind="stable")[::-1][:_SHOWN])
    pixels = np.stack([crops[i][0]["sentinel2_l2a"][:, :, 0] for i in range(len(crops))])
    natural = [modalities.get("sentinel2_l2a").bands.index(band) for band in RGB["sentinel2_l2a"]]
    hues = [colorsys.hsv_to_rgb(i / 8, 0.6, 0.9) for i in range(8)]
    palette = np.array([*hues, (0.2, 0.2, 0.2)])  # the last for -1, where nothing is known
    classes = palette[[crops[i][1] for i in range(len(crops))]]
    columns = [_stretched(pixels[..., natural]), classes]
    how = Extraction(patch_size, pooling_of(task, tasks.dataset_info(task.dataset), before))
    for model in (before, after):
        x, _ = extract(model, crops, split.modalities, how)
        x = _stretched(fit_pca(x, 3)(x))
        columns.append(x.repeat(patch_size, 1).repeat(patch_size, 2))
    panels = np.stack(columns).repeat(_ZOOM, 2).repeat(_ZOOM, 3)  # [columns, crops, H, W, 3]
    panels = np.pad(panels, ((0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=1.0)
    rows = np.concatenate(list(np.concatenate(list(panels), axis=2)), axis=0)
    return (rows[:-_GAP, :-_GAP] * 255).round().astype(np.uint8)


def untrained(config: Mapping) -> EmbeddingModel:
    """The encoder that a run began with."""
    cfg = ExperimentConfig.from_dict(config)
    params = latent_mim.initial_params(cfg.model, cfg.init_seed)
    return EncoderModel(cfg.model, {"encoder": params["encoder"]}, None)


def main(argv: list[str]) -> None:
    """Prints the table."""
    if len(argv) < 2:
        raise app.UsageError("name at least one run folder")
    absl_logging.set_verbosity(absl_logging.ERROR)
    patch, trained, fresh = _PATCH.value, [], []
    try:
        if _PICTURE.value:
            outputs.check(Path(_PICTURE.value))
        for number, folder in enumerate(argv[1:]):
            loaded = models.load_checkpoint(Path(folder))
            meta = checkpoint.read_meta(checkpoint.find_checkpoint(folder))
            before = untrained(meta["config"])
            if number == 0 and _PICTURE.value:
                shown = png(picture(before, loaded.model, patch))
                with replacing(Path(_PICTURE.value)) as temporary:
                    Path(temporary).write_bytes(shown)
                print(f"picture: {_PICTURE.value}", flush=True)
            trained.append(scores(loaded.model, patch))
            fresh.append(scores(before, patch))
            print(f"{folder}, step {loaded.step}: evaluated", flush=True)
        raw = scores(models.baseline("raw_bands").model, patch)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    lines, said = table(trained, fresh, raw)
    print("\n".join(["", *lines, "", *said]))


if __name__ == "__main__":
    commands.run(main, FLAGS)
