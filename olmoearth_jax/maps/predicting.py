"""From a trained run and images to a map: what `launch.predict` does.

The map is made in blocks, each by one worker from every tile that touches it; when all are there
they are put together.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.work_list import Outcome, WorkList, open_job
from olmoearth_jax.files import is_leftover, write_atomically
from olmoearth_jax.inference.model import PretrainedModel, load_pretrained
from olmoearth_jax.interop.weights import LICENSE_URL
from olmoearth_jax.maps import (
    archive_scenes,
    cogs,
    full_model,
    map_files,
    report_html,
    run_folder,
    tile_map,
    token_head,
)
from olmoearth_jax.maps import area as areas
from olmoearth_jax.maps.archive import open_archive
from olmoearth_jax.maps.archive_scenes import ArchiveOptions
from olmoearth_jax.maps.fine_tuning import ImageOptions, image_record
from olmoearth_jax.maps.run_folder import Task
from olmoearth_jax.maps.scenes import Scene
from olmoearth_jax.maps.token_head import TokenHead
from olmoearth_jax.maps.tokens import TokenEncoder
from olmoearth_jax.modalities import closest
from olmoearth_jax.outputs import SOFTWARE

Say = Callable[[str], None]
Maker = Callable[[int, slice, slice], tuple[np.ndarray, np.ndarray]]
"""Gives values [H, W, K] and valid [H, W] of a part of a scene."""
_DECIDES = ("run_digest", "model_digest", "images", "window", "overlap", "block", "probabilities",
            "area")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """A map.

    Attributes:
      run: folder of `launch.finetune`.
      images: what to map.
      output: folder of the map.
      model: where the model lies now, if not where the run had it.
      overlap: pixels that tiles share; as in the run by default.
      batch: windows per call.
      block: pixels per side of what one worker makes at once.
      probabilities: 'uint8', 'float32' or 'none'.
      area: file of polygons to stay within.
      index, count: of this worker.
      steal, wait, attempts: see `WorkList.run`.
    """

    run: str
    images: ImageOptions | ArchiveOptions
    output: str
    model: str | None = None
    overlap: int | None = None
    batch: int = 16
    block: int = 1024
    probabilities: str = "uint8"
    area: str | None = None
    index: int = 0
    count: int = 1
    steal: bool = True
    wait: bool = False
    attempts: int = 3


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One block: its scene and place."""

    scene: int
    rows: slice
    cols: slice


def run(o: Options, say: Say = print) -> Outcome:
    """Makes the map as the options say, or this worker's share of it.

    Raises:
      ValueError: what cannot be used or does not fit the run; nothing is written then.
    """
    if o.probabilities not in map_files.PROBABILITIES:
        raise ValueError(
            f"unknown probabilities {o.probabilities!r}; "
            f"{closest(o.probabilities, map_files.PROBABILITIES)}"
        )
    source, folder = Path(o.run).expanduser(), Path(o.output).expanduser()
    task = run_folder.read_task(source)
    report_html.check(source)
    if isinstance(o.images, ArchiveOptions):
        return _from_archive(o, o.images, task, source, folder, say)
    if "archive" in task.about:
        raise ValueError("the run was trained on an archive, not on images: give --archive")
    rasters, notes = o.images.rasters()
    overlap = int(task.about["overlap"]) if o.overlap is None else o.overlap
    tile_map.check_overlap(task.window, overlap)
    with o.images.open(rasters) as (opened, more):
        for scene in opened:
            check_images(task, scene)
        record = image_record(o.images, rasters, opened)
        job = _job(o, task, source) | {"images": record, "overlap": overlap}
        model = load_model(task, source, o)
        for scene in opened:
            check_no_more(task, scene, model.modalities)
        tilings = [
            tile_map.tiling_of(s.stack.shape, task.window, overlap, model.patch) for s in opened
        ]

        def make(number: int, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray]:
            return tile_map.map_block(model, opened[number], tilings[number], rows, cols)

        return _mapped(o, task, source, folder, job, opened, make, [*notes, *more], say)


