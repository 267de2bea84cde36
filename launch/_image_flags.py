"""The flags of images, for `launch.embed`, `launch.finetune` and `launch.predict`; for the last two
also those of an archive in their place."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from olmoearth_jax import commands
from olmoearth_jax.maps import imagery, stac
from olmoearth_jax.maps.archive_scenes import ArchiveOptions
from olmoearth_jax.maps.fine_tuning import ImageOptions

from . import _flags

_M_ARENA_MAX = -8
"""Of mallopt in glibc."""

_IMAGES_ALONE = (
    "inputs", "name", "modality", "bands", "assets", "s2_offset", "step", "check_units",
    "any_pixel_size",
)  # fmt: skip
"""Flags of `define` that say something of images, and nothing of an archive."""


def define(own: flags.FlagValues) -> None:
    """Adds the flags of images, or of an archive in their place."""
    define_images(own)
    _bool, _string = commands.definers(own, "bool string")
    _string("archive", None, "Archive of embeddings instead of images.")
    _bool("any_pixel_size", False, "Take pixels of another size than 10 m.")


def define_images(own: flags.FlagValues) -> None:
    """Adds the flags that say which images there are."""
    _bool, _enum, _integer, _list, _string = commands.definers(own, "bool enum integer list string")
    _string("inputs", None, "Manifest, STAC items, folder of GeoTIFFs or of items, or one GeoTIFF.")
    _string("name", None, "Form of the names in a folder: {modality}_{date}_{tile}.tif")
    _string("modality", None, "Modality of the rasters, if they do not say it.")
    _list("bands", [], "Names of a raster's bands, in its order.")
    _list("years", [], "Periods that are years.")
    _list("periods", [], "Periods such as 2023-04/2024-03, months included.")
    _list("assets", [], "STAC assets, as B02:sentinel2_l2a/B02,visual:ignore.")
    _integer("s2_offset", None, "Added to Sentinel-2 values of STAC items: 0 or -1000.")
    _enum("step", "month", imagery.STEPS, "What is one timestep.")
    _bool("check_units", True, "Stop at values that look like another unit.")


def keep_memory_flat() -> None:
    """Sets what must be set before the first raster is read and the first thread is started."""
    # By default GDAL keeps a twentieth of the machine's memory in blocks that are read once.
    os.environ.setdefault("GDAL_CACHEMAX", "64")
    # glibc gives every thread an arena of its own, which keeps what it once held.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def chosen(
    own: flags.FlagValues, years: Sequence[str], width: int | None, images_only: Sequence[str]
) -> ImageOptions | ArchiveOptions:
    """What the flags of `define` name.

    Args:
      years: periods that are years.
      width: of an archive's embeddings, all by default.
      images_only: further flags that do not go with an archive.

    Raises:
      ValueError: no images and no archive, or flags that exclude each other.
    """
    given: dict[str, Any] = {name: own[name].value for name in own}
    if given["archive"]:
        for name in (*_IMAGES_ALONE, *images_only):
            if own[name].present:
                raise ValueError(f"--{name} does not go with --archive")
        return ArchiveOptions(given["archive"], years, given["periods"], width)
    if width is not None:
        raise ValueError("--width goes with --archive")
    _flags.needed(own, "inputs")
    fields = {f.name for f in dataclasses.fields(ImageOptions)} & given.keys() - {"years"}
    items = stac.Options(given["assets"], given["s2_offset"])
    return ImageOptions(**{name: given[name] for name in fields}, years=years, items=items)
