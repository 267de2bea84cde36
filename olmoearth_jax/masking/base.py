"""What every masking strategy is: where its draws come from, what it is given, what it promises."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masks import MISSING_TOKEN
from olmoearth_jax.modalities import MISSING, Tokenization

Tokens = dict[str, np.ndarray]
"""One array per modality at token level: [B, h, w, T, S], [B, h, w, 1, S], [B, T, S] or [B, S]."""

ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class MaskContext:
    """Random sources and place of the samples being masked.

    A draw about one sample uses only that sample's generator, and a draw about the whole group
    only `group_rng`, so a mask never depends on which other samples are masked beside it.
    """

    rngs: Sequence[np.random.Generator]
    """One generator per sample of this call, keyed by (view, position)."""
    group_rng: np.random.Generator
    """Generator of the group, the same wherever a part of the group is masked."""
    group_size: int
    """Samples in the whole group (`rank_microbatch_size`)."""
    members: np.ndarray
    """int64 [B], index of each sample of this call within its group."""
    step: int | None = None
    """Number of groups masked before this one since training began; only
    `random_increasing` reads it (None counts as 0)."""

    @classmethod
    def whole_group(cls, seed: int, size: int, step: int | None = None) -> MaskContext:
        """A context for one complete group of `size` samples, keyed by `seed` alone."""
        streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in range(size + 1)]
        return cls(streams[1:], streams[0], size, np.arange(size), step)


def missing_tokens(
    data: Mapping[str, np.ndarray], patch_size: int, tokenization: Tokenization | None = None
) -> Tokens:
    """Flags, per modality, the tokens whose band set lacks any band at the patch's first pixel.

    Args:
      data: per modality float [B, H*f, W*f, T or 1, C], [B, T, C] or [B, C]; missing elements
        hold -99999 exactly. A remainder of H or W beyond whole patches is ignored.
      patch_size: patch side p in 10 m pixels.
      tokenization: band sets in force; None means the default ones.

    Returns:
      Per modality bool [B, h, w, T or 1, S], [B, T, S] or [B, S] (spec/train.md 2.1a).

    Raises:
      ValueError: patch size below 1 or an unknown modality.
    """
    if patch_size < 1:
        raise ValueError(f"the patch size must be at least 1, got {patch_size}")
    tokenization = tokenization or Tokenization()
    out = {}
    for name, values in data.items():
        spec = modalities.get(name)
        if spec.spatial:
            edge = patch_size * spec.image_factor
            h, w = values.shape[1] // edge, values.shape[2] // edge
            values = values[:, : h * edge : edge, : w * edge : edge]
        gaps = values == MISSING
        sets = tokenization.band_sets(name)
        flags = np.empty((*gaps.shape[:-1], len(sets)), bool)
        for k, bands in enumerate(sets):
            flags[..., k] = gaps[..., list(bands)].any(axis=-1)
        out[name] = flags
    return out


def checked_masks(strategy: Any, missing: Tokens, masks: Any) -> Tokens:
    """A strategy's masks as int8, found to be what was promised.

    Else tokens without data would be trained on, and nothing would tell.

    Args:
      strategy: what made the masks.
      missing: what it was given.
      masks: what it gave.

    Raises:
      ValueError: a mask is absent, of another shape, holds other codes, or does not mark a token
        that has no data.
    """
    who = f"masking strategy {getattr(strategy, 'key', '') or type(strategy).__name__!r}"
    out = {}
    for name, gone in missing.items():
        if name not in masks:
            raise ValueError(f"{who} gives no mask of {name}")
        mask = np.asarray(masks[name])
        if mask.shape != gone.shape:
            raise ValueError(f"{who}: the mask of {name} is {mask.shape}, not {gone.shape}")
        out[name] = mask.astype(np.int8, copy=False)
        if mask.size and not (mask.min() >= 0 and mask.max() <= MISSING_TOKEN):
            raise ValueError(
                f"{who}: the mask of {name} holds other codes than 0...{MISSING_TOKEN}"
            )
        if (out[name][gone] != MISSING_TOKEN).any():
            raise ValueError(
                f"{who} does not mark tokens of {name} that have no data as MISSING_TOKEN"
            )
    return out


Counts = Mapping[str, tuple[int, int]]
"""Per trained modality (tokens per band set, band sets), missing ones included."""


@dataclasses.dataclass(frozen=True)
class TokenBounds:
    """Bounds that hold for every draw and every pattern of missing tokens of one sample."""

    encode: int
    """Encoder tokens in all; can be less than the sum over modalities."""
    encode_by_modality: dict[str, int]
    decode: dict[str, int]

    @classmethod
    def of_shares(cls, counts: Counts, e: float, d: float) -> TokenBounds:
        """Floors of the shares; a static modality's pool is shared with other samples."""
        total = {m: t * s for m, (t, s) in counts.items()}
        static = {m for m in counts if modalities.get(m).kind == "static"}
        encode = {m: n if m in static else int(n * e) for m, n in total.items()}
        decode = {m: n if m in static else int(n * d) for m, n in total.items()}
        return cls(sum(encode.values()), encode, decode)

    @classmethod
    def of_all(cls, counts: Counts) -> TokenBounds:
        """All tokens, in both roles: always true, and makes the largest programs."""
        everything = {m: t * s for m, (t, s) in counts.items()}
        return cls(sum(everything.values()), dict(everything), dict(everything))


