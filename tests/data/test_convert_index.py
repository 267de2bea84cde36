"""The CSV index as scripts, spreadsheets and broken downloads leave it."""

from __future__ import annotations

from pathlib import Path

import pytest

from olmoearth_jax.data.convert import Settings, convert
from olmoearth_jax.data.convert.index_csv import read_series
from tests.data.trees import HEADER, make_tree, month, write_rows

NAME = "10_sentinel1_monthly.csv"


def _rows(col="100", row="-2000", first=0, count=12, crs="EPSG:32633") -> list[list[str]]:
    return [[crs, col, row, month(0), str(i + first), month(i), month(i, 30)] for i in range(count)]


def _text(rows, separator=",", header=HEADER) -> str:
    return "".join(separator.join(map(str, r)) + "\n" for r in [header, *rows])


def _write(folder: Path, text: str, encoding="utf-8") -> Path:
    (folder / NAME).write_bytes(text.encode(encoding))
    return folder


PLAIN = _text(_rows())
SAVED = {
    "byte order mark": "\ufeff" + PLAIN,
    "semicolons": _text(_rows(), ";"),
    "tabs": _text(_rows(), "\t"),
    "Excel's first line": "sep=;\r\n" + _text(_rows(), ";").replace("\n", "\r\n"),
    "all of it": "\ufeffsep=;\n" + _text(_rows(), ";"),
    "old line ends": PLAIN.replace("\n", "\r"),
    "header in capitals": PLAIN.replace("crs,col,row", "CRS, Col ,ROW").replace("e_idx", "e idx"),
    "quotes": '"' + PLAIN.strip().replace(",", '","').replace("\n", '"\n"') + '"\n',
    "spaces": PLAIN.replace(",", " , "),
    "decimals": _text([[r[0], "100.0", "-2000.00", r[3], f"{i}.", *r[5:]]
                       for i, r in enumerate(_rows())]),
    "empty rows": PLAIN + ",,,,,,\n\n",
    "empty columns": PLAIN.replace("\n", ",,\n"),
    "another order": "\n".join(",".join(reversed(line.split(","))) for line in PLAIN.split("\n")),
    "no last line end": PLAIN.rstrip(),
}  # fmt: skip


@pytest.mark.parametrize("how", SAVED)
def test_what_spreadsheets_save_means_the_same(tmp_path, how):
    want = read_series(_write(tmp_path, PLAIN), "sentinel1")
    assert [len(d) for d in want.dates.values()] == [12]
    assert read_series(_write(tmp_path, SAVED[how]), "sentinel1") == want


def _with(index: int, value: str) -> str:
    rows = _rows()
    rows[1][index] = value
    return _text(rows, ";")


REFUSED = {
    "utf-16": (PLAIN.encode("utf-16"), "is not UTF-8 text .* save it as 'CSV UTF-8'"),
    "empty": (b"", "has no column 'crs'.* holds nothing"),
    "other columns": (b"crs;column;row\n", "has no column 'col'.* holds 'crs', 'column', 'row'"),
    "one column": (b'"crs,col"\n', "has no column 'crs'.* holds 'crs,col'"),
    "twice": (b"crs,crs," + PLAIN.encode(), "two columns 'crs'"),
    "from 1": (_text(_rows(first=1)).encode(), "line 2: image_idx counts from 0 .* begins at 1"),
    "thousands": (_with(2, "2.000").encode(), "line 3: invalid literal .*'2.000' .column row"),
    "fraction": (_with(1, "100.5").encode(), "line 3: .*'100.5' .column col"),
    "decimal comma": (_with(1, "100,0").encode(), "line 3: .*'100,0'"),
    "impossible year": (_with(5, "0202-01-31").encode(), "line 3: no image is of 0202-01-31"),
    "local date": (_with(5, "31.01.2020").encode(), "line 3: .*'31.01.2020' .*start_time"),
    "no date": (_with(5, "").encode(), "line 3: .*start_time"),
    "period": (_with(5, "20200101-20200131").encode(), "line 3: .*is a period and no date"),
    "no column": (_with(1, "").encode(), "line 3: .*column col"),
    "half written": (PLAIN[:-60].encode(), "line 13: has . values for 7 columns"),
    "too many": (PLAIN.replace("EPSG:32633", "EPSG:32633,2", 2).encode(), "line 2: has 8 values"),
    "number only": (_with(0, "32633").encode(), "line 3: .*a code such as EPSG:32633, got '32633'"),
    "no crs": (_with(0, "").encode(), "line 3: .*a short code"),
    "other place": (_with(0, "../../../etc/x").encode(), "line 3: .*slashes.*got '../../../etc/x'"),
    "windows": (_with(0, "..\\x").encode(), "line 3: .*slashes"),
    "line end": (_with(0, '"EPSG:\n32633"').encode(), "line 4: .*slashes"),
    "WKT": (_with(0, 'PROJCS[""WGS 84 / UTM""]').encode(), "line 3: .*slashes and quotes"),
    "long": (_with(0, "+proj=utm " * 500).encode(), r"line 3: .*short code .*\.\.\.'$"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_read_is_refused_in_words(tmp_path, how):
    data, message = REFUSED[how]
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(ValueError, match=message) as e:
        read_series(tmp_path, "sentinel1")
    assert NAME in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:32733", "EPSG:3857", "EPSG:3035"])
@pytest.mark.parametrize("number", [10**6 + 1, 10**10, 10**30, 10**400, -(10**9)])
@pytest.mark.parametrize("column", [1, 2])
def test_places_far_from_earth_are_refused_at_once(tmp_path, crs, number, column):
    rows = _rows(crs=crs)
    rows[3][column] = str(number)
    with pytest.raises(ValueError, match=r"line 5: (col|row) must lie in -1000000..1000000, got"):
        read_series(_write(tmp_path, _text(rows)), "sentinel1")


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:3857", "EPSG:3035", "EPSG:3413", "EPSG:4326"])
@pytest.mark.parametrize("place", [(10**6, -2000), (-(10**6), 10**6), (5, 10**6), (10**6, 5)])
def test_places_outside_of_the_system_never_hang_or_end_in_a_traceback(tmp_path, crs, place):
    write_rows(tmp_path, "sentinel1", _rows(str(place[0]), str(place[1]), crs=crs))
    try:
        read_series(tmp_path, "sentinel1")
    except ValueError as e:
        assert "line 2" in str(e)


def test_tiles_that_lack_their_first_row_are_told(tmp_path):
    make_tree(tmp_path, tiles=2)
    write_rows(tmp_path, "sentinel1", _rows() + _rows("101", first=1))
    said: list[str] = []
    done = convert(Settings(tmp_path, tmp_path), say=said.append)
    assert done.samples == 4
    assert "12 of sentinel1" in said[0]
    assert said[1] == "1 tiles of sentinel1 have no image_idx 0, such as EPSG:32633_101_-2000"
