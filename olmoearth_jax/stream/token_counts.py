"""Host side: which tokens of a group are encoded and decoded, and what they need."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from olmoearth_jax.masks import DECODE, MISSING_TOKEN, VISIBLE, living
from olmoearth_jax.stream.stream_shape import (
    CROSS,
    GRID,
    READ,
    SAMPLE,
    SELF,
    TARGET,
    GridTable,
    StreamSpec,
    grid_table,
)


@dataclasses.dataclass
class TokenCounts:
    """Token roles of one group (the samples a host holds of it)."""

    group: dict[str, Any]
    """See `olmoearth_jax.data.pipeline`."""
    table: GridTable
    """Coordinates of the N tokens of every sample."""
    masks: np.ndarray
    """int8 [views, B, N]; holes are all MISSING_TOKEN"""
    need: np.ndarray
    """bool [B, N], tokens whose patch some view encodes or decodes; all tokens that aren't
    missing where the target encoder runs or all pixels are compared"""
    rank: np.ndarray
    """int32 [B, N], running number of a needed token within (sample, slot)"""
    patches: np.ndarray
    """int [B, slots], needed patches"""
    sparse: np.ndarray
    """int [B, slots], visible patches of slots that are not encodable as a rule"""
    enc: np.ndarray
    """int [views, B], visible tokens"""
    dec: np.ndarray
    """int [views, B, modalities], decoded tokens"""
    lengths: np.ndarray
    """int [plans, views, B, 2], queries and keys of the row in each plan; 0 for holes"""
    alive: np.ndarray
    """bool [B], False for holes"""
    loc: np.ndarray
    """int [views, B], locations of the pooler's grid; 0 for holes, and without a pooler"""
    per_patch: int = 1
    """locations per side of a patch"""

    @property
    def loads(self) -> np.ndarray:
        """int [B, 3], visible and decoded tokens and locations of a sample over its views."""
        return np.stack([self.enc.sum(0), self.dec.sum((0, 2)), self.loc.sum(0)], axis=1)


def _flat_masks(group: dict[str, Any], key: str, spec: StreamSpec) -> np.ndarray:
    """int8 [B, N]: the token masks of one view, slot-major as in `grid_table`."""
    size = len(group["position"])
    parts = []
    for name in spec.modalities:
        mask = group[key][name]
        parts.extend(mask[..., s].reshape(size, -1) for s in range(mask.shape[-1]))
    return np.concatenate(parts, axis=1)


def count_tokens(group: dict[str, Any], spec: StreamSpec, per_patch: int = 1) -> TokenCounts:
    """Counts the tokens of a group.

    A sample that is marked bad, or has no visible token in some view, becomes a hole: all of its
    tokens are dropped from both views (spec/train.md Q22).

    Args:
      group: see `olmoearth_jax.data.pipeline`.
      spec: the stream.
      per_patch: locations per side of a patch, where there is a pooler.

    Raises:
      ValueError: a row exceeds the stream's hard bound, so masking and bounds disagree.
    """
    table = grid_table(spec.slots, int(group["grid"]), group["timestamps"].shape[1])
    keys = ["mask_a", "mask_b"][: spec.views]
    masks = np.stack([_flat_masks(group, k, spec) for k in keys])
    if masks.shape[-1] != len(table.slot):
        raise ValueError(
            f"masks hold {masks.shape[-1]} tokens per sample, the grid has {len(table.slot)}: "
            "masking and model use different band sets"
        )
    alive = living(group["ok"], ([view] for view in masks))
    masks = np.where(alive[None, :, None], masks, np.int8(MISSING_TOKEN))
    visible, decoded = masks == VISIBLE, masks == DECODE
    every = spec.deep or spec.all_pixels
    need = ((masks != MISSING_TOKEN) if every else (visible | decoded)).any(0)
    starts = table.starts[:-1]
    patches = np.add.reduceat(need, starts, axis=1, dtype=np.int64)
    before = np.cumsum(patches, axis=1) - patches
    rank = np.cumsum(need, axis=1, dtype=np.int32) - 1 - before[:, table.slot]
    rare = np.array([not s.encodable for s in spec.slots])
    sparse = np.add.reduceat(visible.any(0), starts, axis=1, dtype=np.int64) * rare
    enc = visible.sum(-1)
    per_slot = np.add.reduceat(decoded, starts, axis=2, dtype=np.int64)
    owner = np.arange(len(spec.modalities))[:, None] == spec.slot_modality[None]
    dec = per_slot @ owner.T
    loc = (enc > 0) * ((int(group["grid"]) * per_patch) ** 2 if spec.loc_bound else 0)
    return TokenCounts(
        group, table, masks, need, rank, patches, sparse, enc, dec,
        _row_lengths(spec, enc, dec, loc, need.sum(1)), alive, loc, per_patch,
    )  # fmt: skip


