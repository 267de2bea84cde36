"""Rasters of a UTM zone on the lattice of 10 m that starts at E = N = 0, read across files.

The zone's CRS is EPSG:326zz on both hemispheres: rasters in EPSG:327zz are the same pixels, their
northings less 10,000 km. Any other grid is resampled if the raster asks for it.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import crs_difference, library, same_crs, transform_points
from olmoearth_jax.data.raster_file import RasterError, RasterFile, opening
from olmoearth_jax.data.raster_layer import Layer
from olmoearth_jax.data.raster_list import Raster
from olmoearth_jax.data.rasters import Stack, locate

PIXEL = 10.0
FALSE_NORTHING = 10_000_000.0
_MOST_OFF = 1e-3
"""Metres by which an edge may miss the lattice."""
_NEAR = 1e-3
"""Pixels by which a box may reach into one that it does not mean to hold."""
_REPEATS = (1, 2, 6)
"""Pixels of the modality's own size that one of a file may cover: 10, 20 and 60 m."""


def zone_of(lon: Any) -> Any:
    """UTM zone 1..60 of longitudes in degrees, by the 6 degrees alone; int of their shape."""
    zones = np.floor(np.mod(np.asarray(lon, np.float64) + 180.0, 360.0) / 6.0).astype(int) + 1
    return int(zones) if zones.ndim == 0 else zones


def crs_of(zone: int) -> str:
    """The CRS of a zone: its northern form on both hemispheres."""
    return f"EPSG:{32600 + zone}"


@dataclasses.dataclass(frozen=True)
class Placed:
    """What is known of a raster without keeping it open.

    Attributes:
      raster: what is said of it; a raster with dates has one per timestep.
      zone: the zone on whose lattice it lies, None if it must be resampled.
      crs: as rasterio has it, of `box`.
      box: (xmin, ymin, xmax, ymax) in the CRS of its zone, or its own if it has none.
      modality: name.
      bands: of each timestep.
      repeat: pixels of the modality's own size that one of the file covers.
      multitemporal: whether it varies in time.
    """

    raster: Raster
    zone: int | None
    crs: Any
    box: tuple[float, float, float, float]
    modality: str
    bands: tuple[str, ...]
    repeat: int
    multitemporal: bool


def look_at(raster: Raster) -> Placed:
    """Opens a raster and says where it lies.

    Raises:
      ValueError: it cannot be used, or misses the lattice and does not ask to be resampled.
    """
    layer = Layer(raster)
    with layer.file as file:
        if file.crs is None:
            raise RasterError(raster.path, "has no coordinate reference system")
        if not file.placed:
            raise RasterError(raster.path, "says nothing of its place on the ground")
        zone = _north_form(file)
        size = PIXEL / layer.modality.image_factor
        repeat = _repeat_of(file, size) if zone is not None else None
        if repeat is None:
            if raster.resample == "refuse":
                raise _off_lattice(file, zone, size)
            _check_one_rule(layer)
            zone = None
        t = file.transform
        box = (t.c, t.f + file.height * t.e, t.c + file.width * t.a, t.f)
        return Placed(
            raster, zone, file.crs, box, layer.modality.name, tuple(dict.fromkeys(layer.bands)),
            repeat or 1, layer.modality.multitemporal,
        )  # fmt: skip


def _north_form(file: RasterFile) -> int | None:
    """The UTM zone of a file, whose southern form is turned into the northern one; else None."""
    code = file.crs.to_authority()
    number = int(code[1]) if code and code[0] == "EPSG" and code[1].isdigit() else 0
    if not (32601 <= number <= 32660 or 32701 <= number <= 32760):
        number = _zone_of_centre(file)
    if not number:
        return None
    if number > 32700:
        t = file.transform
        file.transform = type(t)(t.a, t.b, t.c, t.d, t.e, t.f - FALSE_NORTHING)
        number -= 100
    file.crs = library().crs.CRS.from_epsg(number)
    return number - 32600


def _zone_of_centre(file: RasterFile) -> int:
    """The EPSG number of a UTM zone whose CRS has no number in the file; 0 if it is none."""
    t = file.transform
    x, y = t.c + t.a * file.width / 2, t.f + t.e * file.height / 2
    try:
        lon, _ = transform_points(file.crs, "EPSG:4326", [x], [y])
    except ValueError:
        return 0
    middle = zone_of(lon[0])
    for zone in (middle, middle % 60 + 1, (middle - 2) % 60 + 1):
        for base in (32600, 32700):
            if same_crs(file.crs, f"EPSG:{base + zone}"):
                return base + zone
    return 0


def _repeat_of(file: RasterFile, size: float) -> int | None:
    """How many pixels of `size` metres one of the file covers; None off the lattice."""
    t = file.transform
    for repeat in _REPEATS:
        side = size * repeat
        ends = (t.c, t.f, t.c + t.a * file.width, t.f + t.e * file.height)
        wanted = (side * file.width, side * file.height)
        near = all(abs(v - round(v / side) * side) <= _MOST_OFF for v in ends)
        spans = abs(ends[2] - ends[0] - wanted[0]), abs(ends[1] - ends[3] - wanted[1])
        if near and max(spans) <= _MOST_OFF:
            return repeat
    return None


def _off_lattice(file: RasterFile, zone: int | None, size: float) -> ValueError:
    t = file.transform
    if zone is None:
        place = f"is in {crs_difference(file.crs, 'EPSG:32601').split(' against')[0]}, no UTM zone"
        to = "-t_srs EPSG:326zz "
    else:
        place = (
            f"has pixels of {t.a:.10g} x {-t.e:.10g} from {t.c:.10g}, {t.f:.10g}, which miss the "
            f"lattice of {size:g} m of its zone"
        )
        to = ""
    return RasterError(
        file.path,
        f"{place}: give resample 'nearest' or 'bilinear' in the manifest, or warp it with "
        f"gdalwarp {to}-tr {size:g} {size:g} -tap",
    )


