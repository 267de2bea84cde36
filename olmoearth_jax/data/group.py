"""Making one group: samples that share patch size and grid, with their masks.

A group is a pure function of its number, whatever process makes it: all draws are keyed by the
seed, the epoch and the position within the epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import cutmix
from olmoearth_jax.data.budget import usable_grids
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.h5 import ReadError, open_sample
from olmoearth_jax.data.index import DatasetIndex
from olmoearth_jax.data.order import epoch_order, steps_per_pass
from olmoearth_jax.data.remote import AnyPath
from olmoearth_jax.data.store import SampleStore
from olmoearth_jax.data.subset import draw_offsets, empty_arrays, read_sample
from olmoearth_jax.masking.context import ENCODE, MISSING_TOKEN, MaskContext, Tokens
from olmoearth_jax.masking.tokens import missing_tokens
from olmoearth_jax.modalities import MISSING, Tokenization

Group = dict[str, Any]
"""One group's arrays:

position int64 [B] within the epoch; index int64 [B], file number; ok bool [B], False for holes
(their data is MISSING, their masks 3); epoch, group int64 []; patch_size, grid int32 [];
timestamps int32 [B, T, 3] (day, month 0-11, year); data {modality: float32 [B, ...]};
mask_a and, with two views, mask_b {modality: int8 tokens}.
"""

MaskStrategy = Callable[[Tokens, MaskContext], Tokens]
Transform = Callable[
    [dict[str, np.ndarray], np.ndarray, np.random.Generator],
    tuple[dict[str, np.ndarray], np.ndarray],
]

GROUP_KEYS = (
    "position",
    "index",
    "ok",
    "epoch",
    "group",
    "patch_size",
    "grid",
    "timestamps",
    "data",
    "mask_a",
    "mask_b",
)

PROBLEMS = "problems"
"""Key under which a worker hands (file, problem) pairs to the main process."""


@dataclasses.dataclass(frozen=True)
class GroupMaker:
    """Everything a worker needs to make any group; picklable.

    Attributes:
      index: the data set.
      timesteps: timesteps per grid side.
      mask_a, mask_b: masking of the two views; mask_b None for one view.
      global_batch_size: samples per optimiser step.
      group_size: samples per group over all hosts.
      samples_per_shape: contiguous positions that share a draw of patch size and grid.
      patch_sizes, grids: what is drawn from.
      tokenization: the model's band sets, in which masks are counted.
      seed: of order, shapes, crops and masks.
      host_index, host_count: this host makes the members j with j % host_count == host_index.
      repeats, shuffle: see `epoch_order`.
      use_cutmix: crops of scattered patches.
      transform: augmentation of the group, or None.
      normalized: False keeps raw values.
      store: where files are read from.
      records: the user's own modalities.
    """

    index: DatasetIndex
    timesteps: dict[int, int]
    mask_a: MaskStrategy
    mask_b: MaskStrategy | None
    global_batch_size: int
    group_size: int
    samples_per_shape: int
    patch_sizes: tuple[int, ...]
    grids: tuple[int, ...]
    tokenization: Tokenization
    seed: int
    host_index: int = 0
    host_count: int = 1
    repeats: int = 1
    shuffle: bool = True
    use_cutmix: bool = False
    transform: Transform | None = None
    normalized: bool = True
    store: SampleStore = dataclasses.field(default_factory=SampleStore)
    records: Mapping[str, Any] = dataclasses.field(default_factory=registry.user_records)

    def __setstate__(self, state: dict[str, Any]) -> None:
        registry.register_all(state["records"])  # a worker process starts without them
        self.__dict__.update(state)

    @property
    def groups_per_epoch(self) -> int:
        steps = steps_per_pass(len(self.index), self.global_batch_size) * self.repeats
        return steps * self.global_batch_size // self.group_size

    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(
            len(self.index),
            self.global_batch_size,
            self.seed,
            epoch,
            self.repeats,
            self.shuffle,
        )

    def shape(self, number: int) -> tuple[int, int, int]:
        """(patch size, grid, timesteps) of the group with that running number, from 0."""
        epoch, group = divmod(number, self.groups_per_epoch)
        block = group * self.group_size // self.samples_per_shape
        draw = rng(self.seed, "shape", epoch + 1, block)
        patch = self.patch_sizes[draw.integers(len(self.patch_sizes))]
        fitting = usable_grids(patch, self.grids, self.index.tile_px)
        grid = fitting[draw.integers(len(fitting))]
        return patch, grid, self.timesteps[grid]

    def __call__(self, number: int) -> Group:
        """Makes this host's part of the group with that running number, from 0."""
        epoch, group = divmod(int(number), self.groups_per_epoch)
        epoch += 1
        patch, grid, steps = self.shape(int(number))
        members = np.arange(self.host_index, self.group_size, self.host_count)
        positions = group * self.group_size + members
        data = empty_arrays(self.index.modalities, patch * grid, steps, len(members))
        stamps = np.tile(np.array([1, 0, 2000], np.int32), (len(members), steps, 1))
        ok, numbers = np.zeros(len(members), bool), np.zeros(len(members), np.int64)
        problems: list[tuple[str, str]] = []
        order = self._order(epoch)
        for i, position in enumerate(positions):
            path, numbers[i] = self.index.locate(int(order[position]))
            views = {name: array[i] for name, array in data.items()}
            try:
                stamps[i] = self._read(path, patch, grid, steps, (epoch, int(position)), views)
                ok[i] = True
            except ReadError as e:
                problems.append((e.path, e.problem))
                for view in views.values():
                    view[...] = MISSING
        if self.transform is not None:
            data, stamps = self.transform(data, stamps, rng(self.seed, "transform", epoch, group))
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
        }
        self._mask(out, members, int(number))
        out[PROBLEMS] = problems
        return out

    def _read(
        self, path: AnyPath, patch: int, grid: int, steps: int, place: tuple[int, int], views
    ) -> np.ndarray:
        """Reads one sample's crop into `views`; returns its timestamps [steps, 3].

        A damaged copy in the cache is replaced once.
        """
        try:
            return self._read_file(path, patch, grid, steps, rng(self.seed, "crop", *place), views)
        except ReadError:
            if not self.store.forget(path):
                raise
        for view in views.values():
            view[...] = MISSING
        return self._read_file(path, patch, grid, steps, rng(self.seed, "crop", *place), views)

    def _read_file(
        self, path: AnyPath, patch: int, grid: int, steps: int, draw: np.random.Generator, views
    ) -> np.ndarray:
        names = self.index.modalities
        with open_sample(self.store.local(path), names) as file:
            if not self.use_cutmix:
                choose = draw_offsets(draw)
                return read_sample(
                    file,
                    names,
                    patch * grid,
                    steps,
                    choose,
                    normalized=self.normalized,
                    out=views,
                ).timestamps
            pieces = cutmix.draw_pieces(draw, grid)
            sample = cutmix.read_pieces(
                file, names, patch, steps, pieces, normalized=self.normalized
            )
        for name, view in views.items():
            view[...] = sample.arrays[name]
        return sample.timestamps

    def _mask(self, group: Group, members: np.ndarray, number: int) -> None:
        """Adds the masks; a sample with no token to encode in some view becomes a hole."""
        missing = missing_tokens(group["data"], int(group["patch_size"]), self.tokenization)
        epoch, ok = int(group["epoch"]), group["ok"]
        for key, strategy in (("mask_a", self.mask_a), ("mask_b", self.mask_b)):
            if strategy is None:
                continue
            context = MaskContext(
                rngs=[rng(self.seed, key, epoch, int(p)) for p in group["position"]],
                group_rng=rng(self.seed, f"{key} of group", epoch, int(group["group"])),
                group_size=self.group_size,
                members=members,
                step=number,
            )
            masks = strategy(missing, context)
            group[key] = {n: np.asarray(masks[n], np.int8) for n in self.index.modalities}
            encoded = [(m == ENCODE).reshape(len(members), -1).any(1) for m in group[key].values()]
            ok &= np.any(encoded, axis=0)
        for key in ("mask_a", "mask_b"):
            for mask in group.get(key, {}).values():
                mask[~ok] = MISSING_TOKEN
        for array in group["data"].values():
            array[~ok] = MISSING
