"""Making one group: samples that share patch size and grid, with their masks.

A group is a pure function of its number, whatever process makes it: all draws are keyed by the
seed, the epoch and the position within the epoch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.config import DataLoaderConfig, ExperimentConfig
from olmoearth_jax.data import cutmix, transforms
from olmoearth_jax.data.budget import check_grids, usable_grids
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.index import DatasetIndex
from olmoearth_jax.data.order import epoch_order, steps_per_pass
from olmoearth_jax.data.remote import AnyPath
from olmoearth_jax.data.shape_sampler import ShapeSampler
from olmoearth_jax.data.store import SampleStore
from olmoearth_jax.data.subset import draw_offsets, empty_arrays, read_sample
from olmoearth_jax.masking import MaskContext, Tokens, checked_masks, missing_tokens
from olmoearth_jax.masks import MISSING_TOKEN, living
from olmoearth_jax.modalities import MISSING, Tokenization

Group = dict[str, Any]
"""One group's arrays, in this order of keys:

position int64 [B] within the epoch; index int64 [B], file number; ok bool [B], False for holes
(their data is MISSING, their masks 3); epoch, group int64 []; patch_size, grid int32 [];
timestamps int32 [B, T, 3] (day, month 0-11, year); data {modality: float32 [B, ...]};
mask_a and, with two views, mask_b {modality: int8 tokens}.
"""

GROUP_KEYS = (
    *("position", "index", "ok", "epoch", "group", "patch_size", "grid", "timestamps"),
    *("data", "mask_a", "mask_b"),
)
PROBLEMS = "problems"
"""Key under which a worker hands (file, problem) pairs to the main process."""

_LONGEST_EPOCH = 1 << 28
"""Samples; every reader holds the order of a whole epoch."""

_MaskStrategy = Callable[[Tokens, MaskContext], Tokens]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(eq=False, repr=False)
class GroupMaker:
    """Everything a worker needs to make any group; picklable.

    Attributes:
      steps_per_epoch: optimiser steps per epoch.
      groups_per_step: groups per optimiser step.
      patch_sizes: patch sizes to draw from (10 m pixels).
      timesteps: timesteps of a crop, per grid side; with a sampler the most there can be.

    Raises:
      ValueError: a budget or tile too small, other modalities than those of the index, or hosts
        that would split what has to stay together.
    """

    index: DatasetIndex
    """The data set (`index.prepare`)."""
    config: ExperimentConfig
    """A checked config: its dataset, its loader, its group size and its tokenization are used."""
    masks: Sequence[_MaskStrategy]
    """Masking per view, `strategy(missing, MaskContext) -> masks`; picklable."""
    host_index: int = 0
    host_count: int = 1
    """This host makes the members j with j % host_count == host_index."""
    sampler: ShapeSampler | None = None
    """Draws patch size, grid and timesteps together, instead of by the loader's settings."""

    def __post_init__(self) -> None:
        loader, data = self.loader, self.config.dataset
        names = registry.in_sample_order(registry.resolve(data.training_modalities))
        if names != self.index.modalities:
            raise ValueError(
                f"the index was prepared for {', '.join(self.index.modalities)}, "
                f"not for {', '.join(names)}"
            )
        self.patch_sizes = range(loader.min_patch_size, loader.max_patch_size + 1)
        self._transform = transforms.build(loader.transform_config)
        self._check_hosts()
        if self.sampler is not None:
            self.timesteps = self._check_sampler(self.sampler)
        else:
            # By the registry's band sets, whatever the model's, as in the published v1.1 and v1.2
            # runs (spec/data.md Q8).
            counted = self.tokenization if loader.match_model_tokenization else Tokenization()
            self.timesteps = check_grids(
                names,
                self.patch_sizes,
                loader.sampled_hw_p_list,
                loader.token_budget,
                self.index.tile_px,
                counted,
            )
        passes = steps_per_pass(len(self.index), self.global_batch_size)
        self.steps_per_epoch = passes * loader.repeats
        if self.steps_per_epoch * self.global_batch_size > _LONGEST_EPOCH:
            raise ValueError(
                f"data_loader.repeats={loader.repeats} makes an epoch of "
                f"{self.steps_per_epoch * self.global_batch_size} samples, whose order would not "
                f"fit into memory (at most {_LONGEST_EPOCH}): lower it and raise "
                "trainer.max_duration instead"
            )
        self.groups_per_step = self.global_batch_size // self.group_size
        cache = Path(os.path.expanduser(data.cache_dir)) if data.cache_dir else None
        self._store = SampleStore(cache, data.samples_per_sec, data.cache_size_gb)

    @property
    def loader(self) -> DataLoaderConfig:
        return self.config.data_loader

    @property
    def tokenization(self) -> Tokenization:
        """The model's band sets, which the masks are for."""
        return self.config.model.encoder_config.tokenization

    @property
    def global_batch_size(self) -> int:
        """Samples per optimiser step, over all hosts."""
        return self.loader.global_batch_size

    @property
    def group_size(self) -> int:
        """Samples per group, over all hosts."""
        return self.config.train_module.rank_microbatch_size

    @property
    def seed(self) -> int:
        """Seed of order, shapes, crops and masks."""
        return self.loader.seed

    def _check_sampler(self, sampler: ShapeSampler) -> dict[int, int]:
        if sampler.tile_px > self.index.tile_px:
            raise ValueError(
                f"the crops may be as large as {sampler.tile_px} px, but the tiles of the dataset "
                f"have {self.index.tile_px} px"
            )
        return sampler.timesteps

    def _check_hosts(self) -> None:
        hosts = self.host_count
        if not 0 <= self.host_index < hosts:
            raise ValueError(f"host {self.host_index} is not one of {hosts} hosts")
        if hosts > self.group_size:
            raise ValueError(
                f"{hosts} hosts cannot share groups of {self.group_size} samples; use larger "
                f"micro-batches (train_module.rank_microbatch_size)"
            )
        for part in (*self.masks, self._transform):
            if hosts > 1 and getattr(part, "needs_whole_group", False):
                raise ValueError(
                    f"{type(part).__name__} needs all samples of a group on one host, "
                    f"so it cannot be used with {hosts} hosts"
                )

    def __getstate__(self) -> dict[str, Any]:
        index = dataclasses.replace(self.index, latlon=None)  # workers have no use for it
        return {**self.__dict__, "index": index, "user_records": registry.user_records()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        registry.register_all(state.pop("user_records"))  # a worker process starts without them
        self.__dict__.update(state)

    def _epoch_of(self, number: int) -> tuple[int, int]:
        """(epoch, group within it), from 1 and 0, of a running group number."""
        epoch, group = divmod(int(number), self.steps_per_epoch * self.groups_per_step)
        return epoch + 1, group

    def order(self, epoch: int) -> np.ndarray:
        """Index of the sample at each position of an epoch; epochs count from 1."""
        size = len(self.index)
        return epoch_order(
            size,
            self.global_batch_size,
            self.seed,
            epoch,
            self.loader.repeats,
            self.loader.shuffle,
        )

    def shape(self, number: int) -> tuple[int, int, int]:
        """(patch size, grid, timesteps) of the group with that running number, from 0."""
        epoch, group = self._epoch_of(number)
        block = group * self.group_size // self.config.samples_per_shape
        draw = rng(self.seed, "shape", epoch, block)
        if self.sampler is not None:
            return self.sampler.draw(draw)
        patch = self.patch_sizes[int(draw.integers(len(self.patch_sizes)))]
        fitting = usable_grids(patch, self.loader.sampled_hw_p_list, self.index.tile_px)
        grid = fitting[draw.integers(len(fitting))]
        return patch, grid, self.timesteps[grid]

    def make(self, number: int) -> Group:
        """Makes this host's part of the group with that running number, from 0."""
        epoch, group = self._epoch_of(number)
        patch, grid, steps = self.shape(number)
        members = np.arange(self.host_index, self.group_size, self.host_count)
        positions = group * self.group_size + members
        data = empty_arrays(self.index.modalities, patch * grid, steps, len(members))
        stamps = np.tile(np.array([1, 0, 2000], np.int32), (len(members), steps, 1))
        ok, numbers = np.zeros(len(members), bool), np.zeros(len(members), np.int64)
        problems: list[tuple[str, str]] = []
        order = self.order(epoch)
        for i, position in enumerate(positions):
            path, numbers[i] = self.index.locate(int(order[position]))
            views = {name: array[i] for name, array in data.items()}
            try:
                stamps[i] = self._read(path, (patch, grid, steps), (epoch, int(position)), views)
                ok[i] = True
            except ReadError as e:
                problems.append((e.path, e.problem))
                _clear(views)
        if self._transform is not None:
            data, stamps = self._transform(data, stamps, rng(self.seed, "transform", epoch, group))
        gaps = _mark_broken(data, patch, self.tokenization)
        out: Group = {
            "position": positions.astype(np.int64),
            "index": numbers,
            "ok": ok,
            "epoch": np.asarray(epoch, np.int64),
            "group": np.asarray(group, np.int64),
            "patch_size": np.asarray(patch, np.int32),
            "grid": np.asarray(grid, np.int32),
            "timestamps": stamps,
            "data": data,
            **self._masks(data, positions, members, (epoch, group, number), patch, ok),
        }
        # Fill values would reach into other patches, for these are cut from a resized image. What
        # a map lacks is told by its pixels, which are looked at again where it supervises.
        heads = self.config.model.supervision_head_config
        for name in gaps.keys() - (heads.modality_configs if heads else {}).keys():
            data[name][gaps[name]] = 0
        for array in data.values():
            array[~ok] = MISSING
        return {**out, PROBLEMS: problems}

    def _read(
        self,
        path: AnyPath,
        shape: tuple[int, int, int],
        place: tuple[int, int],
        views: Arrays,
    ) -> np.ndarray:
        """Reads one sample's crop into `views`; returns its timestamps [steps, 3].

        A damaged copy in the cache is replaced once.
        """
        try:
            return self._read_file(path, shape, place, views)
        except ReadError:
            if not self._store.forget(path):
                raise
        _clear(views)
        return self._read_file(path, shape, place, views)

    def _read_file(
        self,
        path: AnyPath,
        shape: tuple[int, int, int],
        place: tuple[int, int],
        views: Arrays,
    ) -> np.ndarray:
        names, draw = self.index.modalities, rng(self.seed, "crop", *place)
        patch, grid, steps = shape
        how = {"normalized": self.config.dataset.normalize, "out": views}
        with open_sample(self._store.local(path), names) as file:
            if self.config.dataset.apply_cutmix:
                pieces = cutmix.draw_pieces(draw, grid)
                return cutmix.read_pieces(file, names, patch, steps, pieces, **how).timestamps
            choose = draw_offsets(draw)
            return read_sample(file, names, patch * grid, steps, choose, **how).timestamps

    def _masks(
        self,
        data: Arrays,
        positions: np.ndarray,
        members: np.ndarray,
        place: tuple[int, int, int],
        patch: int,
        ok: np.ndarray,
    ) -> dict[str, Tokens]:
        """The masks by view. A sample with no token to encode in some view becomes a hole."""
        missing = missing_tokens(data, patch, self.tokenization)
        epoch, group, number = place
        out: dict[str, Tokens] = {}
        for key, strategy in zip(("mask_a", "mask_b"), self.masks, strict=False):
            context = MaskContext(
                rngs=[rng(self.seed, key, epoch, int(p)) for p in positions],
                group_rng=rng(self.seed, f"{key} of group", epoch, group),
                group_size=self.group_size,
                members=members,
                step=number,
            )
            masks = checked_masks(strategy, missing, strategy(missing, context))
            out[key] = {n: masks[n] for n in self.index.modalities}
        ok &= living(ok, (masks.values() for masks in out.values()))
        for mask in _each(out):
            mask[~ok] = MISSING_TOKEN
        return out


def _mark_broken(data: Arrays, patch: int, tokenization: Tokenization) -> dict[str, np.ndarray]:
    """Marks the first pixel, which tells whether it is missing, of patches that lack any.

    Returns:
      Per modality with some what is missing, bool of its shape, of bands of an image that are not
      missing as a whole.
    """
    out = {}
    for name, x in data.items():
        modality = registry.get(name)
        gaps = x == MISSING
        if not modality.spatial or not gaps.any():
            continue
        whole = gaps.all((1, 2), keepdims=True)
        gaps &= ~whole
        if not gaps.any():
            continue
        side = patch * modality.image_factor
        batch, height, width, *rest = x.shape
        cut = (batch, height // side, side, width // side, side, *rest)
        broken = gaps.reshape(cut).any((2, 4))
        first = x[:, ::side, ::side]
        for bands in tokenization.band_sets(name):
            lost = broken[..., list(bands)].any(-1)
            for band in bands:
                first[..., band][lost] = MISSING
        out[name] = (x == MISSING) & ~whole
    return out


def _each(views: Mapping[str, Tokens]) -> Iterator[np.ndarray]:
    for masks in views.values():
        yield from masks.values()


def _clear(views: Arrays) -> None:
    for view in views.values():
        view[...] = MISSING
