"""Fine-tuning of a whole encoder on labelled windows, and the map that it makes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.configlib.tasks import DatasetInfo, EvalTaskConfig, RunOptions
from olmoearth_jax.evals import finetune, models, probe_heads
from olmoearth_jax.evals.linear_probe import target_scale
from olmoearth_jax.evals.samples import MASK, TIMESTAMPS
from olmoearth_jax.files import read_json_lines, write_atomically
from olmoearth_jax.inference.model import PretrainedModel
from olmoearth_jax.inference.prepare import ModelInput
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.maps import run_folder
from olmoearth_jax.maps.samples import NONE, Target, Window
from olmoearth_jax.maps.scenes import Scene
from olmoearth_jax.maps.token_head import HeadOptions, shares
from olmoearth_jax.maps.tokens import Settings, TokenEncoder, groups_of
from olmoearth_jax.masks import MISSING_TOKEN
from olmoearth_jax.model import frozen, pooling

_NUMBERS = re.compile(r"(\w+) (-?[\d.]+(?:e-?\d+)?)")
_CACHE_BYTES = 1 << 30
"""Windows kept in memory."""


class PixelReader(TokenEncoder):
    """Reads windows by pixel; embeds nothing."""

    def __init__(self, model: PretrainedModel, settings: Settings, batch: int = 16):
        self.model, self.batch = model, batch
        self.settings = dataclasses.replace(settings, location_size=1)


def head_of(target: Target, model: PretrainedModel) -> probe_heads.Head:
    """A linear map on patches, interpolated to pixels, so that no place in a patch is special."""
    kind = "regression" if target.classes is None else "segmentation"
    outputs = 1 if target.classes is None else len(target.classes)
    return probe_heads.Head("bilinear_conv", kind, outputs, model.embedding_size)


def _info(target: Target, names: Sequence[str], side: int) -> DatasetInfo:
    kind = "regression" if target.classes is None else "segmentation"
    outputs = 1 if target.classes is None else len(target.classes)
    return DatasetInfo("map", kind, outputs, tuple(names), height_width=side)


def pixel_masks(ready: ModelInput, patch: int) -> dict[str, np.ndarray]:
    """Token masks as masks of pixels, [B, H, W, T, S]."""
    out = {}
    for name, mask in ready.masks.items():
        if modalities.get(name).spatial:
            side = patch * modalities.get(name).image_factor
            mask = mask.repeat(side, 1).repeat(side, 2)
        out[name] = mask
    return out


class WindowSplit:
    """The windows of a split as samples of the evaluations."""

    def __init__(
        self, reader: PixelReader, scenes: Sequence[Scene], target: Target,
        windows: Sequence[Window], scale: tuple[float, float],
    ):  # fmt: skip
        self.reader, self.scenes, self.target = reader, scenes, target
        self.windows, self.scale = windows, scale
        self._held: dict[int, Any] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        if index in self._held:
            return self._held[index]
        w = self.windows[index]
        sample = self.scenes[w.scene].sample(w.row, w.col, *w.size)
        assert sample is not None  # such windows were left out
        ready = self.reader.prepare([sample])
        out: dict[str, np.ndarray] = {n: x[0] for n, x in ready.data.items()}
        masks = pixel_masks(ready, self.reader.settings.patch_size)
        out |= {n + MASK: m[0] for n, m in masks.items()}
        out[TIMESTAMPS] = ready.timestamps[0].astype(np.int64)
        labels, seen = w.labels, self.reader.seen(ready)[0]
        if self.target.classes is None:
            labels = np.where(seen, (labels - self.scale[0]) / self.scale[1], np.nan)
            labels = labels.astype(np.float32)
        else:
            labels = np.where(seen, labels, NONE)
        size = sum(x.nbytes for x in out.values())
        if self._bytes + size <= _CACHE_BYTES:
            self._held[index] = out, labels
            self._bytes += size
        return out, labels


@dataclasses.dataclass(frozen=True)
class FullPixels:
    """A fine-tuned encoder with its head."""

    base: PretrainedModel
    settings: Settings
    head: probe_heads.Head
    params: Any
    scale: tuple[float, float]
    batch: int

    @property
    def channels(self) -> int:
        return self.head.num_classes

    @property
    def patch(self) -> int:
        return self.settings.patch_size

    @property
    def modalities(self) -> Sequence[str]:
        return self.base.modalities

    def __call__(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        reader = PixelReader(self.base, self.settings, self.batch)
        ready = reader.prepare(samples)
        seen, out = reader.seen(ready), None
        masks = pixel_masks(ready, self.patch)
        pool = pooling.Pooling(self.settings.pooling_type, "spatial")
        job = finetune.Job(self.head, (seen.shape[1], seen.shape[2]), False, False)
        for rows in groups_of(ready):
            for start in range(0, len(rows), self.batch):
                mine = rows[start : start + self.batch]
                padded = np.concatenate([mine, np.repeat(mine[-1:], self.batch - len(mine))])
                part = ready.rows(padded)
                batch = (
                    part.data, {n: m[padded] for n, m in masks.items()},
                    part.timestamps.astype(np.int32),
                )  # fmt: skip
                got = finetune.logits(job, self._call(part, pool), self.params, batch)
                values = self._values(got)[: len(mine)]
                if out is None:
                    out = np.zeros((*seen.shape, self.channels), np.float32)
                out[mine] = values
        if out is None:
            out = np.zeros((*seen.shape, self.channels), np.float32)
        return out, seen

    def _call(self, part: ModelInput, pool: pooling.Pooling) -> frozen.Call:
        fast = not any((m == MISSING_TOKEN).any() for m in part.masks.values())
        over = pool.over(part.masks)
        return frozen.Call(self.base.graph, self.patch, over, fast, slots=self.base.slots)

    def _values(self, got: jax.Array) -> np.ndarray:
        if self.head.task_type == "regression":
            return np.asarray(got)[..., None] * self.scale[1] + self.scale[0]
        return np.asarray(jax.nn.softmax(got, axis=-1))


def _weights(target: Target, windows: Sequence[Window]) -> list[np.ndarray] | None:
    """How much each pixel of each window counts, 1 on average over the labelled ones; None: alike.

    Raises:
      ValueError: all weights are 0.
    """
    if all(w.weights is None for w in windows):
        return None
    labelled = [target.labelled(w.labels) for w in windows]
    found = [np.ones(w.size, np.float32) if w.weights is None else w.weights for w in windows]
    every = shares(np.concatenate([w[at] for w, at in zip(found, labelled, strict=True)]))
    cuts = np.cumsum([at.sum() for at in labelled])[:-1]
    out = [np.zeros(w.size, np.float32) for w in windows]
    for mine, at, values in zip(out, labelled, np.split(every, cuts), strict=True):
        mine[at] = values
    return out


def check_sizes(sizes: Iterable[tuple[int, int]]) -> int:
    """The longer side of windows.

    Raises:
      ValueError: they are of several sizes.
    """
    found = sorted(set(sizes))
    if len(found) > 1:
        raise ValueError(
            f"the images allow windows of several sizes ({found}): take a smaller --window"
        )
    return max(found[0])


def fit(
    model: PretrainedModel,
    settings: Settings,
    scenes: Sequence[Scene],
    target: Target,
    splits: Mapping[str, Sequence[Window]],
    o: HeadOptions,
    class_weights: np.ndarray | None,
    batch: int,
    folder: Path,
    log: Callable[[Mapping[str, Any]], None],
) -> FullPixels:
    """Fine-tunes a copy of a model; stopped, it goes on from the folder.

    Args:
      splits: windows of 'train' and 'valid', all of one size.
      batch: windows per step.
      folder: of its state.
      log: gets a record of each epoch.

    Raises:
      ValueError: windows of several sizes, labels that all weigh 0, or training that diverges.
    """
    side = check_sizes(w.size for windows in splits.values() for w in windows)
    labels = np.concatenate([w.labels.ravel() for w in splits["train"]])
    scale = target_scale(labels) if target.classes is None else (0.0, 1.0)
    reader, head = PixelReader(model, settings), head_of(target, model)
    data = {s: WindowSplit(reader, scenes, target, w, scale) for s, w in splits.items()}
    encoder = models.EncoderModel(model.config, {"encoder": model.params}, model.dtype)
    info = _info(target, model.modalities, side)
    task = EvalTaskConfig(
        dataset="map", ft_lr=o.lr, ft_batch_size=min(batch, len(splits["train"])),
        epochs=o.epochs, patch_size=settings.patch_size, pooling_type=settings.pooling_type,  # pyright: ignore
        finetune_seed=o.seed, primary_metric="rmse" if target.classes is None else "macro_f1",
    )  # fmt: skip
    weights = None if class_weights is None else tuple(map(float, class_weights))
    own = finetune.OwnData(info, data, head, weights, _weights(target, splits["train"]), o.patience)
    options = RunOptions(save_folder=folder, run_on_test=False)
    tuner = finetune.FineTuner("map", task, encoder, options, own)

    path = folder / "epochs.jsonl"

    def told(line: str) -> None:
        # Kept beside the state, so that a run that goes on has the epochs before.
        found = {k: float(v) for k, v in _NUMBERS.findall(line.partition(":")[2])}
        record = {"epoch": tuner.epoch, **found, "best": tuner.best_epoch == tuner.epoch}
        before = [r for r in read_json_lines(path) if r["epoch"] < tuner.epoch]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(r) + "\n" for r in [*before, record]))

    tuner.train(lambda: False, told)
    for record in read_json_lines(path):
        log(record)
    params = jax.tree.map(np.asarray, tuner.params)
    return FullPixels(model, settings, head, params, scale, batch)


def load(
    base: PretrainedModel, settings: Settings, target: Target, path: Path, scale, batch: int
) -> FullPixels:
    """The model of a run, from the file of its weights.

    Raises:
      ValueError: it cannot be read, or they are not those of this model.
    """
    head = head_of(target, base)
    form = {"encoder": base.params, "head": probe_heads.init(head, 0)[0]}
    held = run_folder.in_form(path, run_folder.load_arrays(path), form)
    return FullPixels(base, settings, head, jax.tree.map(jnp.asarray, held), scale, batch)
