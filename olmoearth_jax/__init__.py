"""Pretraining, evaluation and use of OlmoEarth models in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from olmoearth_jax.outputs import VERSION as __version__

if TYPE_CHECKING:
    from olmoearth_jax.inference.model import load_pretrained
    from olmoearth_jax.inference.sample import Sample
    from olmoearth_jax.maps.archive import dequantize, open_archive

__all__ = ["__version__", "Sample", "dequantize", "load_pretrained", "open_archive"]


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that importing the package stays light.
    if name == "Sample":
        from olmoearth_jax.inference.sample import Sample

        return Sample
    if name == "load_pretrained":
        from olmoearth_jax.inference.model import load_pretrained

        return load_pretrained
    if name in ("open_archive", "dequantize"):
        from olmoearth_jax.maps import archive

        return getattr(archive, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