def _from_archive(
    o: Options, images: ArchiveOptions, task: Task, source: Path, folder: Path, say: Say
) -> Outcome:
    """The map of an archive's tokens."""
    archive = open_archive(images.path)
    archive_scenes.check(task, archive, images.width)
    opened, notes = archive_scenes.open_scenes(images, archive, True)
    record = {"archive": archive_scenes.source_of(archive),
              "periods": [s.period.name for s in opened]}  # fmt: skip
    job = _job(o, task, source) | {"images": record, "overlap": 0}
    head = load_head(task, source, task.about["archive"]["width"])
    make = archive_scenes.block_maker(opened, head, task.about["archive"]["width"], task.channels)
    return _mapped(o, task, source, folder, job, opened, make, notes, say)


def _job(o: Options, task: Task, source: Path) -> dict[str, Any]:
    return {
        "run_digest": digest_of(source), "model_digest": task.digest, "window": task.window,
        "block": o.block, "probabilities": o.probabilities,
        "area": None if o.area is None else areas.digest_of_file(Path(o.area)),
        "software": SOFTWARE,
    }  # fmt: skip


def _mapped(
    o: Options, task: Task, source: Path, folder: Path, job: dict[str, Any],
    opened: Sequence[Scene], make: Maker, notes: Sequence[str], say: Say,
) -> Outcome:  # fmt: skip
    """Opens the job and does this worker's share."""
    area = None if o.area is None else areas.AreaOfScenes(Path(o.area), opened)
    if not (folder / "job" / "job.json").exists():
        run_folder.check_free(folder)
    digest = open_job(folder / "job" / "job.json", job, _DECIDES)
    for note in notes:
        say(note)
    return _Mapper(o, task, source, folder, digest, opened, make, area, say).run()


def _remove_unfinished(out: Path) -> None:
    """Removes what workers that were killed while they put a map together have left beside it.

    One that was only stopped, and overtaken, then ends with an error, and the map is there.
    """
    for left in out.glob(f"{cogs.SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in out.glob(".*.tmp"):
        if is_leftover(left):
            left.unlink(missing_ok=True)


def digest_of(run: Path) -> str:
    """SHA-256 of what decides the values of a run's maps."""
    held = json.loads((run / run_folder.TASK).read_text())
    held = {k: v for k, v in held.items() if k not in ("created", "model", "software")}
    import hashlib

    weights = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted((run / "weights").glob("*.npz"))
    }
    return run_folder.digest_of({"task": held, "weights": weights})


def check_images(task: Task, scene: Scene) -> None:
    """Checks images against a run.

    Raises:
      ValueError: they do not fit; names the member and both values.
    """
    stack = scene.stack
    for name, bands in task.modalities.items():
        if name not in stack.names:
            raise ValueError(
                f"the run was trained on {', '.join(task.modalities)}, but the images show "
                f"{', '.join(stack.names)}"
            )
        held = sorted(stack.bands_of(name))
        if held != sorted(bands):
            raise ValueError(
                f"the run was trained on the bands {', '.join(sorted(bands))} of {name}, but the "
                f"images have {', '.join(held)}"
            )
    pixel = abs(stack.transform.a)
    if abs(pixel - task.pixel) > 0.01 * task.pixel:
        raise ValueError(
            f"the run was trained on pixels of {task.pixel:g}, but those of the images are of "
            f"{pixel:g}"
        )
    if len(stack.dates) != task.timesteps:
        raise ValueError(
            f"the run was trained on {task.timesteps} timesteps, but the images have "
            f"{len(stack.dates)} ({', '.join(stack.dates)})"
        )


def check_no_more(task: Task, scene: Scene, taken: Sequence[str]) -> None:
    """Checks that images show the model nothing that the run was trained without.

    Args:
      taken: modalities that the model takes; others are not used.

    Raises:
      ValueError: they do.
    """
    known = {*task.modalities, *task.about.get("some_images_show", ())}
    more = [n for n in scene.stack.names if n in taken and n not in known]
    if more:
        raise ValueError(
            f"the run was trained on {', '.join(task.modalities)}, but the images also show "
            f"{', '.join(more)}: leave them out"
        )


