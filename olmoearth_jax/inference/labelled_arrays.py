"""xarray in and out: samples of labelled arrays, and embeddings with coordinates.

xarray itself is imported only where a labelled array is made; reading one needs no import.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from olmoearth_jax import band_names, modalities
from olmoearth_jax.data.crs import ground_pixel_size
from olmoearth_jax.dates import parse_date
from olmoearth_jax.inference.attributes import filled
from olmoearth_jax.modalities import Modality

_AXES = {
    "time": ("time", "t", "date", "datetime"),
    "band": ("band", "bands", "channel", "channels"),
    "y": ("y", "northing"),
    "x": ("x", "easting"),
}
"""Names of dimensions, as products spell them."""
_DEGREES = frozenset({"lat", "lon", "latitude", "longitude"})
TOLERANCE = 0.05
"""By which share pixels may differ from their 10 m."""

_WARP = (
    "warp it to UTM, as array.rio.reproject(array.rio.estimate_utm_crs(), resolution=10) of "
    "rioxarray does"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the pixels of a sample lie.

    Attributes:
      x, y: float64 centres of the columns and rows, in metres of the CRS; `y` descends.
      crs: the CRS coordinate as it came (an xarray scalar), or None.
      crs_name: name of that coordinate.
    """

    x: np.ndarray
    y: np.ndarray
    crs: Any = None
    crs_name: str = "spatial_ref"


@dataclasses.dataclass(frozen=True)
class Images:
    """One modality of labelled arrays.

    Attributes:
      values: [H, W, T, C] north-up; T = 1 without a time axis.
      bands: names of the channels.
      days: one date per timestep; empty without a time axis.
      place: None without coordinates.
    """

    values: np.ndarray
    bands: tuple[str, ...]
    days: tuple[Any, ...]
    place: Place | None


def images_of(
    given: Any, modality: str | None, any_pixel_size: bool
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]], list[Any], Place | None]:
    """(arrays [H, W, T, C], bands, dates, place) of what `Sample.from_xarray` takes.

    Raises:
      ValueError: names, coordinates or units that do not say what is needed.
    """
    held = {m.name: _images(m, x, any_pixel_size) for m, x in _by_modality(given, modality).items()}
    days = sorted({d for image in held.values() for d in image.days})
    arrays = {name: _on_days(image, days) for name, image in held.items()}
    bands = {name: image.bands for name, image in held.items()}
    return arrays, bands, days, _one_place(held)


def _by_modality(given: Any, modality: str | None) -> dict[Modality, Any]:
    """The arrays of each modality: a DataArray, or {band: DataArray}."""
    if is_array(given):
        if modality is None and given.name in modalities.names():
            modality = str(given.name)
        names = _names_of_bands(given)
        return {_modality(modality, names, f"the array {given.name or ''}".strip()): given}
    if not isinstance(given, Mapping):
        raise ValueError(
            "from_xarray takes a DataArray, a Dataset or {modality: DataArray}, not "
            f"{type(given).__name__}; arrays without labels go into Sample.from_arrays"
        )
    parts = _variables(given)
    if not parts:
        raise ValueError("there are no images in this dataset: it has no variables")
    if modality is None and all(_modality_or_none(str(name)) for name in parts):
        return {modalities.get_of_samples(str(name)): x for name, x in parts.items()}
    if len(parts) == 1 and (one := next(iter(parts.values()))) is not None and _has_bands(one):
        return {_modality(modality, _names_of_bands(one), "the dataset"): one}
    return {_modality(modality, [str(n) for n in parts], "the dataset"): parts}


