"""Series of any length: fewer timesteps than the models take, and more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from olmoearth_jax.data.convert import Conversion, Settings, convert
from olmoearth_jax.data.convert.tree import Cell
from olmoearth_jax.data.derived import to_decibel
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.h5_writer import Storage
from olmoearth_jax.data.series import nearest_to_mid_month
from tests.data.trees import add_modality, make_tree, write_rows

CELLS = [Cell("EPSG:32633", 100 + i, -2000) for i in range(3)]


def _convert(folder: Path, **changes: Any) -> Conversion:
    given: dict[str, Any] = {"tree": folder, "output_dir": folder / "out", "tile_px": 256}
    given["storage"] = Storage("zstd", 1)
    given.update(changes)
    return convert(Settings(**given))


def _stored(done: Conversion, name: str, number: int = 0) -> np.ndarray:
    with h5py.File(done.folder / f"sample_{number}.h5") as file:
        return np.asarray(file[name])


def test_the_date_nearest_the_middle_of_its_month_is_kept():
    dates = [(1, 0, 2023), (14, 0, 2023), (19, 0, 2023), (28, 1, 2023), (15, 5, 2023)]
    assert nearest_to_mid_month(dates) == [1, 3, 4]
    assert nearest_to_mid_month(dates, avoid=[1, 3]) == [2, 3, 4]
    assert nearest_to_mid_month(dates[::-1]) == [0, 1, 3]
    # The 14th and the 16th of a month of 29 days are as near; of 31 days the 16th is the middle.
    assert nearest_to_mid_month([(16, 1, 2024), (14, 1, 2024), (16, 2, 2024), (15, 2, 2024)]) == [
        0,
        2,
    ]
    same_month = [(10, 6, 2022), (16, 6, 2023)]
    assert nearest_to_mid_month(same_month) == [0, 1]
    assert nearest_to_mid_month([]) == []


def test_short_series_are_taken_where_they_are_asked_for(tmp_path):
    starts = [f"2021-{m:02d}-15" for m in range(1, 13)]
    for cell, count in zip(CELLS, (12, 5, 1), strict=True):
        add_modality(tmp_path, "sentinel1", [cell], starts[:count])
    rows = [
        [c.crs, c.col, c.row, starts[0], i, s, s]
        for c, n in zip(CELLS, (12, 5, 1), strict=True)
        for i, s in enumerate(starts[:n])
    ]
    write_rows(tmp_path, "sentinel1", rows)
    done = _convert(tmp_path)
    assert done.samples == 1
    assert "5 timesteps" in done.dropped[str(CELLS[1])]
    assert "--min_timesteps=5 would take it" in done.dropped[str(CELLS[1])]
    assert _convert(tmp_path, output_dir=tmp_path / "b", min_timesteps=5).samples == 2
    every = _convert(tmp_path, output_dir=tmp_path / "c", min_timesteps=1)
    assert every.samples == 3 and not every.dropped
    for number, count in enumerate((12, 5, 1)):
        with open_sample(every.folder / f"sample_{number}.h5", ["sentinel1"]) as sample:
            assert sample.header.timestamps[:, 1].tolist() == list(range(count))
            assert sample.header.masks["sentinel1"].tolist() == [True] * count


def test_long_series_keep_one_date_a_month_and_the_others_follow(tmp_path):
    days = (3, 14, 27)
    starts = [f"2021-{m:02d}-{d:02d}" for m in range(1, 7) for d in days]
    made = add_modality(tmp_path, "sentinel1", CELLS[:1], starts)
    weather = add_modality(tmp_path, "era5_10", CELLS[:1], starts)
    own = ["2021-01-14", "2021-02-03", "2021-03-14"]
    other = add_modality(tmp_path, "landsat", CELLS[:1], own)
    done = _convert(tmp_path, over="select", min_timesteps=1)
    assert done.samples == 1
    wanted = [3 * k + 1 for k in range(6)]
    (values,) = made[CELLS[0]]
    whole = values.reshape(18, 2, 64, 64)[wanted].repeat(4, 2).repeat(4, 3).transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(_stored(done, "sentinel1"), to_decibel(whole))
    (air,) = weather[CELLS[0]]
    np.testing.assert_array_equal(_stored(done, "era5_10"), air.reshape(18, 6)[wanted])
    fine = other[CELLS[0]][0]
    np.testing.assert_array_equal(_stored(done, "landsat")[0, 0, :, 0], fine[[0, 2], 0, 0])
    with open_sample(done.folder / "sample_0.h5", ["landsat", "sentinel1"]) as sample:
        header = sample.header
        assert header.timestamps.tolist() == [[14, m, 2021] for m in range(6)]
        assert header.masks["landsat"].tolist() == [True, False, True, False, False, False]
        assert header.masks["sentinel1"].all()
    left = {name: reason for _, name, reason in done.removed}
    assert left["sentinel1"] == "12 timesteps farther from the middle of their months"
    assert left["landsat"].startswith("1 timesteps on dates")
    refused = pytest.raises(ValueError, match="18 timesteps .sentinel1.*--over=select would keep")
    with refused:
        _convert(tmp_path, output_dir=tmp_path / "b")


def test_more_months_than_the_models_take_are_dropped(tmp_path):
    starts = [f"{y}-{m:02d}-15" for y in (2020, 2021) for m in range(1, 13)]
    add_modality(tmp_path, "sentinel1", CELLS[:1], starts)
    with pytest.raises(ValueError, match="has 24 calendar months .sentinel1., at most 12"):
        _convert(tmp_path, over="select")


def test_the_new_settings_leave_what_was_converted_before_alone(tmp_path):
    make_tree(tmp_path, tiles=1)
    plain, same = Settings(tmp_path, tmp_path), Settings(tmp_path, tmp_path, over="refuse")
    assert plain.digest() == same.digest() and not plain.changed()
    others = [
        Settings(tmp_path, tmp_path, min_timesteps=5),
        Settings(tmp_path, tmp_path, over="select"),
    ]
    assert len({s.digest() for s in [plain, *others]}) == 3
    assert "over" not in plain.record() and others[1].record()["over"] == "select"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"min_timesteps": 0}, "must lie in 1..12, got 0"),
        ({"min_timesteps": 13}, "must lie in 1..12, got 13"),
        ({"over": "drop"}, "over must be one of refuse, select, got 'drop'"),
        ({"over": "select", "keep_unmatched": True}, "cannot keep timesteps on dates"),
    ]
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            Settings(tmp_path, tmp_path, **bad)
