"""Building blocks shared by the strategies (spec/train.md section 2.1), at token level."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masking.base import MaskContext, Tokens
from olmoearth_jax.masks import DECODE, MISSING_TOKEN, TARGET_ONLY, VISIBLE


def ordered(missing: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Modalities in the order in which draws are made, whatever the order of the dict."""
    return modalities.in_masked_order(missing)


def any_token(flags: np.ndarray) -> np.ndarray:
    """bool [B, S]: whether any token of the sample's band set is flagged."""
    return np.asarray(flags.any(axis=tuple(range(1, flags.ndim - 1))))


def role_values(n: int, n_encode: int, n_decode: int) -> np.ndarray:
    """int8 [n]: `n_encode` zeros, then `n_decode` twos, then ones."""
    values = np.full(n, TARGET_ONLY, np.int8)
    values[:n_encode] = VISIBLE
    values[n_encode : n_encode + n_decode] = DECODE
    return values


def shuffled(values: np.ndarray, ctx: MaskContext) -> np.ndarray:
    """Permutes the last axis of `values` ([n] or [B, n]) uniformly and separately per sample."""
    n = values.shape[-1]
    keys = np.empty((len(ctx.rngs), n))
    for row, rng in zip(keys, ctx.rngs, strict=True):
        rng.random(out=row)
    out = np.empty(keys.shape, np.int8)
    np.put_along_axis(out, keys.argsort(axis=1), np.broadcast_to(values, keys.shape), axis=1)
    return out


def random_tokens(name: str, shape: tuple[int, ...], e: float, d: float, ctx: MaskContext):
    """Block (b): exact shares of one modality's tokens, all band sets and times in one pool.

    Static modalities have one pool over the whole group, so that their shares hold over the
    group and not per sample (quirk Q25).
    """
    if modalities.get(name).kind == "static":
        per_sample = math.prod(shape[1:])
        n = ctx.group_size * per_sample
        pool = ctx.group_rng.permutation(role_values(n, int(n * e), int(n * d)))
        return pool.reshape(ctx.group_size, *shape[1:])[ctx.members]
    n = math.prod(shape[1:])
    return shuffled(role_values(n, int(n * e), int(n * d)), ctx).reshape(shape)


def with_missing(mask: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Block (a): `mask` with 3 wherever the token is missing (in place)."""
    mask[missing] = MISSING_TOKEN
    return mask


def refill(missing: np.ndarray, e: float, d: float, rng: np.random.Generator) -> np.ndarray:
    """Block (c): new random roles for the present tokens of (a part of) one sample.

    A single present token always becomes an encoder token (quirk Q3). The product of count and
    ratio is a float32 one, as in the reference.
    """
    out = np.full(missing.shape, MISSING_TOKEN, np.int8)
    present = ~missing
    n = int(np.count_nonzero(present))
    if n == 1:
        out[present] = VISIBLE
    elif n:
        counts = (np.float32(n) * np.asarray([e, d], np.float32)).astype(int)
        values = role_values(n, *counts)
        rng.shuffle(values)
        out[present] = values
    return out


def uniform_int(rng: np.random.Generator, low: int, high: int) -> int:
    """A uniform integer of low..high, both included; `low` where the range is empty."""
    return int(rng.integers(low, max(low, high) + 1))


def uniform_subset(items: Iterable, size: int, rng: np.random.Generator) -> set:
    """A uniform subset of that size."""
    items = list(items)
    return {items[i] for i in rng.permutation(len(items))[:size]}


def complete_timesteps(missing: Tokens) -> np.ndarray:
    """Timesteps at which some multitemporal modality lacks nothing in any sample.

    Samples without any present token (holes) don't count. Empty when there is no multitemporal
    modality.
    """
    live = np.zeros(len(next(iter(missing.values()))), bool)
    for m in missing.values():
        live |= ~m.reshape(len(m), -1).all(axis=1)
    found: np.ndarray | None = None
    for name, m in missing.items():
        if not modalities.get(name).multitemporal:
            continue
        axes = tuple(a for a in range(m.ndim) if a != m.ndim - 2)
        complete = np.asarray(~m[live].any(axis=axes))
        found = complete if found is None else found | complete
    return np.flatnonzero(found) if found is not None else np.zeros(0, int)