def _variables(given: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """The variables that are images: what only holds the CRS is none."""
    named = getattr(given, "data_vars", given)
    return {n: x for n, x in named.items() if not (is_array(x) and x.ndim == 0)}


def is_array(x: Any) -> bool:
    """Whether something is a DataArray, told without xarray."""
    return (
        hasattr(x, "dims")
        and hasattr(x, "coords")
        and hasattr(x, "values")
        and not hasattr(x, "data_vars")
    )


def _modality_or_none(name: str) -> Modality | None:
    try:
        return modalities.get_of_samples(name)
    except ValueError:
        return None


def _modality(name: str | None, bands: Sequence[str], what: str) -> Modality:
    """The modality of a name, or the one that the bands fit.

    Raises:
      ValueError: unknown, or the bands do not decide.
    """
    if name is not None:
        return modalities.get_of_samples(name)
    fits = band_names.identify(bands) if bands else []
    if len(fits) == 1:
        return modalities.get_of_samples(fits[0][0])
    said = f"its bands {', '.join(bands[:12])} fit " if bands else "its bands have no names"
    if bands:
        said += " and ".join(m for m, _ in fits) if fits else "none"
    raise ValueError(
        f"{what} does not say of which modality it is ({said}): give modality=, such as "
        "modality='sentinel2_l2a', or pass {'sentinel2_l2a': array}"
    )


def _axis(array: Any, kind: str) -> Any:
    """The name of a dimension of an array, or None; 'band_s1' and 'x_10m' are understood too."""
    words = {d: re.split(r"[\W_]+", str(d).lower()) for d in array.dims}
    found = [d for d in array.dims if str(d).lower() in _AXES[kind]]
    found += [d for d in array.dims if set(words[d]) & set(_AXES[kind])]
    return found[0] if found else None


def _has_bands(array: Any) -> bool:
    return is_array(array) and _axis(array, "band") is not None


def _names_of_bands(array: Any) -> list[str]:
    """Names of the bands: the coordinate, or the long_name of readers that number the bands."""
    axis = _axis(array, "band")
    if axis is None:
        return [str(array.name)] if array.name is not None else []
    count = array.sizes[axis]
    names = [str(v) for v in array.coords[axis].values] if axis in array.coords else []
    told = array.attrs.get("long_name", ())
    told = [told] if isinstance(told, str) else [str(t) for t in told]
    numbered = all(n.isdigit() for n in names)
    if numbered and len(told) == count:
        return told
    return [] if numbered else names


def _images(modality: Modality, given: Any, any_pixel_size: bool) -> Images:
    """A modality's arrays as numbers.

    Raises:
      ValueError: dimensions, bands or coordinates that do not fit; the message names the modality.
    """
    try:
        if isinstance(given, Mapping) or hasattr(given, "data_vars"):
            parts = {str(n): x for n, x in _variables(given).items()}
            return _stacked(modality, parts, any_pixel_size)
        names = _names_of_bands(given)
        if not names and modality.num_bands == 1:
            names = list(modality.bands)
        if not names and _axis(given, "band") is not None:
            raise ValueError(
                "name the bands: give the dimension of the bands a coordinate, such as "
                "array.assign_coords(band=['B02', 'B03', ...])"
            )
        if _axis(given, "band") is None and modality.num_bands == 1:
            names = list(modality.bands)
        return _image(modality, given, names, any_pixel_size)
    except ValueError as e:
        if str(e).startswith(modality.name):
            raise
        raise ValueError(f"{modality.name}: {e}") from None


def _stacked(modality: Modality, parts: Mapping[str, Any], any_pixel_size: bool) -> Images:
    """Bands that are variables of their own, put together."""
    images = [_image(modality, x, [name], any_pixel_size) for name, x in parts.items()]
    first = images[0]
    for name, image in zip(parts, images, strict=True):
        if image.values.shape != first.values.shape or image.days != first.days:
            raise ValueError(
                f"the band {name} has other sizes or dates than {next(iter(parts))}: bring them "
                "to one grid and one time axis, as xarray.align and .interp_like do"
            )
    place = _one_place(dict(zip(parts, images, strict=True)))
    values = np.concatenate([i.values for i in images], -1)
    return Images(values, tuple(parts), first.days, place)


def _image(modality: Modality, array: Any, names: Sequence[str], any_pixel_size: bool) -> Images:
    """One array, [H, W, T, C] and north-up."""
    axes = {kind: _axis(array, kind) for kind in _AXES}
    if not modality.spatial:
        raise ValueError("is no image; pass it by Sample.from_arrays")
    if axes["x"] is None or axes["y"] is None:
        raise ValueError(_no_grid(array))
    extra = [d for d in array.dims if d not in axes.values()]
    if large := [d for d in extra if array.sizes[d] > 1]:
        raise ValueError(
            f"the dimension {large[0]!r} is none of time, band, y and x; choose one entry of it "
            f"with .isel({large[0]}=0), and embed several places one by one"
        )
    array = array.isel(dict.fromkeys(extra, 0))
    days = _days(array, axes["time"]) if modality.multitemporal else ()
    if not modality.multitemporal and axes["time"] is not None:
        if array.sizes[axes["time"]] > 1:
            raise ValueError("does not vary in time; choose one date with .isel(time=0)")
        array = array.isel({axes["time"]: 0})
        axes["time"] = None
    order = [axes[k] for k in ("y", "x", "time", "band") if axes[k] is not None]
    values = filled(array.transpose(*order))
    if axes["time"] is None:
        values = np.expand_dims(values, 2)
    if axes["band"] is None:
        values = values[..., None]
    # What another modality of the dataset has under the same dimension is no band of this one.
    known = [
        i for i, n in enumerate(names)
        if band_names.canonical(n, modality.name) or not _all_nan(values[..., i])
    ]  # fmt: skip
    if len(known) < len(names) == values.shape[-1]:
        names, values = [names[i] for i in known], values[..., known]
    place, rows, cols = _place(modality, array, axes, any_pixel_size)
    if days:
        keep = sorted(range(len(days)), key=days.__getitem__)
        days, values = tuple(days[i] for i in keep), values[:, :, keep]
        if len(set(days)) < len(days):
            twice = next(d for d in days if days.count(d) > 1)
            raise ValueError(
                f"has several images of {twice}: put the images of a day together, as "
                "array.groupby('time.date').first() does, or choose one"
            )
    return Images(values[rows, cols], tuple(names), tuple(days), place)


def _all_nan(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" and bool(np.isnan(values).all())


def _no_grid(array: Any) -> str:
    if degrees := [d for d in array.dims if str(d).lower() in _DEGREES]:
        return (
            f"its dimensions {', '.join(map(str, degrees))} are degrees, but the models take "
            f"pixels of 10 m: {_WARP}"
        )
    return (
        f"its dimensions are {', '.join(map(str, array.dims))}, but an image has 'y' and 'x' (and "
        "'time' and 'band'): name them with .rename"
    )


def _days(array: Any, axis: Any) -> tuple[Any, ...]:
    """The dates of the timesteps; without a time axis, that of the scalar coordinate."""
    if axis is None:
        found = [c for c in array.coords if str(c).lower() in _AXES["time"]]
        if not found or array.coords[found[0]].ndim:
            raise ValueError(
                "has no dates: give it a time axis, such as array.expand_dims("
                "time=[np.datetime64('2024-06-15')])"
            )
        stamps = [array.coords[found[0]].values[()]]
    elif axis not in array.coords:
        raise ValueError(
            f"its dimension {axis!r} has no coordinate: the models need the dates, such as "
            f"array.assign_coords({axis}=dates)"
        )
    else:
        stamps = list(array.coords[axis].values)
    if any(isinstance(s, np.datetime64) and np.isnat(s) for s in stamps):
        raise ValueError("its dates hold NaT, which is no date")
    if any(isinstance(s, int | float | np.number) and not isinstance(s, np.datetime64)
           for s in stamps):  # fmt: skip
        raise ValueError(
            "its times are plain numbers; make dates of them with xarray.decode_cf, or give "
            "datetime64 values"
        )
    return tuple(parse_date(s) for s in stamps)


def _place(
    modality: Modality, array: Any, axes: Mapping[str, Any], any_pixel_size: bool
) -> tuple[Place | None, slice, slice]:
    """(where the pixels lie at 10 m, rows and columns that turn the image north-up).

    An axis without coordinates runs the usual way: y to the south, x to the east.
    """
    steps, turned = {}, {"x": slice(None), "y": slice(None)}
    centres: dict[str, np.ndarray] = {}
    for kind, sign in (("x", 1), ("y", -1)):
        if axes[kind] not in array.coords:
            continue
        along = np.asarray(array.coords[axes[kind]].values, np.float64)
        step, back = _step(along, str(axes[kind]), sign)
        turned[kind] = slice(None, None, -1) if back else slice(None)
        centres[kind], steps[kind] = along[turned[kind]], step
    factor = modality.image_factor
    side = 10 / factor
    for kind, step in steps.items():
        if step is not None and not any_pixel_size and abs(step / side - 1) > TOLERANCE:
            raise ValueError(
                f"its pixels are {step:g} apart along {axes[kind]!r}, but the models were trained "
                f"on {side:g} m: warp it to a UTM grid of that size (array.rio.reproject(crs, "
                f"resolution={side:g})), or pass any_pixel_size=True"
            )
    if len(centres) < 2:
        return None, turned["y"], turned["x"]
    for kind in centres:
        n = len(centres[kind]) // factor * factor
        centres[kind] = centres[kind][:n].reshape(-1, factor).mean(1)
    crs_name, crs = _crs(array)
    place = Place(centres["x"], centres["y"], crs, crs_name)
    if not any_pixel_size:
        _check_ground(place)
    return place, turned["y"], turned["x"]


def _check_ground(place: Place) -> None:
    """That pixels of 10 units of the map are 10 m on the ground, where rasterio can tell.

    Raises:
      ValueError: they are not, as in the middle latitudes of Web Mercator.
    """
    wkt = {} if place.crs is None else place.crs.attrs
    text = wkt.get("crs_wkt") or wkt.get("spatial_ref")
    if not text or len(place.x) < 2 or len(place.y) < 2:
        return
    try:
        import rasterio  # noqa: F401
    except ImportError:
        return
    a, e = place.x[1] - place.x[0], place.y[1] - place.y[0]
    affine = SimpleNamespace(a=a, b=0, c=place.x[0] - a / 2, d=0, e=e, f=place.y[0] - e / 2)
    sides = ground_pixel_size(text, affine, len(place.y), len(place.x))
    if any(abs(side / 10 - 1) > TOLERANCE for side in sides):
        raise ValueError(
            f"its pixels are {sides[0]:.3g} m x {sides[1]:.3g} m on the ground, but the models "
            f"were trained on 10 m: {_WARP}; or pass any_pixel_size=True"
        )


def _step(along: np.ndarray, name: str, sign: int) -> tuple[float | None, bool]:
    """(distance of neighbours, whether they run the other way than `sign`)."""
    if len(along) < 2:
        return None, False
    gaps = np.diff(along)
    step = float(gaps.mean())
    if not np.isfinite(step) or step == 0 or np.abs(gaps / step - 1).max() > 0.01:
        raise ValueError(f"its coordinate {name!r} is not evenly spaced, so it is no grid")
    return abs(step), step * sign < 0


def _crs(array: Any) -> tuple[str, Any]:
    """The coordinate that holds the CRS, as CF and rioxarray have it."""
    for name in (
        array.attrs.get("grid_mapping"),
        array.encoding.get("grid_mapping"),
        "spatial_ref",
    ):
        if name and name in array.coords and array.coords[name].ndim == 0:
            return str(name), array.coords[name]
    return "spatial_ref", None


def _on_days(image: Images, days: Sequence[Any]) -> np.ndarray:
    """The image on the days of all modalities, NaN where it has none."""
    if not image.days or list(image.days) == list(days):
        return image.values
    shape = (*image.values.shape[:2], len(days), image.values.shape[-1])
    out = np.full(shape, np.nan, np.float32)
    out[:, :, [days.index(d) for d in image.days]] = image.values
    return out


def _one_place(held: Mapping[str, Images]) -> Place | None:
    """The place of all images.

    Raises:
      ValueError: they lie on different grids.
    """
    known = {name: i.place for name, i in held.items() if i.place is not None}
    if not known:
        return None
    (first, place), *others = known.items()
    for name, other in others:
        assert other is not None and place is not None
        same = all(
            len(a) == len(b) and np.allclose(a, b, rtol=0, atol=0.5)
            for a, b in ((place.x, other.x), (place.y, other.y))
        )
        if not same:
            raise ValueError(
                f"{name} and {first} lie on different grids: bring them to one, as "
                "array.interp_like(other, method='nearest') does"
            )
    return place


def embeddings_array(values: np.ndarray, side: int, place: Place | None, attrs: Any) -> Any:
    """Embeddings of one place as a DataArray.

    Args:
      values: float32 [h, w, D], or [D] for one vector.
      side: pixels per side of an embedding; unused for one vector.
      place: of the pixels.
      attrs: attributes of the array.

    Returns:
      dims (y, x, feature), coordinates at the centres of the patches; or (feature,).

    Raises:
      ValueError: xarray is missing.
    """
    try:
        import xarray
    except ImportError:
        raise ValueError(
            "labelled embeddings need xarray: pip install 'olmoearth-jax[zarr]'"
        ) from None
    dims = ("y", "x", "feature") if values.ndim == 3 else ("feature",)
    coords: dict[str, Any] = {"feature": np.arange(values.shape[-1])}
    if values.ndim == 3 and place is not None:
        for name, along in (("y", place.y), ("x", place.x)):
            coords[name] = along.reshape(-1, side).mean(1)
    out = xarray.DataArray(values, coords, dims, name="embeddings", attrs=attrs)
    if place is not None and place.crs is not None:
        out = out.assign_coords({place.crs_name: place.crs.variable})
        out.encoding["grid_mapping"] = place.crs_name
    return out
