"""Pretraining, evaluation and use of OlmoEarth models in JAX."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from olmoearth_jax.exports import exported
from olmoearth_jax.outputs import VERSION as __version__

if TYPE_CHECKING:
    from olmoearth_jax.inference.model import load_pretrained
    from olmoearth_jax.inference.sample import Sample
    from olmoearth_jax.maps.archive import dequantize, open_archive
    from olmoearth_jax.model.versions import list_models

__all__ = [
    "__version__",
    "Sample",
    "dequantize",
    "list_models",
    "load_pretrained",
    "open_archive",
]

__getattr__, _ = exported(
    __name__,
    {
        "inference.model": "load_pretrained",
        "inference.sample": "Sample",
        "maps.archive": "dequantize open_archive",
        "model.versions": "list_models",
    },
)


def __dir__() -> list[str]:
    """What is offered, and the modules that are loaded; not what this file itself imports."""
    own = globals()
    modules = (name for name in own if f"{__name__}.{name}" in sys.modules)
    return sorted({*__all__, *modules, *(name for name in own if name.startswith("__"))})
