"""Colours of values, PNG files, and files of JSON lines."""

import json
import zlib

import numpy as np
import pytest

from olmoearth_jax import images, modalities, outputs
from olmoearth_jax.files import append_json, json_of_line, read_json_lines


@pytest.mark.parametrize("name", ["sentinel2_l2a", "landsat", "sentinel1", "naip_10", "worldcover"])
def test_values_become_colours(name):
    bands = modalities.get(name).bands
    values = np.random.default_rng(0).uniform(0, 9, (4, 5, 2, len(bands)))
    values[0, 0, 0] = modalities.MISSING
    got = images.stretched(name, values, 0.5)
    assert got.shape == (4, 5, 2, 3) and got.min() == 0 and got.max() == 1
    np.testing.assert_array_equal(got[0, 0, 0], 0.5)
    first = bands.index(images.RGB.get(name, bands)[0])
    order = np.argsort(values[1, 1:, :, first].ravel())
    assert (np.diff(got[1, 1:, :, 0].ravel()[order]) >= 0).all()
    if len(bands) < 3:
        np.testing.assert_array_equal(got[..., 0], got[..., 2])
    assert (images.stretched(name, np.full_like(values, modalities.MISSING), 0.9) == 0.9).all()


def test_a_png_is_known_by_its_mark(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(images.png(np.zeros((2, 2, 3), np.uint8)))
    outputs.check(path)
    path.write_bytes(path.read_bytes().replace(outputs.MARK.encode(), b"gimp"))
    with pytest.raises(ValueError, match="was not written by this program"):
        outputs.check(path)


def test_a_png_holds_the_pixels():
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    file = images.png(image)
    assert file.startswith(b"\x89PNG") and file.endswith(b"IEND\xaeB`\x82")
    at = file.index(b"IDAT")
    size = int.from_bytes(file[at - 4 : at], "big")
    lines = np.frombuffer(zlib.decompress(file[at + 4 : at + 4 + size]), np.uint8).reshape(3, 13)
    np.testing.assert_array_equal(lines[:, 1:].reshape(3, 4, 3), image)


def test_lines_of_json_survive_a_crash_at_any_byte(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    for number in range(3):
        append_json(path, {"n": number})
    whole = path.read_bytes()
    assert whole == b'{"n": 0}\n{"n": 1}\n{"n": 2}\n'
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        before = read_json_lines(path)
        assert before == [{"n": i} for i in range((cut + 1) // 9)]
        append_json(path, {"n": 9})
        assert read_json_lines(path) == [*before, {"n": 9}]
    assert json_of_line('{"n": ') is None and json_of_line(json.dumps([1])) == [1]
