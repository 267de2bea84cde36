"""Upper bounds on the tokens a strategy can give one sample, for sizing static buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from olmoearth_jax import modalities
from olmoearth_jax.masking.base import Strategy
from olmoearth_jax.masking.modality_choice import RandomFixedModality
from olmoearth_jax.masking.modality_cross import ModalityCross, ModalityCrossRandom
from olmoearth_jax.masking.random_tokens import Random, RandomIncreasing, RandomRange
from olmoearth_jax.masking.space_time import RandomSpace, Space
from olmoearth_jax.masking.with_decode import RandomTimeWithDecode, RandomWithDecode

Counts = Mapping[str, tuple[int, int]]
"""Per modality (tokens per band set, band sets)."""


@dataclass(frozen=True)
class TokenBounds:
    """Bounds that hold for every draw and every pattern of missing tokens of one sample.

    Attributes:
      encode: encoder tokens in all; can be less than the sum over modalities.
      encode_by_modality: encoder tokens per modality.
      decode: decoder tokens per modality.
    """

    encode: int
    encode_by_modality: dict[str, int]
    decode: dict[str, int]


def _shares(counts: Counts, e: float, d: float) -> TokenBounds:
    """Block (b): floors of the shares; a static modality's pool is shared with other samples."""
    total = {m: t * s for m, (t, s) in counts.items()}
    static = {m for m in counts if modalities.get(m).kind == "static"}
    encode = {m: n if m in static else int(n * e) for m, n in total.items()}
    decode = {m: n if m in static else int(n * d) for m, n in total.items()}
    return TokenBounds(sum(encode.values()), encode, decode)


def _fixed(strategy: RandomFixedModality, counts: Counts) -> TokenBounds:
    base = _shares(counts, strategy.encode_ratio, strategy.decode_ratio)
    decoded = [m for m in strategy.decoded_modalities if m in counts]
    encode = base.encode_by_modality | dict.fromkeys(decoded, 0)
    decode = base.decode | {m: math.prod(counts[m]) for m in decoded}
    return TokenBounds(sum(encode.values()), encode, decode)


def _cross(strategy: ModalityCross, counts: Counts) -> TokenBounds:
    base = _shares(counts, strategy.encode_ratio, strategy.decode_ratio)
    only_decode = [m for m in counts if m in strategy.only_decode_modalities]
    encode, decode = dict(base.encode_by_modality), dict(base.decode)
    for m, (t, s) in counts.items():
        if strategy.overrides(m):
            encode[m] = decode[m] = t * s
        elif m not in only_decode:
            # A refilled single token is always an encoder token.
            encode[m] = max(encode[m], min(t * s, 1))
    encodable = {m: n for m, n in encode.items() if m not in only_decode}
    # An only-decode band set is encoded only in samples that list hardly anything else. Then it
    # is the only one, beside modalities that were refilled because none of their tokens had been
    # encoded (or none decoded), which leaves at most the others.
    lone = max((encode[m] for m in only_decode), default=0)
    if isinstance(strategy, ModalityCrossRandom):
        for m in encodable if lone else ():
            n = math.prod(counts[m])
            left = n - min(base.encode_by_modality[m], base.decode[m])
            lone += max(int(left * strategy.encode_ratio), min(n, 1))
    elif lone:
        lone += sum(encodable.values())
    return TokenBounds(max(sum(encodable.values()), lone), encode, decode)


def _with_decode(strategy: RandomWithDecode, counts: Counts, timesteps: int | None) -> TokenBounds:
    e, d = strategy.encode_ratio, strategy.decode_ratio
    encode, decode, best = {}, {}, []
    band_sets = sum(s for m, (_, s) in counts.items() if m not in strategy.only_decode_modalities)
    chosen = math.ceil(band_sets * e)
    for m, (t, s) in counts.items():
        if m in strategy.only_decode_modalities:
            encode[m], decode[m] = 0, t * s
            continue
        share_e, share_d = max(int(t * e), min(t, 1)), int(t * d)
        by_time = isinstance(strategy, RandomTimeWithDecode) and strategy.random_ratio < 1.0
        if by_time and modalities.get(m).kind == "space_time":
            # Without knowing the time axis, all tokens could be at the chosen timesteps.
            steps = timesteps or 1
            chosen_steps = math.ceil(steps * e)
            share_e = max(share_e, t // steps * chosen_steps)
            share_d = max(share_d, t // steps * (steps - chosen_steps) if timesteps else t)
        best += [share_e] * s
        # The band sets not chosen for encoding may hold a single token, which is encoded.
        encode[m] = share_e * min(s, max(chosen, 1)) + max(s - max(chosen, 1), 0)
        decode[m] = share_d * min(s, max(band_sets - chosen, 1))
    best.sort(reverse=True)
    total = sum(best[: max(chosen, 1)]) + max(band_sets - max(chosen, 1), 0)
    return TokenBounds(min(total, sum(encode.values())), encode, decode)


def max_tokens(
    strategy: Strategy, token_counts: Counts, timesteps: int | None = None
) -> TokenBounds:
    """Bounds of `strategy` for samples of one shape.

    Args:
      strategy: the masking strategy.
      token_counts: per trained modality (tokens per band set, band sets), missing ones included.
      timesteps: time axis of the space-time modalities; tightens the bounds of strategies that
        mask by time.

    Returns:
      Bounds; all tokens where nothing tighter is known about the strategy.
    """
    e, d = strategy.encode_ratio, strategy.decode_ratio
    if isinstance(strategy, RandomFixedModality):
        return _fixed(strategy, token_counts)
    if isinstance(strategy, ModalityCross):
        return _cross(strategy, token_counts)
    if isinstance(strategy, RandomWithDecode):
        return _with_decode(strategy, token_counts, timesteps)
    if isinstance(strategy, Random | Space | RandomSpace):
        return _shares(token_counts, e, d)
    if isinstance(strategy, RandomIncreasing):
        e = max(strategy.initial_encode_ratio, strategy.final_encode_ratio)
        d = max(strategy.initial_decode_ratio, strategy.final_decode_ratio)
        return _shares(token_counts, e, d)
    if type(strategy) is RandomRange:
        low, high = strategy.min_encode_ratio, strategy.max_decode_ratio
        return _shares(token_counts, strategy.max_encode_ratio, 1.0 - low if high is None else high)
    everything = {m: t * s for m, (t, s) in token_counts.items()}
    return TokenBounds(sum(everything.values()), dict(everything), dict(everything))