def _row_lengths(
    spec: StreamSpec, enc: np.ndarray, dec: np.ndarray, loc: np.ndarray, present: np.ndarray
) -> np.ndarray:
    """int [plans, views, B, 2]: queries and keys of each row.

    Args:
      spec: the stream.
      enc: [views, B] visible tokens.
      dec: [views, B, modalities] decoded tokens.
      loc: [views, B] locations.
      present: [B] tokens that the target encoder sees.
    """
    total = dec.sum(-1)
    own = enc + spec.registers * (enc > 0)
    seen = np.zeros_like(enc)
    # A sample's one target row stands where its first view's row does.
    seen[0] = present + spec.registers * (present > 0)
    known = {
        SELF: (own, own),
        CROSS: (total, loc if spec.loc_bound else enc),
        READ: (loc, enc),
        GRID: (loc, loc),
        SAMPLE: (total, total),
        TARGET: (seen, seen),
    }
    out = np.empty((len(spec.plans), *enc.shape, 2), np.int64)
    for p, plan in enumerate(spec.plans):
        if plan.name in known:
            out[p] = np.stack(known[plan.name], axis=-1)
        else:
            out[p] = dec[..., spec.modalities.index(plan.name), None]
    most = np.array([(p.queries, p.keys) for p in spec.plans])
    if (out > most[:, None, None]).any():
        p, view, sample, _ = np.argwhere(out > most[:, None, None])[0]
        by_modality = zip(spec.modalities, dec[view, sample], strict=True)
        decoded = ", ".join(f"{name} {n}" for name, n in by_modality if n)
        plan, (queries, keys) = spec.plans[p], out[p, view, sample]
        raise ValueError(
            "the bounds of the masking strategies do not hold: a sample has "
            f"{enc[view, sample]} visible tokens, {total[view, sample]} decoded ones "
            f"({decoded or 'none'}) and {loc[view, sample]} locations; its row of {plan.name!r} "
            f"would be {queries} x {keys}, but may be {plan.queries} x {plan.keys}"
        )
    return out


def balance_devices(loads: np.ndarray, devices: int) -> np.ndarray:
    """int [n]: device of each sample; equal counts, greedily balanced, deterministic.

    Equal counts make the per-sample bounds hard bounds per device. Samples go, heaviest first, to
    the device whose fullest kind of load stays smallest.

    Args:
      loads: [n, kinds], what each sample costs in each kind (visible and decoded tokens, say).
      devices: devices to deal to.

    Raises:
      ValueError: n is not divisible by the devices.
    """
    n = len(loads)
    if n % devices:
        raise ValueError(f"{n} samples of a micro-step do not divide over {devices} devices")
    share = loads / np.maximum(loads.sum(0), 1)
    room = np.full(devices, n // devices)
    held = np.zeros((devices, loads.shape[1]))
    out = np.empty(n, np.int64)
    for i in np.argsort(-share.sum(1), kind="stable"):
        fullest = (held + share[i]).max(1)
        device = int(np.argmin(np.where(room > 0, fullest, np.inf)))
        out[i] = device
        held[device] += share[i]
        room[device] -= 1
    return out


@dataclasses.dataclass(frozen=True)
class Need:
    """What a micro-step asks of a rung."""

    totals: np.ndarray
    """int64 [2 slots + 3] as in `Rung.totals`, the most of any device"""
    lengths: np.ndarray
    """int [plans, devices, rows, 2], queries and keys; 0 where a device has fewer rows"""


def needs(counts: list[TokenCounts], devices: np.ndarray, spec: StreamSpec, count: int) -> Need:
    """What the samples of a micro-step need of their `count` devices.

    Args:
      counts: the groups of a micro-step.
      devices: int [n], device of each sample, samples in group order.
    """
    patches = np.concatenate([c.patches for c in counts])
    sparse = np.concatenate([c.sparse for c in counts])
    # Rows of holes have no visible token and no registers either.
    enc = np.concatenate([c.enc + spec.registers * (c.enc > 0) for c in counts], axis=1)
    dec = np.concatenate([c.dec.sum(-1) for c in counts], axis=1)
    loc = np.concatenate([c.loc for c in counts], axis=1)
    lengths = np.concatenate([c.lengths for c in counts], axis=2)
    totals = np.zeros(2 * len(spec.slots) + 3, np.int64)
    rows = np.zeros((len(spec.plans), count, spec.rows, 2), np.int64)
    for d in range(count):
        mine = devices == d
        streams = [x[:, mine].sum() for x in (enc, dec, loc)]
        sums = patches[mine].sum(0), sparse[mine].sum(0), streams
        totals = np.maximum(totals, np.concatenate(sums))
        own = lengths[:, :, mine].reshape(len(spec.plans), -1, 2)
        rows[:, d, : own.shape[1]] = own
    return Need(totals, rows)