def load_model(task: Task, run: Path, o: Options) -> tile_map.PixelModel:
    """The model of a run.

    Raises:
      ValueError: it is not there, or not the one of the run.
    """
    base: PretrainedModel = load_pretrained(o.model or task.model)
    if base.digest != task.digest:
        raise ValueError(
            f"the run was trained with the model of digest {task.digest[:12]}, but "
            f"{o.model or task.model} has {base.digest[:12]}"
        )
    if task.mode == "full":
        path = run / "weights" / "encoder.npz"
        return full_model.load(base, task.settings, task.target, path, task.scale, o.batch)
    encoder = TokenEncoder(base, task.settings, o.batch)
    width = base.embedding_size if task.settings.pooling == "spatial" else None
    return tile_map.ProbedPixels(encoder, load_head(task, run, width), task.channels)


def load_head(task: Task, run: Path, width: int | None = None) -> TokenHead:
    """The linear head of a run.

    Args:
      width: of the embeddings that it takes, if known.

    Raises:
      ValueError: it cannot be read, or has another form.
    """
    path = run / "weights" / "head.npz"
    held = run_folder.load_arrays(path)
    kernel = held.get("params/linear/kernel")
    if width is None:
        width = 1 if kernel is None or kernel.ndim != 2 else len(kernel)
    form = token_head.head_of(task.target, width)
    params, stats = token_head.empty(form)
    found = run_folder.in_form(path, held, {"params": params, "stats": stats})
    return TokenHead(form, found["params"], found["stats"], task.scale)


class _Finished(BaseException):
    """The map was put together meanwhile, and its blocks are gone: nothing is left to do."""


