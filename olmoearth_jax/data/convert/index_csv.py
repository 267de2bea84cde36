"""The CSV index of a modality, as scripts and as spreadsheets write it (spec/data.md section 3)."""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert.tree import Cell, Date, Series, centre, stem
from olmoearth_jax.data.timesteps import DATE_RANGE
from olmoearth_jax.dates import check_one_day
from olmoearth_jax.files import check_file

COLUMNS = ("crs", "col", "row", "tile_time", "image_idx", "start_time", "end_time")

_FARTHEST = 10**6
"""Largest column and row: more than any place on earth has, and little enough for PROJ."""

_SEPARATORS = (",", ";", "\t", "|")
_LONGEST_CRS = 200


def read_series(tree: Path, name: str) -> Series:
    """Reads the CSV of a modality.

    A row counts if its image_idx is the number of rows its tile has so far; others (repeated or
    out of order) are ignored and counted. A byte order mark, another separator, spaces, capital
    letters in the header, empty rows and whole numbers such as 100.0 are read as what they mean.

    Raises:
      ValueError: missing file or columns, a value that cannot be read, an unknown CRS, or numbers
        that do not count from 0.
    """
    path = tree / f"{stem(registry.get(name))}.csv"
    factor = registry.get(name).tile_resolution_factor
    collected: dict[Cell, list[Date]] = {}
    ignored = 0
    begun = None
    try:
        check_file(path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            for where, row in _rows(file, path):
                cell, number, date = _parse_row(row, factor, where)
                begun = begun or (where, number)
                dates = collected.setdefault(cell, [])
                if number == len(dates):
                    dates.append(date)
                else:
                    ignored += 1
    except FileNotFoundError:
        raise ValueError(
            f"modality {name!r} has no index {path}; leave it out of the modalities or add the CSV"
        ) from None
    except UnicodeDecodeError as e:
        raise ValueError(
            f"cannot read {path}: it is not UTF-8 text ({e}); save it as 'CSV UTF-8'"
        ) from e
    except (OSError, csv.Error) as e:
        raise ValueError(f"cannot read {path}: {e}") from e
    found = {c: tuple(d) for c, d in collected.items() if d}
    if begun and not found:
        where, number = begun
        raise ValueError(f"{where}: image_idx counts from 0 for every tile, but begins at {number}")
    return Series(found, ignored, tuple(str(c) for c, d in collected.items() if not d))


def _rows(file: TextIO, path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """(place for messages, value by column) of every row that is not empty."""
    first = file.readline()
    skipped = 0
    named = re.fullmatch(r'"?sep=(.)"?\s*', first)  # Excel's own first line
    if named:
        skipped, first = 1, file.readline()
    separator, columns = _header(first, path, named[1] if named else None)
    file.seek(0)
    if skipped:
        file.readline()
    table = csv.reader(file, delimiter=separator)
    next(table, None)
    places = {c: columns.index(c) for c in COLUMNS}
    for values in table:
        values = [v.strip() for v in values]
        if not any(values):
            continue
        where = f"{path}, line {table.line_num + skipped}"
        extra = [v for v in values[len(columns) :] if v]
        if len(values) <= max(places.values()) or extra:
            raise ValueError(
                f"{where}: has {len(values)} values for {len(columns)} columns; the file may be "
                f"cut short, or a value that holds the separator lacks its quotes"
            )
        yield where, {c: values[k] for c, k in places.items()}


def _header(line: str, path: Path, separator: str | None) -> tuple[str, Sequence[str]]:
    """(separator, names of the columns) of a header line."""
    found = {}
    for mark in (separator,) if separator else _SEPARATORS:
        names = next(csv.reader([line], delimiter=mark), [])
        found[mark] = [re.sub(r"\s+", "_", n.strip()).lower() for n in names]
    best = max(found, key=lambda mark: len(set(COLUMNS) & set(found[mark])))
    columns = found[best]
    for column in COLUMNS:
        if columns.count(column) > 1:
            raise ValueError(f"{path} has two columns {column!r}")
        if column not in columns:
            shown = ", ".join(repr(c) for c in columns[:12]) or "nothing"
            raise ValueError(
                f"{path} has no column {column!r}; it needs {COLUMNS} in its first line, which "
                f"holds {shown}"
            )
    return best, columns


def _parse_row(row: Mapping[str, str], factor: int, where: str) -> tuple[Cell, int, Date]:
    try:
        crs = _crs(row["crs"])
        col, line, number = (_whole(row, c) for c in ("col", "row", "image_idx"))
        start = _date(row["start_time"])
        for name, value in (("col", col), ("row", line)):
            if abs(value) > _FARTHEST:
                shown = text if len(text := str(value)) <= 30 else f"{text[:30]}..."
                raise ValueError(f"{name} must lie in -{_FARTHEST}..{_FARTHEST}, got {shown}")
        cell = Cell(crs, col, line, factor)
        centre(cell)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e
    return cell, number, (start.day, start.month - 1, start.year)


def _crs(text: str) -> str:
    """A CRS whose text may be part of a file's name."""
    if text.isdigit():
        raise ValueError(f"crs must be a code such as EPSG:32633, got {text!r}")
    bad = next((c for c in text if c in '/\\<>"|?*' or not c.isprintable()), None)
    if bad is not None or not 0 < len(text) <= _LONGEST_CRS:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise ValueError(
            f"crs names the tile's files, so it must be a short code such as EPSG:32633 without "
            f"slashes and quotes, got {shown!r}"
        )
    return text


def _whole(row: Mapping[str, str], column: str) -> int:
    """A whole number; '100.0' is one, '2.000' may be two thousand and is refused."""
    text = row[column]
    plain = re.fullmatch(r"([+-]?\d+)\.(?:0{1,2}|0{4,})?", text)
    try:
        return int(plain[1] if plain else text)
    except ValueError as e:
        raise ValueError(f"{e} (column {column}, which holds whole numbers)") from None


def _date(text: str) -> datetime.datetime:
    first, last = DATE_RANGE[2]
    try:
        check_one_day(text)
        found = datetime.datetime.fromisoformat(text)
        if not first <= found.year <= last:
            raise ValueError(f"no image is of {text}: years are {first}..{last}")
        return found
    except ValueError as e:
        raise ValueError(
            f"{e} (column start_time, as 2020-01-31; spreadsheets rewrite dates: make it text)"
        ) from None
