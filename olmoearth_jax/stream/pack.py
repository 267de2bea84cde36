"""Host side: lays the tokens of a micro-step out in the fixed buffers of a rung."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import flax.struct
import numpy as np

from olmoearth_jax.masks import DECODE, TARGET_ONLY, VISIBLE
from olmoearth_jax.stream.ladder import class_of
from olmoearth_jax.stream.stream_shape import REGISTER, Rung, StreamSpec, pack_coordinates
from olmoearth_jax.stream.token_counts import TokenCounts

Array = Any
"""NumPy on the host, JAX on the devices."""


@flax.struct.dataclass
class TargetStream:
    """Per sample the registers and all tokens that aren't missing, as many as target patches."""

    patch: Array
    """int32 [table + registers], row of the target patch table of each token"""
    coord: Array
    """uint32, as long"""
    row: Array
    """int32, as long: attention row (that of the sample's first view)"""
    offset: Array
    """int32 [rows]"""
    length: Array
    """int32 [rows]"""
    dec_token: Array
    """int32 [dec], the token that each decoded token has to predict"""


@flax.struct.dataclass
class PixelIndex:
    """Which token predicts each patch.

    Tokens are those of the decoder's stream and behind them, where all pixels are compared, those
    of the encoder's.
    """

    token: Array
    """int32 [views, table], position of the token; as many as there are tokens where a patch does
    not count, and one more where it counts but no decoder reads or predicts it"""
    inverse: Array
    """int32 [1, tokens], place of each token in the flattened `token`"""
    sample: Array
    """int32 [table], sample of each patch"""


@flax.struct.dataclass
class LocationStream:
    """The locations of the pooler's grids, row by row; those of the first view stand in front."""

    coord: Array
    """uint32 [loc], packed (0, 0, row, column), counted in locations"""
    row: Array
    """int32 [loc], attention row"""
    offset: Array
    """int32 [rows]"""
    length: Array
    """int32 [rows]"""
    per_patch: Array
    """int32 [samples], locations per side of a patch"""


@flax.struct.dataclass
class MicroBatch:
    """Index arrays of one micro-step; every array has a leading device axis.

    Positions equal to an array's length mean "nothing" (a gather there yields zeros).
    """

    sparse: tuple[Array, ...]
    """per non-encodable slot, int32 [sparse capacity] rows of that slot's patches"""
    enc_patch: Array
    """int32 [enc], row of the online patch table of each visible token"""
    enc_inverse: Array
    """int32 [views, table], stream position of each table row"""
    table_sample: Array
    """int32 [table], sample of each table row (band dropout)"""
    enc_coord: Array
    """uint32 [enc], packed (slot, time, row, column)"""
    enc_row: Array
    """int32 [enc], attention row"""
    dec_patch: Array
    """int32 [dec], row of the target patch table"""
    dec_coord: Array
    """uint32 [dec]"""
    dec_row: Array
    """int32 [dec]"""
    order: Array
    """int32 [plans, rows], rows in the class order of each plan"""
    rank: Array
    """int32 [plans, rows], the inverse: place of each row in that order"""
    row_sample: Array
    """int32 [rows]"""
    row_view: Array
    """int32 [rows]"""
    enc_offset: Array
    """int32 [rows], extents in the streams, as the next three"""
    enc_length: Array
    dec_offset: Array
    dec_length: Array
    mod_offset: Array
    """int32 [rows, modalities], decoded extents per modality"""
    mod_length: Array
    """likewise"""
    sample_row: Array
    """int32 [views, samples], row of each (view, sample)"""
    timestamps: Array
    """int32 [samples, 12, 3]"""
    patch_size: Array
    """int32 [samples]"""
    segment: Array
    """int32 [samples], group within the micro-step"""
    weight: Array
    """float32 [samples], 0 for holes"""
    position: Array
    """int32 [samples], position in the epoch, the key of drop path"""
    target: TargetStream | None
    """the stream of the target encoder, if it runs"""
    pixels: PixelIndex | None
    """which token predicts each patch, if pixels are compared"""
    locations: LocationStream | None = None
    """the pooler's grids, if there is a pooler"""


@dataclasses.dataclass
class PatchRun:
    """Samples of one group whose patches one device makes: input of `patches.fill_buffers`."""

    counts: TokenCounts
    members: np.ndarray
    """int [n], samples within the group, in patch-buffer order"""
    offsets: np.ndarray
    """int [n, slots], first buffer row of each sample per slot"""


@dataclasses.dataclass
class _DevicePack:
    """One device's share: index arrays, and the runs that fill its patch buffers."""

    arrays: MicroBatch
    runs: list[PatchRun]


def online_sections(spec: StreamSpec, rung: Rung) -> np.ndarray:
    """int [slots + 1]: where each slot's rows start in the online patch table."""
    sizes = [rung.patches[i] if s.encodable else rung.sparse[i] for i, s in enumerate(spec.slots)]
    return np.concatenate([[0], np.cumsum(sizes)])


