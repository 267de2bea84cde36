"""Host side: lays the tokens of a micro-step out in the fixed buffers of a rung."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

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
class DevicePack:
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


class _Packer:
    """Builds one device's arrays sample by sample; made once by `pack_device`."""

    def __init__(self, spec: StreamSpec, rung: Rung):
        self.spec, self.rung = spec, rung
        self.online, self.target = online_sections(spec, rung), target_sections(rung)
        self.filled = np.zeros(len(spec.slots), np.int64)
        self.sparse: list[list[np.ndarray]] = [[] for _ in spec.slots]
        self.sparse_filled = np.zeros(len(spec.slots), np.int64)
        self.rare = np.array([not s.encodable for s in spec.slots])

    def place_patches(self, group: TokenCounts, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Reserves a sample's patches; returns its rows in the online and target tables."""
        slot = group.table.slot
        offsets = self.filled.copy()
        local = offsets[slot] + group.rank[b]
        self.filled += group.patches[b]
        online = self.online[slot] + local
        if group.sparse[b].any():
            seen = (group.masks[:, b] == VISIBLE).any(0)
            for s in np.flatnonzero(group.sparse[b]):
                tokens = np.flatnonzero(seen & (slot == s))
                self.sparse[s].append(local[tokens])
                online[tokens] = self.online[s] + self.sparse_filled[s] + np.arange(len(tokens))
                self.sparse_filled[s] += len(tokens)
        return online, self.target[slot] + local


def pack_device(
    spec: StreamSpec, rung: Rung, counts: list[TokenCounts], members: list[np.ndarray]
) -> DevicePack:
    """Packs one device's samples.

    Args:
      counts: the groups of the micro-step.
      members: per group, the samples this device holds.
    """
    samples = [(g, int(b)) for g, mine in enumerate(members) for b in mine]
    alive = [(i, g, b) for i, (g, b) in enumerate(samples) if counts[g].alive[b]]
    items = [(v, i, g, b) for v in range(spec.views) for i, g, b in alive]
    packer = _Packer(spec, rung)
    tables, runs = {}, []
    for g, mine in enumerate(members):
        offsets = []
        for i, gg, b in alive:
            if gg == g:
                offsets.append(packer.filled.copy())
                tables[i] = packer.place_patches(counts[g], b)
        if offsets:
            live = np.array([b for b in mine if counts[g].alive[b]])
            runs.append(PatchRun(counts[g], live, np.stack(offsets)))
    streams = _streams(spec, rung, counts, items, tables, packer)
    arrays = MicroBatch(
        **streams,
        target=_target_stream(spec, counts, items, tables, packer, streams["dec_patch"])
        if spec.deep
        else None,
        pixels=_pixel_index(spec, counts, items, tables, packer) if spec.pixels else None,
        locations=_locations(spec, rung, counts, items, samples) if spec.loc_bound else None,
        **_orders(spec, rung, counts, items),
        **_sample_arrays(spec, counts, samples),
    )
    return DevicePack(arrays, runs)


def _orders(spec: StreamSpec, rung: Rung, counts: list[TokenCounts], items: list) -> dict:
    """Where each row stands in the class order of each plan; unused rows fill the gaps."""
    rank = np.empty((len(spec.plans), spec.rows), np.int32)
    for p, classes in enumerate(rung.rows):
        lengths = np.array([counts[g].lengths[p, v, b] for v, _, g, b in items])
        smallest = class_of(lengths.reshape(-1, 2), classes)
        places = assign_rows(smallest, tuple(c.rows for c in classes))
        free = np.setdiff1d(np.arange(spec.rows), places)
        rank[p] = np.concatenate([places, free])
    return {"rank": rank, "order": np.argsort(rank, axis=1).astype(np.int32)}


def _streams(spec, rung, counts, items, tables, packer) -> dict:
    """The token and row arrays of one device."""
    total = spec.rows
    shape = (total, len(spec.modalities))
    row_arrays = {
        "row_sample": np.full(total, spec.samples, np.int32),
        "row_view": np.zeros(total, np.int32),
        "enc_offset": np.zeros(total, np.int32),
        "enc_length": np.zeros(total, np.int32),
        "dec_offset": np.zeros(total, np.int32),
        "dec_length": np.zeros(total, np.int32),
        "mod_offset": np.zeros(shape, np.int32),
        "mod_length": np.zeros(shape, np.int32),
    }
    sample_row = np.full((spec.views, spec.samples), total, np.int32)
    inverse = np.full((spec.views, int(packer.online[-1])), rung.enc, np.int32)
    owner = np.zeros(int(packer.online[-1]), np.int32)
    enc: dict[str, list] = {"patch": [], "coord": [], "row": []}
    dec: dict[str, list] = {"patch": [], "coord": [], "row": []}
    enc_at = dec_at = 0
    extra = spec.registers
    nothing = int(packer.online[-1])
    for row, (view, i, g, b) in enumerate(items):
        group = counts[g]
        mask = group.masks[view, b]
        online, target = tables[i]
        seen, wanted = np.flatnonzero(mask == VISIBLE), np.flatnonzero(mask == DECODE)
        for part, value in (("patch", nothing), ("coord", REGISTER), ("row", row)):
            enc[part].append(np.full(extra, value))
        for store, tokens, table in ((enc, seen, online), (dec, wanted, target)):
            store["patch"].append(table[tokens])
            store["coord"].append(group.table.coord[tokens])
            store["row"].append(np.full(len(tokens), row))
        inverse[view, online[seen]] = enc_at + extra + np.arange(len(seen))
        owner[online[seen]] = i
        decoded = group.dec[view, b]
        row_arrays["row_sample"][row] = i
        row_arrays["row_view"][row] = view
        row_arrays["enc_offset"][row], row_arrays["enc_length"][row] = enc_at, extra + len(seen)
        row_arrays["dec_offset"][row], row_arrays["dec_length"][row] = dec_at, len(wanted)
        row_arrays["mod_length"][row] = decoded
        row_arrays["mod_offset"][row] = dec_at + np.cumsum(decoded) - decoded
        sample_row[view, i] = row
        enc_at, dec_at = enc_at + extra + len(seen), dec_at + len(wanted)
    return {
        **row_arrays,
        "sample_row": sample_row,
        "enc_inverse": inverse,
        "table_sample": owner,
        "enc_patch": _pad(enc["patch"], rung.enc, int(packer.online[-1]), np.int32),
        "enc_coord": _pad(enc["coord"], rung.enc, 0, np.uint32),
        "enc_row": _pad(enc["row"], rung.enc, total, np.int32),
        "dec_patch": _pad(dec["patch"], rung.dec, int(packer.target[-1]), np.int32),
        "dec_coord": _pad(dec["coord"], rung.dec, 0, np.uint32),
        "dec_row": _pad(dec["row"], rung.dec, total, np.int32),
        "sparse": tuple(
            _pad(packer.sparse[s], rung.sparse[s], rung.patches[s], np.int32)
            for s in np.flatnonzero(packer.rare)
        ),
    }


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


def _locations(spec, rung, counts, items, samples) -> LocationStream:
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
    per_patch = np.ones(spec.samples, np.int32)
    for i, (g, _) in enumerate(samples):
        per_patch[i] = counts[g].per_patch
    return LocationStream(
        coord=_pad(coord, rung.loc, 0, np.uint32),
        row=_pad(rows, rung.loc, total, np.int32),
        offset=offset,
        length=length,
        per_patch=per_patch,
    )


def _sample_arrays(spec: StreamSpec, counts: list[TokenCounts], samples: list) -> dict:
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
    for i, (g, b) in enumerate(samples):
        group = counts[g].group
        steps = group["timestamps"].shape[1]
        stamps[i, :steps] = group["timestamps"][b]
        out["patch_size"][i] = group["patch_size"]
        out["segment"][i] = g
        out["weight"][i] = counts[g].alive[b]
        out["position"][i] = group["position"][b]
    return out
