"""What every masking strategy is."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

from olmoearth_jax import modalities
from olmoearth_jax.masking.context import MaskContext, Tokens

ROUNDING = 1e-9


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

    Attributes:
      key: its name in configs.
      needs_whole_group: the masks depend on what is missing in the *other* samples of the group,
        so all of them have to be masked in one call.
    """

    encode_ratio: float = 0.5
    decode_ratio: float = 0.5

    key: ClassVar[str] = ""
    needs_whole_group: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ratios(self.encode_ratio, self.decode_ratio)
        for field in dataclasses.fields(self):
            if isinstance(field.default, tuple):
                names = getattr(self, field.name)
                listed = names if isinstance(names, str) else list(names)
                object.__setattr__(self, field.name, modalities.resolve(listed))

    @property
    def name(self) -> str:
        """Name in logged metrics, e.g. 'modalitycrossrandom'."""
        return self.key.replace("_", "")

    @abc.abstractmethod
    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        """Masks of a group; see the class."""

    def check_group(self, ctx: MaskContext) -> None:
        """Raises ValueError if the strategy needs the whole group but got a part of it."""
        if self.needs_whole_group and len(ctx.members) != ctx.group_size:
            raise ValueError(
                f"masking strategy {self.key!r} looks at all {ctx.group_size} samples of a group "
                f"at once but got {len(ctx.members)}; give every host whole groups, or choose a "
                "strategy that masks each sample by itself"
            )
