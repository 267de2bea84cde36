"""Pretraining, evaluation and use of OlmoEarth models in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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

# Looked up on first use, so that importing the package stays light.
_HOMES = {
    "Sample": "olmoearth_jax.inference.sample",
    "dequantize": "olmoearth_jax.maps.archive",
    "list_models": "olmoearth_jax.model.versions",
    "load_pretrained": "olmoearth_jax.inference.model",
    "open_archive": "olmoearth_jax.maps.archive",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