def target_sections(rung: Rung) -> np.ndarray:
    """int [slots + 1]: where each slot's rows start in the target patch table."""
    return np.concatenate([[0], np.cumsum(rung.patches)])


def assign_rows(classes: np.ndarray, counts: tuple[int, ...]) -> np.ndarray:
    """int [n]: place of each row; rows overflow into longer classes when theirs is full.

    Args:
      classes: int [n], smallest class that holds each row.
      counts: places per class.

    Raises:
      ValueError: too few places.
    """
    out = np.full(len(classes), -1)
    start, waiting = 0, np.zeros(0, np.int64)
    for c, room in enumerate(counts):
        waiting = np.concatenate([waiting, np.flatnonzero(classes == c)])
        taken, waiting = waiting[:room], waiting[room:]
        out[taken] = start + np.arange(len(taken))
        start += room
    if len(waiting):
        raise ValueError("the rung has too few rows for the samples of a device")
    return out


def _pad(parts: list[np.ndarray], size: int, fill: int, dtype: type) -> np.ndarray:
    out = np.full(size, fill, dtype)
    if parts:
        values = np.concatenate(parts)
        out[: len(values)] = values
    return out


class _Block(NamedTuple):
    """The living samples of one group on one device, and where their patches lie."""

    group: TokenCounts
    members: np.ndarray
    """int [n], samples within the group"""
    numbers: np.ndarray
    """int [n], numbers of the samples on the device"""
    online: np.ndarray
    """int [n, N], row of each token in the online patch table"""
    target: np.ndarray
    """int [n, N], row in the target patch table"""


class _Packer:
    """Gives out the rows of one device's patch tables; made once by `pack_device`."""

    def __init__(self, spec: StreamSpec, rung: Rung):
        self.spec, self.rung = spec, rung
        self.online, self.target = online_sections(spec, rung), target_sections(rung)
        self.filled = np.zeros(len(spec.slots), np.int64)
        self.sparse: list[list[np.ndarray]] = [[] for _ in spec.slots]
        self.sparse_filled = np.zeros(len(spec.slots), np.int64)
        self.rare = np.array([not s.encodable for s in spec.slots])

    def place_patches(
        self, group: TokenCounts, members: np.ndarray, numbers: np.ndarray
    ) -> tuple[_Block, np.ndarray]:
        """Reserves the patches of a group's samples, one sample behind another.

        Returns:
          (the block, int [n, slots] first buffer row of each sample per slot).
        """
        slot, starts, patches = group.table.slot, group.table.starts, group.patches[members]
        offsets = self.filled + np.cumsum(patches, axis=0) - patches
        self.filled = self.filled + patches.sum(0)
        local = offsets[:, slot] + group.rank[members]
        online = self.online[slot] + local
        for s in np.flatnonzero(group.sparse[members].any(0)):
            part = slice(starts[s], starts[s + 1])
            seen = (group.masks[:, members, part] == VISIBLE).any(0)
            found = local[:, part][seen]
            self.sparse[s].append(found)
            first = self.online[s] + self.sparse_filled[s]
            online[:, part][seen] = first + np.arange(len(found))
            self.sparse_filled[s] += len(found)
        return _Block(group, members, numbers, online, self.target[slot] + local), offsets


def pack_device(
    spec: StreamSpec, rung: Rung, counts: list[TokenCounts], members: list[np.ndarray]
) -> _DevicePack:
    """Packs one device's samples.

    Args:
      counts: the groups of the micro-step.
      members: per group, the samples this device holds.
    """
    packer = _Packer(spec, rung)
    blocks: list[_Block] = []
    runs, first = [], 0
    for group, mine in zip(counts, members, strict=True):
        living = np.flatnonzero(group.alive[mine])
        if len(living):
            block, offsets = packer.place_patches(group, mine[living], first + living)
            blocks.append(block)
            runs.append(PatchRun(group, block.members, offsets))
        first += len(mine)
    streams = _streams(spec, rung, blocks, packer)
    items = _items(spec, counts, members)
    tables = {
        int(i): (block.online[n], block.target[n])
        for block in blocks
        for n, i in enumerate(block.numbers)
    }
    arrays = MicroBatch(
        **streams,
        target=_target_stream(spec, counts, items, tables, packer, streams["dec_patch"])
        if spec.deep
        else None,
        pixels=_pixel_index(spec, counts, items, tables, packer) if spec.pixels else None,
        locations=_locations(spec, rung, counts, items, members) if spec.loc_bound else None,
        **_orders(spec, rung, blocks),
        **_sample_arrays(spec, counts, members),
    )
    return _DevicePack(arrays, runs)


