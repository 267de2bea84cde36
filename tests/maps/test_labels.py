"""Labels on a grid: what the vectors do not show."""

import subprocess
import sys

import numpy as np
import pytest
import shapely
from rasterio.transform import Affine

from olmoearth_jax.maps import labels
from olmoearth_jax.maps.label_files import Features
from tools.goldens.maps_labels import burn

CRS, GRID, SHAPE = "EPSG:32633", Affine(10, 0, 500_000, 0, -10, 5_600_000), (20, 30)


def _features(shapes, values):
    ids = [f"f{i}" for i in range(len(values))]
    return Features(list(shapes), CRS, list(values), {"id": ids})


def _burn(shapes, values, nodata=255, **more):
    return burn(_features(shapes, values), values, CRS, GRID, SHAPE, nodata, **more)


def _box(left, top, right, bottom):
    """Pixels left..right, top..bottom of the grid."""
    return shapely.box(500_000 + 10 * left, 5_600_000 - 10 * bottom, 500_000 + 10 * right,
                       5_600_000 - 10 * top)  # fmt: skip


def test_values_contradict_beyond_a_millionth():
    boxes = [_box(0, 0, 4, 4), _box(2, 0, 6, 4), _box(10, 0, 12, 2), _box(11, 0, 13, 2)]
    got = _burn(boxes, [1.0, 1.0000005, 2.0, 2.1], nodata=None)
    assert got.labels.dtype == np.float32
    assert got.report["conflict_pixels"] == 2 and np.isnan(got.labels[0, 11])
    assert got.labels[0, 3] == np.float32(1.0) and got.labels[0, 10] == 2


def test_a_bow_tie_is_repaired_and_counted():
    points = [(500_000, 5_600_000), (500_100, 5_599_900), (500_100, 5_600_000),
              (500_000, 5_599_900)]  # fmt: skip
    got = _burn([shapely.Polygon(points)], [1])
    assert got.report["repaired"] == 1 and 40 <= got.report["labelled_pixels"] <= 60


def test_sixteen_bits():
    classes = labels.classes_of([300, 7, 300])
    assert [(c.value, c.name) for c in classes] == [(7, "7"), (300, "300")]
    assert labels.nodata_of(classes) == 65535
    got = _burn([_box(0, 0, 2, 2)], [300], nodata=65535)
    assert got.labels.dtype == np.uint16 and (got.labels == 300).sum() == 4
    assert labels.nodata_of(labels.classes_of([254])) == 255
    assert labels.nodata_of(labels.classes_of([255])) == 65535
    with pytest.raises(ValueError, match="0 to 65534, got -1 to 2"):
        labels.classes_of([-1, 2])


def test_names_and_their_order():
    got = labels.classes_of(["b", "a"], ["b", "a"])
    assert [(c.value, c.name) for c in got] == [(1, "b"), (2, "a")]
    assert [c.value for c in labels.classes_of([5, 3], ["5", "3"])] == [5, 3]
    for wanted in (["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="--classes names a.*the labels hold a, b"):
            labels.classes_of(["b", "a"], wanted)


def test_colors(tmp_path):
    (tmp_path / "c.json").write_text('{"a": "#010203"}')
    (tmp_path / "c.csv").write_text("class,color\na,#010203\n")
    for name in ("c.json", "c.csv"):
        colors = labels.read_colors(tmp_path / name)
        got = labels.classes_of(["a", "b"], None, colors)
        assert [c.color for c in got] == ["#010203", labels.COLORS[1]]
    with pytest.raises(ValueError, match="'red'"):
        labels.classes_of(["a"], None, {"a": "red"})
    with pytest.raises(ValueError, match="--class_colors has Water, but the classes are a"):
        labels.classes_of(["a"], None, {"Water": "#010203"})
    for text in ("a,red\n", "class,color\na,blue\n"):
        (tmp_path / "c.csv").write_text(text)
        with pytest.raises(ValueError, match="the colour of 'a' must be like"):
            labels.classes_of(["a"], None, labels.read_colors(tmp_path / "c.csv"))
    (tmp_path / "c.csv").write_text("class;color\na;#010203\n")
    with pytest.raises(ValueError, match="the line 'class;color' of .* is not of the form"):
        labels.read_colors(tmp_path / "c.csv")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match="it is no object such as"):
        labels.read_colors(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[")
    with pytest.raises(ValueError, match="cannot be read"):
        labels.read_colors(tmp_path / "c.json")


def test_tokens_of_values_and_of_odd_sides():
    x = np.full((5, 4), np.nan, np.float32)
    x[0, :2] = 1, 3
    x[2, 0] = 9
    got = labels.to_tokens(x, 2, None)
    assert got.shape == (2, 2) and got[0, 0] == 2 and np.isnan(got[1, 0])


def test_three_classes_may_tie():
    x = np.array([[1, 1, 2, 2], [3, 3, 2, 1]], np.uint8)
    assert labels.to_tokens(x, 2).tolist() == [[255, 2]]


def test_nothing_heavy_is_imported():
    code = (
        "import sys, olmoearth_jax, olmoearth_jax.maps.labels, olmoearth_jax.maps.split;"
        "print([m for m in ('ray', 'zarr', 'xarray', 'rasterio', 'shapely', 'matplotlib')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
