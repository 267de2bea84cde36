"""What each version of the models is; another version is one more entry."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any


@dataclasses.dataclass(frozen=True)
class Version:
    """One version."""

    sizes: tuple[str, ...]
    """Those that can be built."""
    published: tuple[str, ...]
    """Those whose weights are on the hub."""
    linear: bool = True
    """One band set per sensor, linear patch embeddings, and band dropout in training."""
    rotary: bool = False
    """Rotary position encodings."""
    pooler: bool = False
    """An attention pooler and student embeddings."""
    copies_bands: bool = False
    """Missing bands are copied from their neighbours in wavelength, instead of set to 0."""
    tasks: str = "v1_1"
    """Key in tasks.json of what official runs evaluate during training."""

    @property
    def names(self) -> tuple[str, ...]:
        """Sizes as published names spell them."""
        return tuple(size.capitalize() for size in self.published)


VERSIONS = {
    "v1": Version(
        ("nano", "tiny", "base", "large"),
        ("nano", "tiny", "base", "large"),
        linear=False,
        copies_bands=True,
        tasks="v1",
    ),
    "v1_1": Version(("nano", "tiny", "base"), ("nano", "tiny", "base")),
    "v1_2": Version(
        ("nano", "tiny", "small", "base", "large"), ("nano", "tiny", "small", "base"), rotary=True
    ),
    "v1_3": Version(
        ("nano", "tiny", "small", "base"), ("base",), rotary=True, pooler=True, tasks="v1_3"
    ),
}
"""By name, oldest first (spec/train.md section 8; the smaller sizes of v1.3 are ours)."""

PUBLISHED = tuple(f"OlmoEarth-{name}-{size}" for name, v in VERSIONS.items() for size in v.names)
"""Names of the published models."""


def list_models(pattern: str = "*") -> list[str]:
    """Names of the published models, which `load_pretrained` takes.

    Args:
      pattern: only those that fit, as names of files do: '*v1_2*', '*-Base'. Case does not count.
    """
    return [name for name in PUBLISHED if fnmatch.fnmatchcase(name.lower(), pattern.lower())]


def version_of(config: Any) -> str:
    """The version that a model belongs to, told by the newest part that it has.

    Published configs do not name it. `config` is a `ModelConfig`, which stands above.
    """
    encoder = config.encoder_config
    if encoder.attention_pooler_config is not None:
        return "v1_3"
    if encoder.position_encoding != "absolute":
        return "v1_2"
    later = encoder.band_dropout_rate or encoder.use_linear_patch_embed
    return "v1_1" if later else "v1"