def _items(spec: StreamSpec, counts: list[TokenCounts], members: list[np.ndarray]) -> list:
    """(view, number on the device, group, sample of the group) of each row."""
    samples = [(g, int(b)) for g, mine in enumerate(members) for b in mine]
    alive = [(i, g, b) for i, (g, b) in enumerate(samples) if counts[g].alive[b]]
    return [(v, i, g, b) for v in range(spec.views) for i, g, b in alive]


def _orders(spec: StreamSpec, rung: Rung, blocks: list[_Block]) -> dict:
    """Where each row stands in the class order of each plan; unused rows fill the gaps."""
    plans, rank = len(spec.plans), np.empty((len(spec.plans), spec.rows), np.int32)
    parts = [block.group.lengths[:, :, block.members] for block in blocks]
    parts = parts or [np.zeros((plans, spec.views, 0, 2), np.int64)]
    lengths = np.concatenate(parts, axis=2).reshape(plans, -1, 2)
    for p, classes in enumerate(rung.rows):
        smallest = class_of(lengths[p], classes)
        places = assign_rows(smallest, tuple(c.rows for c in classes))
        free = np.ones(spec.rows, bool)
        free[places] = False
        rank[p] = np.concatenate([places, np.flatnonzero(free)])
    order = np.empty_like(rank)
    np.put_along_axis(order, rank, np.arange(spec.rows, dtype=np.int32)[None], axis=1)
    return {"rank": rank, "order": order}


class _Stream:
    """The tokens of one stream, row by row."""

    def __init__(self, size: int, nothing: int, rows: int, registers: int = 0):
        """Room for `size` tokens; `nothing` is the patch of registers and of what stays empty."""
        self.patch = np.full(size, nothing, np.int32)
        self.coord = np.zeros(size, np.uint32)
        self.row = np.full(size, rows, np.int32)
        self.offset, self.length = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._registers, self._at = registers, 0

    def append(self, block: _Block, first: int, chosen: np.ndarray, table: np.ndarray):
        """Appends the tokens of a block's rows, which are numbered from `first`.

        Args:
          block: the samples.
          first: row of the first of them.
          chosen: bool [n, N], the tokens.
          table: int [n, N], their patches.

        Returns:
          int [chosen tokens], their positions in the stream.
        """
        extra, count = self._registers, chosen.sum(1)
        mine = slice(first, first + len(count))
        self.length[mine] = count + extra
        self.offset[mine] = self._at + np.cumsum(count + extra) - (count + extra)
        number, token = np.nonzero(chosen)
        places = self._at + np.arange(len(token)) + extra * (number + 1)
        self.patch[places] = table[number, token]
        self.coord[places] = block.group.table.coord[token]
        self.row[places] = first + number
        if extra:
            front = self.offset[mine, None] + np.arange(extra)
            self.coord[front] = REGISTER
            self.row[front] = np.arange(first, first + len(count))[:, None]
        self._at += len(token) + extra * len(count)
        return places


def _streams(spec: StreamSpec, rung: Rung, blocks: list[_Block], packer: _Packer) -> dict:
    """The token and row arrays of one device."""
    total, size = spec.rows, int(packer.online[-1])
    enc = _Stream(rung.enc, size, total, spec.registers)
    dec = _Stream(rung.dec, int(packer.target[-1]), total)
    row_sample, row_view = np.full(total, spec.samples, np.int32), np.zeros(total, np.int32)
    mod_offset, mod_length = np.zeros((2, total, len(spec.modalities)), np.int32)
    sample_row = np.full((spec.views, spec.samples), total, np.int32)
    inverse = np.full((spec.views, size), rung.enc, np.int32)
    owner = np.zeros(size, np.int32)
    row = 0
    for view in range(spec.views):
        for block in blocks:
            mine = slice(row, row + len(block.members))
            mask = block.group.masks[view, block.members]
            seen = mask == VISIBLE
            places = enc.append(block, row, seen, block.online)
            patches = block.online[seen]
            inverse[view, patches] = places
            owner[patches] = np.repeat(block.numbers, seen.sum(1))
            dec.append(block, row, mask == DECODE, block.target)
            decoded = block.group.dec[view, block.members]
            row_sample[mine], row_view[mine] = block.numbers, view
            mod_length[mine] = decoded
            mod_offset[mine] = dec.offset[mine, None] + np.cumsum(decoded, axis=1) - decoded
            sample_row[view, block.numbers] = np.arange(row, row + len(block.members))
            row += len(block.members)
    sparse = tuple(
        _pad(packer.sparse[s], rung.sparse[s], rung.patches[s], np.int32)
        for s in np.flatnonzero(packer.rare)
    )
    return {
        "row_sample": row_sample, "row_view": row_view, "sample_row": sample_row,
        "enc_patch": enc.patch, "enc_coord": enc.coord, "enc_row": enc.row,
        "enc_offset": enc.offset, "enc_length": enc.length, "enc_inverse": inverse,
        "dec_patch": dec.patch, "dec_coord": dec.coord, "dec_row": dec.row,
        "dec_offset": dec.offset, "dec_length": dec.length,
        "mod_offset": mod_offset, "mod_length": mod_length,
        "table_sample": owner, "sparse": sparse,
    }  # fmt: skip


