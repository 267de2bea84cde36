"""Samples as users have them: named bands, dates, raw physical units."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from olmoearth_jax import band_names, modalities
from olmoearth_jax.data.values import check_values
from olmoearth_jax.dates import check_timestamps, newest, parse_dates
from olmoearth_jax.inference import describe
from olmoearth_jax.inference.attributes import filled
from olmoearth_jax.inference.labelled_arrays import Place, images_of, is_array
from olmoearth_jax.modalities import MISSING, Modality
from olmoearth_jax.proposals import known

_Bands = Mapping[str, Sequence[str]]
NAN_PIXELS = ("error", "fill", "mask")


@dataclasses.dataclass(frozen=True, repr=False)
class Sample:
    """One place, or a batch of them, with its images; see `from_arrays`."""

    data: dict[str, np.ndarray]
    """Raw float32 per modality, bands in the models' order, NaN where missing:
    [B, H, W, T, C] (T = 1 for maps), [B, T, C] or [B, C]."""
    timestamps: np.ndarray
    """int32 [B, T, 3] of (day 1..31, month 0..11, year)."""
    missing_bands: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Bands that were not given, by modality."""
    normalized: bool = False
    """The values are normalised already."""
    nan_pixels: str = "mask"
    """What to do with single missing pixels: 'fill' or 'mask'."""
    place: Place | None = None
    """Where the pixels of a sample made by `from_xarray` lie."""

    def __repr__(self) -> str:
        return describe.sample_line(self)

    @property
    def batch_size(self) -> int:
        return int(self.timestamps.shape[0])

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) in pixels of 10 m, or None without images."""
        for name, x in self.data.items():
            if modalities.get(name).spatial:
                factor = modalities.get(name).image_factor
                return x.shape[1] // factor, x.shape[2] // factor
        return None

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Any],
        dates: Sequence[Any] | np.ndarray | None = None,
        *,
        bands: _Bands | None = None,
        timestamps: Any = None,
        normalized: bool = False,
        nan_pixels: str = "error",
        check_units: bool = True,
    ) -> Sample:
        """Builds a sample from arrays in raw units.

        Args:
          arrays: per modality an array [H, W, T, C], or {band: [H, W, T]}. Maps have no time axis
            or T = 1; scalars are [C], series [T, C]. A leading batch axis is accepted everywhere.
            NaN, -99999 or the mask of a masked array means missing. Sentinel-2: digital numbers
            without the 1000 offset; Landsat: digital numbers; Sentinel-1: decibel.
          dates: one ISO text or datetime per timestep, ascending, or one list per sample. Not
            needed if nothing varies in time.
          bands: per modality the names of the array's channels, in any order. Names that
            products use are known ('B2', 'red'). Needed for every array of more than one channel.
            Absent bands are filled by the model's rule.
          timestamps: instead of dates, integers [T, 3] of (day, month 0..11, year).
          normalized: the values are normalised as in training already.
          nan_pixels: single NaN pixels (not a whole band or timestep) are an 'error', or 'fill'
            them like missing bands, or 'mask' the patches that hold any.
          check_units: look whether the values can be in the expected unit.

        Raises:
          ValueError: unknown names, shapes that do not fit together, wrong units, bad dates.
        """
        _check_given(arrays, nan_pixels)
        stamps = _stamps(dates, timestamps)
        data, absent, kinds = _values(arrays, _bands_of(bands, arrays), stamps, nan_pixels)
        stamps = _check_together(data, stamps)
        for name, x in data.items():
            if check_units:
                check_values(x, name, newest(stamps), normalized, kinds[name])
        policy = "fill" if nan_pixels == "fill" else "mask"
        order = modalities.in_sample_order(data)
        return cls({n: data[n] for n in order}, stamps, absent, normalized, policy)

    @classmethod
    def from_xarray(
        cls,
        images: Any,
        modality: str | None = None,
        *,
        normalized: bool = False,
        nan_pixels: str = "error",
        check_units: bool = True,
        any_pixel_size: bool = False,
    ) -> Sample:
        """Builds a sample of one place from labelled arrays of xarray.

        Args:
          images: a DataArray with the dims time, band, y and x in any order; a Dataset whose
            variables are modalities or bands; or {modality: either}. Names of bands come from
            the coordinate of the band dim, or from the attribute `long_name`. Modalities of
            other dates are missing where they have none. South-up images are turned.
          modality: of an array or of bands; found by the names of the bands if they fit one only.
          normalized, nan_pixels, check_units: as of `from_arrays`.
          any_pixel_size: do not look whether neighbours are 10 m apart.

        Raises:
          ValueError: as of `from_arrays`, or coordinates that do not fit.
        """
        arrays, bands, days, place = images_of(images, modality, any_pixel_size)
        made = cls.from_arrays(
            arrays, days or None, bands=bands, normalized=normalized, nan_pixels=nan_pixels,
            check_units=check_units,
        )  # fmt: skip
        return dataclasses.replace(made, place=place)

    @staticmethod
    def concatenate(samples: Sequence[Sample]) -> Sample:
        """One batch of samples of equal size; a modality that one lacks is missing there.

        Raises:
          ValueError: sizes, numbers of timesteps or settings differ.
        """
        if not samples:
            raise ValueError("there are no samples to put together")
        first = samples[0]
        kinds = {(s.image_size, s.timestamps.shape[1], s.normalized, s.nan_pixels) for s in samples}
        if len(kinds) > 1:
            raise ValueError(
                "samples of one batch need the same image size, number of timesteps and settings, "
                f"got {sorted(map(str, kinds))}; embed them in separate calls"
            )
        shapes = {n: x.shape[1:] for s in samples for n, x in s.data.items()}
        data = {}
        for name in modalities.in_sample_order(shapes):
            parts = [
                s.data.get(name, np.full((s.batch_size, *shapes[name]), np.nan, np.float32))
                for s in samples
            ]
            data[name] = np.concatenate(parts)
        absent = {n: b for s in samples for n, b in s.missing_bands.items()}
        stamps = np.concatenate([s.timestamps for s in samples])
        return Sample(data, stamps, absent, first.normalized, first.nan_pixels)

    def rows(self, start: int, stop: int) -> Sample:
        """The samples start..stop of the batch."""
        data = {n: x[start:stop] for n, x in self.data.items()}
        return dataclasses.replace(self, data=data, timestamps=self.timestamps[start:stop])


def _values(
    arrays: Mapping[str, Any], given: Mapping[str, list[str]], stamps: Any, nan_pixels: str
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]], dict[str, np.dtype]]:
    """Of each modality its values in the models' order, the bands it lacks, and its dtype."""
    data, absent, kinds = {}, {}, {}
    for key, value in arrays.items():
        modality = modalities.get_of_samples(key)
        name = modality.name
        if name in data:
            raise ValueError(f"{name} is given twice, as {key!r} and in another spelling")
        raw, names, kinds[name] = _array(modality, value, given.get(name))
        full = _in_order(modality, _with_batch_and_time(modality, raw, stamps), names)
        if nan_pixels == "error" and np.isnan(np.min(raw)):
            _refuse_single_nan(modality, full)
        np.copyto(full, np.nan, where=full == np.float32(MISSING))
        data[name] = full
        if lacking := tuple(b for b in modality.bands if b not in names):
            absent[name] = lacking
    return data, absent, kinds


