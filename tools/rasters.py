"""Stacks of GeoTIFFs; they live in `olmoearth_jax.data.rasters`."""

from olmoearth_jax.data.rasters import Raster, Stack, read_manifest, scaled  # noqa: F401