@dataclasses.dataclass
class _Mapper:
    """All that the work on a map needs."""

    o: Options
    task: Task
    source: Path
    folder: Path
    digest: str
    scenes: Sequence[Scene]
    make: Maker
    area: areas.AreaOfScenes | None
    say: Say

    def __post_init__(self) -> None:
        self.bands = map_files.bands_of(self.task.target, self.o.probabilities)
        self.units: dict[str, _Unit] = {}
        for number, scene in enumerate(self.scenes):
            height, width = scene.stack.shape
            side = self.o.block
            for top in range(0, height, side):
                for left in range(0, width, side):
                    rows = slice(top, min(top + side, height))
                    cols = slice(left, min(left + side, width))
                    if self.area is None or self.area.touches(number, rows, cols):
                        name = f"{self._name(number)}/{top // side}_{left // side}"
                        self.units[name] = _Unit(number, rows, cols)

    def _name(self, number: int) -> str:
        scene = self.scenes[number]
        several = len({s.period for s in self.scenes}) > 1
        parts = [scene.period.name if several else "", scene.zone]
        return "/".join(p for p in parts if p) or "map"

    def out(self, number: int) -> Path:
        """The folder of the files of a scene."""
        name = self._name(number)
        return self.folder if name == "map" else self.folder / name

    def run(self) -> Outcome:
        """Blocks, then whole maps."""
        job, whole = self.folder / "job", self._whole()
        if self._is_whole():
            self.say(f"{self.folder} is finished already")
            return Outcome()
        blocks = WorkList(job, job / "blocks", self.digest, list(self.units))
        total = len(blocks.units)
        done = sum(blocks.marker(u) is not None for u in blocks.units)
        self.say(f"{total} blocks of at most {self.o.block} pixels, {done} done: {self.folder}")

        def told(unit: str, record: Mapping[str, Any]) -> None:
            self.say(f"{unit}: {record['valid']} pixels with data, {record['seconds']:.1f} s")

        try:
            found = blocks.run(
                self._block, self.o.index, self.o.count, steal=self.o.steal, wait=self.o.wait,
                attempts=self.o.attempts, say=told,
            )  # fmt: skip
        except _Finished:
            self.say(f"{self.folder} was finished by another worker")
            return Outcome()
        if found.failed or any(blocks.marker(u) is None for u in blocks.units):
            return found
        last = whole.run(
            self._assemble, say=lambda unit, record: self.say(f"written: {record['written']}")
        )
        if self._is_whole():
            shutil.rmtree(job / "blocks", ignore_errors=True)
        return dataclasses.replace(last, made=found.made)

    def _whole(self) -> WorkList:
        """The list of the maps that blocks are put together to."""
        names = [self._name(i) for i in range(len(self.scenes))]
        return WorkList(self.folder / "job" / "whole", self.folder, self.digest, names)

    def _is_whole(self) -> bool:
        whole = self._whole()
        return all(whole.marker(name) is not None for name in whole.units)

    def _block(self, name: str) -> tuple[dict[str, Any], list[str]]:
        """Makes one block."""
        if self._is_whole():
            raise _Finished
        unit = self.units[name]
        mean, valid = self.make(unit.scene, unit.rows, unit.cols)
        if self.area is not None:
            valid &= self.area.mask(unit.scene, unit.rows, unit.cols)
        layers = map_files.layers_of(self.task.target, self.bands, mean, valid)
        key = f"{name}.npz"
        run_folder.save_arrays(self.folder / "job" / "blocks" / key, layers)
        return {"valid": int(valid.sum()), "nodata": int((~valid).sum())}, [key]

    def _assemble(self, name: str) -> tuple[dict[str, Any], list[str]]:
        """Puts the blocks of a scene together."""
        number = next(i for i in range(len(self.scenes)) if self._name(i) == name)
        scene, out = self.scenes[number], self.out(number)
        stack, target = scene.stack, self.task.target
        height, width = stack.shape
        form = {"height": height, "width": width, "crs": stack.crs, "transform": stack.transform}
        tags = self._tags(scene)
        _remove_unfinished(out)
        counts: dict[int, int] = {}
        metres: dict[int, float] = {}
        made = []
        for band in self.bands:
            path = out / f"{band.name}.tif"
            with map_files.writing(path, form, band, tags, target.classes) as file:
                for unit_name, unit in self.units.items():
                    if unit.scene != number:
                        continue
                    held = run_folder.load_arrays(
                        self.folder / "job" / "blocks" / f"{unit_name}.npz"
                    )[band.name]
                    file.put(unit.rows.start, unit.cols.start, held)
                    if band.name == "classes":
                        pixel = map_files.pixel_area(stack, unit.rows, unit.cols)
                        for value, n in zip(*np.unique(held, return_counts=True), strict=True):
                            counts[int(value)] = counts.get(int(value), 0) + int(n)
                            metres[int(value)] = metres.get(int(value), 0.0) + int(n) * pixel
            made.append(path)
        if target.classes is not None:
            made += self._tables(out, counts, metres)
        path = out / f"{self.folder.name}.json"
        period = {"olmoearth:period": scene.period.name} if scene.period.name else {}
        map_files.item(path, form, self.bands, target, tags, stack.dates, period)
        made += [path, out / "report.html"]
        write_atomically(made[-1], report_html.page(self.source, out))
        keys = [p.relative_to(self.folder).as_posix() for p in made]
        return {"written": ", ".join(str(p) for p in made)}, keys

    def _tables(
        self, out: Path, counts: Mapping[int, int], metres: Mapping[int, float]
    ) -> list[Path]:
        paths = [out / "areas.csv", out / "confusion.csv"]
        map_files.areas(paths[0], self.task.target, counts, metres)
        report = json.loads((self.source / run_folder.REPORT).read_text())
        map_files.confusion_table(paths[1], report)
        return paths

    def _tags(self, scene: Scene) -> dict[str, str]:
        task = self.task
        return {
            "MODEL": Path(task.model).name, "MODEL_DIGEST": task.digest,
            "RUN_DIGEST": digest_of(self.source), "JOB_DIGEST": self.digest, "MODE": task.mode,
            "MODALITIES": ",".join(task.modalities), "DATES": ",".join(scene.stack.dates),
            "PATCH_SIZE": str(task.settings.patch_size), "POOLING": task.settings.pooling,
            "SOFTWARE": SOFTWARE, "LICENSE": LICENSE_URL,
        }  # fmt: skip