def _stamps(dates: Any, timestamps: Any) -> np.ndarray | None:
    if dates is not None and timestamps is not None:
        raise ValueError("give dates or timestamps, not both")
    if dates is not None:
        return parse_dates(dates)
    return None if timestamps is None else check_timestamps(timestamps)


def _bands_of(bands: _Bands | None, arrays: Mapping[str, Any]) -> dict[str, list[str]]:
    """{modality: names of its channels}."""
    if bands is None:
        return {}
    if not isinstance(bands, Mapping):
        form = "{" + ", ".join(f"{name!r}: [...]" for name in arrays) + "}"
        raise ValueError(f"bands= must say which modality has which bands: bands={form}")
    out = {}
    for key, names in bands.items():
        if isinstance(names, str) or not isinstance(names, Sequence | np.ndarray):
            raise ValueError(f"the bands of {key} must be a list of names, got {names!r}")
        out[modalities.get(key).name] = [str(n) for n in names]
    return out


def _array(
    modality: Modality, value: Any, names: Sequence[str] | None
) -> tuple[np.ndarray, list[str], np.dtype]:
    """(array with channels last, canonical band names, dtype in which the values came)."""
    if isinstance(value, Mapping):
        if names is not None:
            raise ValueError(f"{modality.name}: bands are named twice")
        if not value:
            raise ValueError(f"{modality.name}: the mapping holds no bands")
        names = [str(n) for n in value]
        parts = [_numbers(modality, x) for x in value.values()]
        if len({x.shape for x, _ in parts}) > 1:
            shapes = {n: list(x.shape) for n, (x, _) in zip(names, parts, strict=True)}
            raise ValueError(f"{modality.name}: its bands differ in shape: {shapes}")
        array = np.stack([x for x, _ in parts], axis=-1)
        kind = np.result_type(*(kind for _, kind in parts))
    else:
        array, kind = _numbers(modality, value)
    if names is None:
        if modality.num_bands > 1:
            raise ValueError(
                f"{modality.name}: name the bands of the array, since their order differs between "
                f"sources: bands={{{modality.name!r}: [...]}}; the models' own order is "
                f"{list(modality.bands)}"
            )
        names = modality.bands
    out = [_band(modality, name) for name in names]
    if len(set(out)) != len(out):
        raise ValueError(f"{modality.name}: a band is named more than once in {list(names)}")
    if array.shape[-1:] != (len(out),):
        hint = ""
        if len(out) in array.shape:
            axis = array.shape.index(len(out))
            hint = f" Are the channels first? Then pass np.moveaxis(x, {axis}, -1)."
        raise ValueError(
            f"{modality.name}: the last axis holds the bands and must have {len(out)} entries, "
            f"got the shape {list(array.shape)}.{hint}"
        )
    return array, out, kind