def _check_one_rule(layer: Layer) -> None:
    """Refuses to resample what says in several ways which pixels are missing: GDAL keeps to one.

    Raises:
      ValueError: a mask beside a nodata value, or bands with several nodata values.
    """
    file = layer.file
    several = len({str(v) for v in file.nodata}) > 1
    if several or (file.own_masks and file.nodata[0] is not None):
        what = "several nodata values" if several else "a mask and a nodata value"
        raise RasterError(
            file.path, f"has {what}, of which resampling obeys one: warp it to the lattice first"
        )


class LatticeStack(Stack):
    """Open rasters of one zone and period; rows and columns are counted from E = N = 0, see `crop`.

    Windows may lie anywhere; where no raster is there is no value. All windows of a period have the
    same modalities, bands and timesteps.
    """

    def __init__(
        self,
        rasters: Sequence[Raster],
        zone: int,
        bands: dict[str, list[str]],
        days: Sequence[datetime.date],
    ):
        """Opens rasters.

        Args:
          rasters: in the order in which overlapping ones count.
          zone: its number.
          bands: what each modality of a window has, in sample order.
          days: one per timestep of a window, ascending.

        Raises:
          ValueError: a raster cannot be used.
        """
        self._zone = zone
        plain = [dataclasses.replace(r, period="") for r in rasters]
        super().__init__(plain)
        self._days = list(days)
        self.dates = [day.isoformat() for day in days]
        self.names, self._bands = list(bands), dict(bands)

    def _place(self, any_pixel_size: bool) -> None:
        rasterio = library()
        self.crs = rasterio.crs.CRS.from_user_input(crs_of(self._zone))
        self.transform = rasterio.transform.Affine(PIXEL, 0.0, 0.0, 0.0, -PIXEL, 0.0)
        self.shape = (0, 0)
        for layer in self._layers:
            size = PIXEL / layer.modality.image_factor
            zone = _north_form(layer.file)
            if zone != self._zone or _repeat_of(layer.file, size) is None:
                self._warp(layer, size)
            locate(layer, layer, (0.0, 0.0), (PIXEL, PIXEL))

    def crop(self, box: tuple[float, float, float, float]) -> None:
        """Counts rows and columns from the corner of a box from now on; `shape` is the box's.

        Args:
          box: west, south, east, north in metres of the zone; it grows to whole pixels.
        """
        west, south, east, north = box
        left, right = math.floor(west / PIXEL + _NEAR), math.ceil(east / PIXEL - _NEAR)
        top, bottom = math.floor(-north / PIXEL + _NEAR), math.ceil(-south / PIXEL - _NEAR)
        self._crop(top, left, bottom, right)

    def _warp(self, layer: Layer, size: float) -> None:
        raster = layer.raster
        if raster.resample == "refuse":
            raise _off_lattice(layer.file, None, size)
        _check_one_rule(layer)
        nodata = layer.file.nodata
        layer.file.close()
        warped = WarpedFile(raster, self.crs, size, layer.file.count)
        if raster.nodata is not None:
            warped.nodata = nodata
        layer.file = warped


class WarpedFile(RasterFile):
    """A raster as seen on the lattice of a zone: resampled when it is read."""

    def __init__(self, raster: Raster, crs: Any, size: float, count: int):
        """Opens a raster.

        Args:
          raster: what is said of it.
          crs: of the zone.
          size: of the pixels in metres.
          count: number of its data bands.

        Raises:
          ValueError: it cannot be brought to this zone.
        """
        rasterio = self._rasterio = library()
        self.path = raster.path
        self._base = rasterio.open(raster.path, **opening(raster.path))
        try:
            self._file = self._warped(raster, crs, size)
            self._describe(count)
        except Exception as e:  # GDAL's own errors have no public class
            self._base.close()
            raise RasterError(raster.path, f"cannot be resampled to {crs}: {e}") from None

    def _warped(self, raster: Raster, crs: Any, size: float) -> Any:
        from rasterio.vrt import WarpedVRT

        rasterio, base = self._rasterio, self._base
        left, bottom, right, top = base.bounds
        across, down = sorted((left, right)), sorted((bottom, top))  # it may lie any way round
        source = base.crs
        if source.is_geographic and (across[0] < -180 or across[1] > 180):
            # Else what lies beyond 180 degrees is looked for at its place in -180..180.
            wrap = f"{source.to_proj4()} +lon_wrap={sum(across) / 2}"
            source = rasterio.crs.CRS.from_string(wrap)
        west, south, east, north = rasterio.warp.transform_bounds(
            source, crs, across[0], down[0], across[1], down[1], densify_pts=51
        )
        left, top = math.floor(west / size), math.ceil(north / size)
        right, bottom = math.ceil(east / size), math.floor(south / size)
        place = rasterio.transform.Affine(size, 0.0, left * size, 0.0, -size, top * size)
        nodata = base.nodata if raster.nodata is None else raster.nodata
        alpha = rasterio.enums.ColorInterp.alpha in base.colorinterp
        if nodata is None:
            # What lies beside the raster must be told from its values.
            missing = {} if alpha else {"add_alpha": True}
        else:
            missing = {"src_nodata": nodata, "nodata": nodata}
        return WarpedVRT(
            base, src_crs=source, crs=crs, transform=place, width=right - left, height=top - bottom,
            resampling=rasterio.enums.Resampling[raster.resample], **missing,
        )  # fmt: skip

    def close(self) -> None:
        """Closes the files."""
        super().close()
        self._base.close()
