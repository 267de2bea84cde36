"""Which rasters there are, and what is said of each: manifests, and folders with a name pattern."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax import modalities
from olmoearth_jax.data.remote import AnyPath, RemotePath
from olmoearth_jax.files import check_file
from olmoearth_jax.modalities import closest

_NUMBERS = ("offset", "scale", "nodata")
_RESAMPLE = ("refuse", "nearest", "bilinear")


@dataclasses.dataclass
class Raster:
    """One file and what is said of it; what is left empty comes from the file.

    Attributes:
      path: the file.
      date: when its images were taken; several, or texts separated by commas, for a file that
        holds several timesteps.
      modality: what it shows.
      bands: names of its bands in the file's order, those of one timestep if it holds several.
      offset, scale: value = raw * scale + offset; one of them replaces the tags of the file.
      nodata: replaces the fill value that the file declares.
      resample: what to do if it does not fit the grid: 'refuse', 'nearest' or 'bilinear'. Only
        rasters on the lattice of a UTM zone can be resampled (`raster_lattice`).
      period: name of the time that a map shows.
    """

    path: str
    date: str | Sequence[str] = ""
    modality: str = ""
    bands: Sequence[str] = ()
    offset: float | None = None
    scale: float | None = None
    nodata: float | None = None
    resample: str = "refuse"
    period: str = ""

    @property
    def dates(self) -> list[str]:
        """The texts of its dates."""
        texts = self.date.split(",") if isinstance(self.date, str) else self.date
        return [str(text).strip() for text in texts if str(text).strip()]


_FIELDS = tuple(field.name for field in dataclasses.fields(Raster))


def read_manifest(path: AnyPath, resample: bool = False) -> list[Raster]:
    """The rasters of a JSON or CSV manifest; relative paths start at its folder.

    Args:
      path: of the manifest, which may be remote.
      resample: take rasters that ask to be resampled.

    Raises:
      ValueError: it cannot be read, is cut off, or holds other members or values.
    """
    try:
        if isinstance(path, Path):
            check_file(path)
        text = io.TextIOWrapper(io.BytesIO(path.read_bytes()), "utf-8-sig").read()
        rows = None
        if path.name.partition("?")[0].lower().endswith(".json"):
            rows = json.loads(text, object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise ValueError(f"the manifest {path} is no UTF-8 text: save it as UTF-8") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"the manifest {path} cannot be read: {e}") from None
    if rows is None:
        rows = _csv_rows(path, text)
    if not isinstance(rows, list) or not all(isinstance(r, dict) and r.get("path") for r in rows):
        raise ValueError(f"the manifest {path} must list rasters, each with a 'path'")
    return [_raster(path, row, resample) for row in rows]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object, each of which may be there once."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the member {max(names, key=names.count)!r} is given twice")
    return dict(pairs)


def _csv_rows(path: AnyPath, text: str) -> list[dict[str, Any]]:
    skipped = 0
    named = re.match(r'"?sep=(.)"?\s*?\n', text)  # Excel's own first line
    if named:
        skipped, text = 1, text[named.end() :]
    head = text.partition("\n")[0]
    # Spreadsheets of many languages write semicolons or tabs.
    marks = [named[1]] if named else [m for m in ";\t" if m in head and "," not in head]
    try:
        lines = csv.reader(io.StringIO(text), delimiter=marks[0] if marks else ",", strict=True)
        names = [n.lower() for n in _without_blank_end(next(lines, []))]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"the manifest {path} has two columns {twice!r}")
        rows = []
        for line in lines:
            if not any(cell.strip() for cell in line):
                continue
            if len(line) > len(names):
                line = [*line[: len(names)], *_without_blank_end(line[len(names) :])]
            if len(line) != len(names):
                raise ValueError(
                    f"the manifest {path} has {len(line)} fields in line "
                    f"{lines.line_num + skipped}, but {len(names)} columns: is it cut off?"
                )
            rows.append(dict(zip(names, map(str.strip, line), strict=True)))
    except csv.Error as e:
        raise ValueError(f"the manifest {path} cannot be read: {e}") from None
    return rows


def _without_blank_end(cells: list[str]) -> list[str]:
    """The stripped cells without empty ones at the end, which spreadsheets leave."""
    out = [cell.strip() for cell in cells]
    while out and not out[-1]:
        out.pop()
    return out


def _raster(manifest: AnyPath, row: Mapping[str, Any], resample: bool) -> Raster:
    for key in row:
        if key not in _FIELDS:
            raise ValueError(f"{manifest}: unknown member {key!r}; {closest(str(key), _FIELDS)}")
    known: dict[str, Any] = {k: v for k, v in row.items() if v is not None and v != "" and v != []}
    where = f"{manifest}: {known['path']}"
    known.update({key: _number(where, key, known[key]) for key in _NUMBERS if key in known})
    for key in ("date", "bands"):
        held = known.get(key, "")
        known[key] = [str(v) for v in held] if isinstance(held, list) else str(held)
    if isinstance(known["bands"], str):
        known["bands"] = re.split(r"[\s,;]+", known["bands"].strip(" ,;"))
        known["bands"] = [b for b in known["bands"] if b]
    for key in ("path", "modality", "resample", "period"):
        if key in known:
            known[key] = str(known[key])
    way = known.get("resample", "refuse")
    if way not in _RESAMPLE:
        raise ValueError(f"{where}: unknown resample {way!r}; {closest(way, _RESAMPLE)}")
    if way != "refuse" and not resample:
        raise ValueError(
            f"{where}: resample {way!r} is not possible here; warp the raster, for example with "
            f"gdalwarp -r {'near' if way == 'nearest' else way}"
        )
    known["path"] = located(manifest.parent, known["path"])
    return Raster(**known)


def _number(where: str, key: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    endless = str(value).lower().lstrip("+-") in ("nan", "inf", "infinity")
    if not math.isfinite(number) and not (key == "nodata" and endless):
        raise ValueError(f"{where}: {key} must be a number, got {value!r}")
    if key == "scale" and number == 0:
        raise ValueError(f"{where}: a scale of 0 leaves nothing of the values")
    return number


def located(folder: AnyPath, text: str) -> str:
    """Where a path of a manifest leads: relative ones start at its folder."""
    if "://" in text or text.startswith("/vsi"):
        return text
    if isinstance(folder, RemotePath):
        return str(folder / text)
    return str(folder / Path(text).expanduser())


def name_pattern(text: str) -> re.Pattern[str]:
    """What matches file names of a form such as '{modality}_{date}_{tile}.tif'.

    {modality} matches names of modalities in any case, {date} what begins with four digits and
    goes on as dates do, all other fields anything without a slash; equal fields match equal texts.

    Raises:
      ValueError: no field, or braces that do not match.
    """
    names = "|".join(sorted((re.escape(n) for n in modalities.names()), key=len, reverse=True))
    forms = {"modality": names, "date": r"\d{4}[\dTZtz:.+-]*?", "": r"[^/]+?"}
    out, seen, at = "", set(), 0
    for field in re.finditer(r"\{(\w*)\}", text):
        name = field[1]
        out += re.escape(text[at : field.start()])
        at = field.end()
        if name in seen:
            out += f"(?P={name})"
        elif name.isidentifier():
            form = forms.get(name, forms[""])
            case = f"(?i:{form})" if name == "modality" else form
            out += f"(?P<{name}>{case})"
            seen.add(name)
        else:
            raise ValueError(f"the field {field[0]} of the name pattern {text!r} has no name")
    rest = text[at:]
    if not seen or set("{}") & set(re.sub(r"\{\w*\}", "", text)):
        raise ValueError(
            f"the name pattern {text!r} must hold fields such as {{modality}} and {{date}}"
        )
    return re.compile(out + re.escape(rest))


def read_folder(folder: Path, pattern: str) -> tuple[list[Raster], list[str]]:
    """(rasters whose names match, sorted by name; names of the other files).

    A pattern with slashes looks at paths below the folder. The fields modality, date, band and
    bands say what a raster holds; the rest is free.

    Raises:
      ValueError: the pattern is none, or matches nothing.
    """
    form, found, others = name_pattern(pattern), [], []
    depth = pattern.count("/")
    for path in sorted(folder.glob("/".join("*" * (depth + 1)))):
        if not path.is_file() or path.name.startswith("."):
            continue
        name = path.relative_to(folder).as_posix()
        match = form.fullmatch(name)
        if match is None:
            others.append(name)
            continue
        held = match.groupdict()
        bands = re.split(r"[ ,+]+", held["bands"]) if "bands" in held else []
        bands = [held["band"]] if "band" in held else bands
        modality = held.get("modality", "").lower()
        found.append(Raster(str(path), held.get("date", ""), modality, bands))
    if not found:
        shown = f", such as {others[0]}" if others else ""
        raise ValueError(
            f"none of the {len(others)} files in {folder}{shown} is named like {pattern!r}"
        )
    return found, others
