"""What each band of one raster is: modality, band, timestep, and its values in the model's unit."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from olmoearth_jax import band_names, modalities
from olmoearth_jax.data.raster_file import RasterFile
from olmoearth_jax.data.raster_list import Raster


class Layer:
    """One open raster of a stack.

    Attributes:
      raster: what is said of it.
      file: the open file.
      modality: its record.
      bands: the band that each band of the file is.
      steps: the timestep in the file of each, from 0.
      dates: the day of each timestep in the file; none where nothing varies in time.
      top, left: its corner in pixels of the modality's own size, set by the stack.
      repeat: (down, across) how many of these pixels one of the file's covers.
    """

    def __init__(self, raster: Raster):
        """Opens a raster.

        Raises:
          ValueError: it cannot be read, or its bands or the unit of its values are not clear.
        """
        self.raster, names = raster, [str(b) for b in raster.bands]
        self.file = RasterFile(raster.path, len(names) * max(1, len(raster.dates)) or None)
        try:
            self._name(names)
            self._set_unit()
        except ValueError:
            self.file.close()
            raise
        self.dates: list[datetime.date] = []
        self._kept = list(range(self.file.count))
        self.top, self.left, self.repeat = 0, 0, (1, 1)

    @property
    def path(self) -> str:
        return self.raster.path

    @property
    def dtype(self) -> np.dtype | None:
        """The type of its values if they are read as they are stored."""
        types = set(self.file.dtypes)
        return np.dtype(types.pop()) if self._unit is None and len(types) == 1 else None

    @property
    def num_steps(self) -> int:
        return max(self.steps) + 1

    def planes(self) -> list[tuple[str, datetime.date | None]]:
        """(band, day) of each band that is read; no day where nothing varies in time."""
        return [
            (self.bands[k], self.dates[self.steps[k]] if self.dates else None) for k in self._kept
        ]

    def keep(self, days: Sequence[datetime.date]) -> None:
        """Reads only what was taken on these days, or does not vary in time."""
        if self.dates:
            self._kept = [k for k, s in enumerate(self.steps) if self.dates[s] in days]

    def _name(self, names: list[str]) -> None:
        count = self.file.count
        given = bool(names)
        if not given:
            names = [(d or "").strip() for d in self.file.descriptions]
            if self.raster.modality and not any(names):
                alone = modalities.get(self.raster.modality).bands
                names, given = (list(alone), True) if len(alone) == 1 else (names, given)
        named = [n for n in names if n]
        if not named or count % len(named) or (not given and len(named) != count):
            raise self._unnamed(len(named))
        # Fewer names than bands: the same bands for every timestep, one timestep after the other.
        every = named * (count // len(named))
        once = list(dict.fromkeys(every))
        self.modality, bands = _identify(self.raster, once)
        self.steps = [every[:k].count(name) for k, name in enumerate(every)]
        if len(every) != len(once) * self.num_steps:
            twice = next(n for n in once if every.count(n) > 1)
            raise ValueError(f"{self.path}: the band {twice!r} is named more than once")
        self.bands = [bands[once.index(name)] for name in every]
        self._check_descriptions(len(named))
        if self.num_steps > 1 and not self.modality.multitemporal:
            raise self._unnamed(len(once))

    def _check_descriptions(self, named: int) -> None:
        """Names that were given must not contradict those of the file."""
        texts = [(d or "").strip() for d in self.file.descriptions]
        own = [band_names.canonical(text, self.modality.name) for text in texts]
        if None in own and band_names.only_counted(texts):
            return
        told = [(one, band) for one, band in zip(own, self.bands, strict=True) if one]
        if all(one == band for one, band in told):
            return
        if named < self.file.count:
            raise self._unnamed(named)
        raise ValueError(
            f"{self.path} calls its bands {', '.join(map(str, self.file.descriptions))}, not "
            f"{', '.join(self.bands)}: give them in the file's order, or leave them out"
        )

    def _unnamed(self, named: int) -> ValueError:
        return ValueError(
            f"{self.path} has {self.file.count} bands, of which {named} are named: give their "
            "names with --bands, in the manifest, or as band descriptions of the file"
        )

    def _set_unit(self) -> None:
        """How raw values become those of the model: x * scale + offset, or as they are."""
        raster, file = self.raster, self.file
        if raster.nodata is not None:
            file.nodata = (raster.nodata,) * file.count
        scales, offsets = np.array(file.scales, np.float64), np.array(file.offsets, np.float64)
        if raster.scale is not None or raster.offset is not None:
            scales = np.full(file.count, 1.0 if raster.scale is None else raster.scale)
            offsets = np.full(file.count, raster.offset or 0.0)
        elif (scales != 1).any() or (offsets != 0).any():
            name, factor = self.modality.name, 1.0
            usable = (scales > 0).all() and np.isfinite([scales, offsets]).all()
            if usable and name == "sentinel2_l2a" and (scales <= 1e-3).all():
                factor = 10_000.0  # the tags make reflectance of counts
            elif not usable or (
                name != "sentinel1" and (name != "sentinel2_l2a" or (scales != 1).any())
            ):
                raise ValueError(
                    f"{self.path} says that its values are to be multiplied by {scales[0]:g} and "
                    f"moved by {offsets[0]:g}, which gives no unit of {name} that the models take; "
                    "settle it with scale and offset in a manifest (1 and 0 take the numbers as "
                    "they are stored)"
                )
            scales, offsets = scales * factor, offsets * factor
        self._unit = None
        if (scales != 1).any() or (offsets != 0).any():
            self._unit = scales[:, None, None], offsets[:, None, None]

    def read(self, rows: slice, cols: slice, shape: tuple[int, int] | None = None) -> np.ndarray:
        """float32 [C, h, w] of a window of the file, of all `planes`.

        Values are in the model's unit, NaN where missing.
        """
        if self.file.complete and self.raster.nodata is None:
            raw, valid = self.file.values(rows, cols, shape), None
        else:
            raw, valid = self.file.read(rows, cols, shape)
        with np.errstate(over="ignore"):  # numbers too large are refused as infinite ones
            if self._unit is None:
                values = raw.astype(np.float32)
            else:
                scale, offset = self._unit
                values = (raw * scale + offset).astype(np.float32)
        if valid is not None and not valid.all():
            values[~valid] = np.nan
        return values if len(self._kept) == len(values) else values[self._kept]


def _identify(raster: Raster, names: Sequence[str]) -> tuple[Any, list[str]]:
    """(modality, its bands) that the names of a raster mean.

    Raises:
      ValueError: they fit several modalities or none, or mean one band twice.
    """
    listed = ", ".join(names)
    if not raster.modality:
        fits = [m for m in modalities.names() if all(_known(n, m) for n in names)]
        if len(fits) != 1:
            said = (
                f"they fit {' and '.join(fits)}" if fits else f"none has all of them{_why(names)}"
            )
            raise ValueError(
                f"the modality of {raster.path} is not clear from its bands {listed} ({said}): "
                "give --modality or name it in the manifest"
            )
    else:
        fits = [raster.modality]
        try:
            modalities.get_of_samples(raster.modality)
        except ValueError as e:
            raise ValueError(f"{raster.path}: {e}") from None
    modality, out = modalities.get(fits[0]), []
    for name in names:
        band = band_names.canonical(name, modality.name)
        if band is None:
            said = band_names.propose(name, modality.name)
            raise ValueError(
                f"{raster.path}: unknown band {name!r} of {modality.name}; "
                f"{said + '; ' if said else ''}known: {', '.join(modality.bands)}"
            )
        if band in out:
            raise ValueError(
                f"{raster.path}: the band {band!r} is named more than once in {listed}"
            )
        out.append(band)
    return modality, out


def _known(name: str, modality: str) -> bool:
    """Whether products of a sensor have a band of this name, even if the models do not take it."""
    return band_names.canonical(name, modality) is not None or bool(
        band_names.propose(name, modality)
    )


def _why(names: Sequence[str]) -> str:
    """Of the modality that knows most of the names: the first one that it does not know."""
    best = max(modalities.names(), key=lambda m: sum(_known(n, m) for n in names))
    wrong = next((n for n in names if not _known(n, best)), None)
    return "" if wrong is None or wrong == names[0] else f"; {best} has no {wrong!r}"