def check_ratios(encode: float, decode: float) -> None:
    """Raises ValueError unless both shares are in 0..1 and fit together."""
    for label, value in (("encode", encode), ("decode", decode)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"the {label} ratio must lie in 0..1, got {value}")
    if encode + decode > 1.0 + ROUNDING:
        raise ValueError(
            f"encode ratio {encode} and decode ratio {decode} add up to more than 1, "
            "so they can't both be taken from the same tokens"
        )


@dataclasses.dataclass(frozen=True)
class Strategy(abc.ABC):
    """A picklable masking strategy.

    Calling it with `missing`, per modality a bool array of token shape (True = missing), and a
    `MaskContext` returns int8 masks of the same shapes: 0 encode, 1 target only, 2 decode,
    3 missing (exactly where `missing`). `missing` isn't changed. Fields that are tuples hold
    modality names, upper case accepted.
    """

    encode_ratio: float = 0.5
    decode_ratio: float = 0.5

    key: ClassVar[str] = ""
    """Its name in configs."""
    needs_whole_group: ClassVar[bool] = False
    """The masks depend on what is missing in the *other* samples of the group,
    so all of them have to be masked in one call."""

    def __post_init__(self) -> None:
        check_ratios(self.encode_ratio, self.decode_ratio)
        for field in dataclasses.fields(self):
            if isinstance(field.default, tuple):
                names = getattr(self, field.name)
                listed = names if isinstance(names, str) else list(names)
                object.__setattr__(self, field.name, modalities.resolve(listed))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__ and "bounds" not in cls.__dict__:
            # Inherited bounds would be those of other masks, and too many tokens fail in a run.
            raise TypeError(f"{cls.__name__} has masks of its own: it needs `bounds` of its own")

    @property
    def name(self) -> str:
        """Name in logged metrics, e.g. 'modalitycrossrandom'."""
        return self.key.replace("_", "")

    @abc.abstractmethod
    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        """Masks of a group; see the class."""

    @abc.abstractmethod
    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        """The most tokens of one sample, whatever is drawn: they size static buffers.

        Args:
          counts: of one shape of samples.
          timesteps: time axis of the space-time modalities; tightens the bounds of strategies
            that mask by time.
        """

    def check_group(self, ctx: MaskContext) -> None:
        """Raises ValueError if the strategy needs the whole group but got a part of it."""
        if self.needs_whole_group and len(ctx.members) != ctx.group_size:
            raise ValueError(
                f"masking strategy {self.key!r} looks at all {ctx.group_size} samples of a group "
                f"at once but got {len(ctx.members)}; give every host whole groups, or choose a "
                "strategy that masks each sample by itself"
            )