def _target_stream(spec, counts, items, tables, packer, dec_patch) -> TargetStream:
    """Tokens in row order; a decoded token finds its own through the patch they share."""
    table, total, extra = int(packer.target[-1]), spec.rows, spec.registers
    size = table + extra * spec.samples
    token_of = np.full(table + 1, size, np.int32)
    offset, length = np.zeros(total, np.int32), np.zeros(total, np.int32)
    patch, coord, rows, at = [], [], [], 0
    for row, (view, i, g, b) in enumerate(items):
        if view:
            continue
        tokens = np.flatnonzero(counts[g].need[b])
        mine = tables[i][1][tokens]
        patch += [np.full(extra, table), mine]
        coord += [np.full(extra, REGISTER), counts[g].table.coord[tokens]]
        rows.append(np.full(extra + len(tokens), row))
        token_of[mine] = at + extra + np.arange(len(tokens))
        offset[row], length[row] = at, extra + len(tokens)
        at += extra + len(tokens)
    return TargetStream(
        patch=_pad(patch, size, table, np.int32),
        coord=_pad(coord, size, 0, np.uint32),
        row=_pad(rows, size, total, np.int32),
        offset=offset,
        length=length,
        dec_token=token_of[dec_patch],
    )


def _pixel_index(spec, counts, items, tables, packer) -> PixelIndex:
    """Where the prediction of each patch stands in the decoder's stream, or in the encoder's."""
    size, dec = int(packer.target[-1]), packer.rung.dec
    total = dec + (packer.rung.enc if spec.all_pixels else 0)
    token = np.full((spec.views, size), total, np.int32)
    inverse = np.full((1, total), spec.views * size, np.int32)
    sample, at, seen_at = np.zeros(size, np.int32), 0, dec

    def put(view: int, first: int, patches: np.ndarray) -> int:
        stop = first + len(patches)
        token[view, patches] = np.arange(first, stop)
        inverse[0, first:stop] = view * size + patches
        return stop

    for view, i, g, b in items:
        mask, patches = counts[g].masks[view, b], tables[i][1]
        sample[patches[counts[g].need[b]]] = i
        at = put(view, at, patches[mask == DECODE])
        if spec.all_pixels:
            seen_at = put(view, seen_at + spec.registers, patches[mask == VISIBLE])
            token[view, patches[mask == TARGET_ONLY]] = total + 1
    return PixelIndex(token, inverse, sample)


def _locations(spec, rung, counts, items, members) -> LocationStream:
    """Grids in row order, each row-major."""
    total = spec.rows
    offset, length = np.zeros(total, np.int32), np.zeros(total, np.int32)
    coord, rows, at = [], [], 0
    for row, (view, _, g, b) in enumerate(items):
        size = int(counts[g].loc[view, b])
        place = np.arange(size)
        side = math.isqrt(size)
        coord.append(pack_coordinates(0, 0, place // side, place % side))
        rows.append(np.full(size, row))
        offset[row], length[row] = at, size
        at += size
    per_patch, first = np.ones(spec.samples, np.int32), 0
    for group, mine in zip(counts, members, strict=True):
        per_patch[first : first + len(mine)] = group.per_patch
        first += len(mine)
    return LocationStream(
        coord=_pad(coord, rung.loc, 0, np.uint32),
        row=_pad(rows, rung.loc, total, np.int32),
        offset=offset,
        length=length,
        per_patch=per_patch,
    )


def _sample_arrays(spec: StreamSpec, counts: list[TokenCounts], members: list[np.ndarray]) -> dict:
    """Per-sample arrays of one device."""
    stamps = np.zeros((spec.samples, 12, 3), np.int32)
    stamps[..., 2] = 2000
    out = {
        "timestamps": stamps,
        "patch_size": np.ones(spec.samples, np.int32),
        "segment": np.zeros(spec.samples, np.int32),
        "weight": np.zeros(spec.samples, np.float32),
        "position": np.zeros(spec.samples, np.int32),
    }
    first = 0
    for g, (count, mine) in enumerate(zip(counts, members, strict=True)):
        group, own = count.group, slice(first, first + len(mine))
        stamps[own, : group["timestamps"].shape[1]] = group["timestamps"][mine]
        out["patch_size"][own] = group["patch_size"]
        out["segment"][own] = g
        out["weight"][own] = count.alive[mine]
        out["position"][own] = group["position"][mine]
        first += len(mine)
    return out