def _band(modality: Modality, name: str) -> str:
    band = band_names.canonical(name, modality.name)
    if band is None:
        said = band_names.propose(name, modality.name)
        raise ValueError(
            f"unknown band {name!r} of {modality.name}; {said + '; ' if said else ''}known: "
            f"{', '.join(modality.bands)}"
        )
    return band


def _numbers(modality: Modality, value: Any) -> tuple[np.ndarray, np.dtype]:
    """(values, NaN where a masked array hides them; dtype in which they came)."""
    if is_array(value):  # its axes are believed, but it may say what is missing
        try:
            value = filled(value)
        except ValueError as e:
            raise ValueError(f"{modality.name}: {e}") from None
    value = _with_masks(value)
    try:
        array = np.ma.getdata(value) if np.ma.isMaskedArray(value) else np.asarray(value)
    except ValueError:
        raise ValueError(f"{modality.name} holds rows of different lengths") from None
    kind = array.dtype
    if kind.kind not in "fiub":
        raise ValueError(f"{modality.name} must hold numbers, got {kind}")
    if 0 in array.shape:
        raise ValueError(f"{modality.name} is empty: its shape is {list(array.shape)}")
    hidden = np.ma.getmaskarray(value) if np.ma.isMaskedArray(value) else None
    if hidden is not None and hidden.any():
        array = array.astype(np.float32 if kind.itemsize <= 2 else np.float64)
        array[hidden] = np.nan
    if array.dtype.kind == "f":
        if np.isinf(array).any():
            raise ValueError(
                f"{modality.name} holds infinite values; give NaN where data is missing"
            )
        if array.dtype.itemsize > 4 and (np.abs(array) > np.finfo(np.float32).max).any():
            raise ValueError(
                f"{modality.name} holds values that float32 cannot, such as "
                f"{np.nanmax(np.abs(array)):.3g}; give NaN where data is missing"
            )
    return array, kind


def _with_masks(value: Any) -> Any:
    """One masked array of a list of them, which NumPy would unmask; anything else as it is."""
    if not isinstance(value, list | tuple) or not value or np.isscalar(value[0]):
        return value
    parts = [_with_masks(v) for v in value]
    if not any(np.ma.isMaskedArray(p) for p in parts):
        return value
    if len({np.shape(p) for p in parts}) > 1:
        raise ValueError(f"arrays of one list differ in shape: {[np.shape(p) for p in parts]}")
    return np.ma.stack(parts)


