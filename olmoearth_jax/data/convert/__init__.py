"""From a tree of GeoTIFFs and CSVs to sample files (spec/data.md sections 3-4)."""

from olmoearth_jax.data.convert.run import Conversion, convert
from olmoearth_jax.data.convert.settings import Settings

__all__ = ["Conversion", "Settings", "convert"]