def _with_batch_and_time(modality: Modality, x: np.ndarray, stamps: np.ndarray | None):
    """Adds the axes that may be left out: the batch, and time where nothing varies in it."""
    full = 1 + (3 if modality.spatial else int(modality.multitemporal)) + 1
    if modality.spatial and not modality.multitemporal:
        if x.ndim == 3:
            x = x[:, :, None]
        elif x.ndim == 4 and x.shape[2] != 1:
            x = x[:, :, :, None]
    elif modality.spatial and x.ndim == 3 and stamps is not None and stamps.shape[-2] == 1:
        x = x[:, :, None]
    if x.ndim == full - 1:
        x = x[None]
    if x.ndim != full:
        axes = {5: "[H, W, T, C]", 3: "[T, C]", 2: "[C]"}[full]
        raise ValueError(
            f"{modality.name} must have the axes {axes}, with or without a batch axis in front; "
            f"got {x.ndim} axes"
        )
    return x


def _in_order(modality: Modality, x: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """float32 with all bands in the models' order; MISSING for those not given."""
    if list(names) == list(modality.bands):
        return x.astype(np.float32)
    out = np.full((*x.shape[:-1], modality.num_bands), MISSING, np.float32)
    out[..., [modality.bands.index(b) for b in names]] = x
    return out


def _refuse_single_nan(modality: Modality, x: np.ndarray) -> None:
    """Single missing pixels must be meant; the fill value says so by itself, NaN does not."""
    gone = np.isnan(x)
    area = (1, 2) if modality.spatial else ()
    if (gone & ~gone.all(area, keepdims=True)).any():
        raise ValueError(
            f"{modality.name} holds NaN at {int(gone.any(-1).sum())} pixels of images that are "
            "present otherwise; pass nan_pixels='mask' to leave out the patches around them, or "
            "nan_pixels='fill' to fill them like missing bands"
        )


def _check_together(data: Mapping[str, np.ndarray], stamps: np.ndarray | None) -> np.ndarray:
    """The timestamps [B, T, 3]; checks that batch, image sizes and timesteps agree."""
    for what, sizes in (
        ("sizes of the batch", {n: x.shape[0] for n, x in data.items()}),
        ("numbers of timesteps", {n: x.shape[-2] for n, x in data.items()
                                  if modalities.get(n).multitemporal}),
        ("image sizes at 10 m", {
            n: tuple(s / modalities.get(n).image_factor for s in x.shape[1:3])
            for n, x in data.items() if modalities.get(n).spatial}),
    ):  # fmt: skip
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"the modalities have different {what}: {sizes}. Bring them to one grid and one "
                "list of dates; fill what a modality lacks with NaN"
            )
    batch = next(iter(data.values())).shape[0]
    steps = {x.shape[-2] for n, x in data.items() if modalities.get(n).multitemporal}
    if stamps is None:
        if steps:
            raise ValueError("give dates=, one ISO text per timestep")
        stamps = np.array([[1, 0, 2000]], np.int32)
    if stamps.ndim == 2:
        stamps = np.broadcast_to(stamps, (batch, *stamps.shape))
    if steps and stamps.shape[1] not in steps:
        hint = _time_elsewhere(data, stamps.shape[1])
        raise ValueError(f"{stamps.shape[1]} dates were given for {steps.pop()} timesteps{hint}")
    if stamps.shape[0] != batch:
        raise ValueError(f"dates of {stamps.shape[0]} samples were given for a batch of {batch}")
    return np.ascontiguousarray(stamps)


def _time_elsewhere(data: Mapping[str, np.ndarray], steps: int) -> str:
    """A hint where another axis than the third has as many entries as there are dates."""
    for name, x in data.items():
        if modalities.get(name).kind == "space_time" and steps in x.shape[1:3]:
            axis = x.shape[1:3].index(steps)
            place = "first" if axis == 0 else "second"
            return (
                f"; the {place} axis of {name} has {steps} entries: is it time? Then pass "
                f"np.moveaxis(x, {axis - 4}, -2), since arrays are [H, W, T, C]"
            )
    return ""


def _check_given(arrays: Any, nan_pixels: str) -> None:
    known("nan_pixels", nan_pixels, NAN_PIXELS)
    if not isinstance(arrays, Mapping):
        raise ValueError(
            "say which modality an array is of: Sample.from_arrays({'sentinel2_l2a': array}, "
            f"...), got {type(arrays).__name__}"
        )
    if not arrays:
        raise ValueError("a sample needs at least one modality")
