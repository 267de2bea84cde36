"""Labels that count more than others, by a column of their file."""

import json

import numpy as np
import pytest

from olmoearth_jax.maps import fine_tuning, labels, samples, token_head
from olmoearth_jax.maps.labels import Class
from olmoearth_jax.maps.samples import Target
from olmoearth_jax.maps.token_head import HeadOptions
from tests.maps import world
from tests.maps.test_finetune import options, quiet
from tests.maps.test_labels import CRS, GRID, SHAPE, _box, _features

CLASSES = Target([Class(1, "a", "#000000"), Class(2, "b", "#ffffff")])
VALUES = Target(None)


def test_a_pixel_takes_the_largest_weight_and_a_token_the_mean():
    boxes = [_box(0, 0, 4, 4), _box(2, 0, 6, 4)]
    for order in ([0, 1], [1, 0]):
        features = _features([boxes[i] for i in order], [1, 1])
        features.weights = [[2.0, 5.0][i] for i in order]
        got = labels.burn_cells(features, [1, 1], CRS, GRID, SHAPE)
        assert got.weights is not None
        row = got.weights[got.cells < SHAPE[1]]
        np.testing.assert_array_equal(row, [2, 2, 5, 5, 5, 5])
    x = np.full((4, 6), np.nan, np.float32)
    x[:4, :4] = 2
    x[:4, 3] = 6
    np.testing.assert_array_equal(samples.mean_of_tokens(x, 2), [[2, 4, 1], [2, 4, 1]])


def _separable(seed=0, count=300):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, count)
    x = rng.normal(0, 1, (count, 4)).astype(np.float32)
    x[:, 0] += 3 * y
    return x, y


@pytest.mark.parametrize("target", [CLASSES, VALUES])
def test_labels_of_no_weight_teach_nothing(target):
    x, y = _separable()
    valid, told = _separable(1), np.array(y)
    told[:150] = 1 - told[:150] if target is CLASSES else 40
    kind = np.int64 if target is CLASSES else np.float32
    splits = (x, told.astype(kind)), (valid[0], valid[1].astype(kind))
    weights = np.ones(300, np.float32)
    weights[:150] = 0
    o = HeadOptions(epochs=40)

    def error(**more):
        guess = token_head.fit(target, *splits, o, **more)(valid[0])
        guess = guess.argmax(-1) if target is CLASSES else guess[:, 0]
        return np.abs(guess - valid[1]).mean()

    assert 3 * error(weights=weights) < error()


def test_equal_weights_change_nothing():
    x, y = _separable()
    splits = (x, y), _separable(1)
    plain = token_head.fit(CLASSES, *splits, HeadOptions(epochs=3))
    weighted = token_head.fit(
        CLASSES, *splits, HeadOptions(epochs=3), weights=np.full(300, 7, np.float32)
    )
    np.testing.assert_allclose(plain(x), weighted(x), atol=1e-5)
    with pytest.raises(ValueError, match="training split have the weight 0"):
        token_head.fit(CLASSES, *splits, HeadOptions(), weights=np.zeros(300, np.float32))


@pytest.mark.parametrize("mode, epochs", [("probe", 5), ("full", 3)])
def test_the_column_is_used(tmp_path, mode, epochs):
    folder = world.build(tmp_path)
    held = json.loads((folder / "fields.geojson").read_text())
    reports = {}
    for name, weight in (("plain", None), ("equal", lambda i: 3), ("other", lambda i: 1 + i % 5)):
        for i, feature in enumerate(held["features"]):
            if weight is not None:
                feature["properties"]["weight"] = weight(i)
        (folder / f"{name}.geojson").write_text(json.dumps(held))
        head = HeadOptions(epochs=epochs)
        o = options(folder, folder / name, f"{name}.geojson", head=head, mode=mode)
        fine_tuning.run(o, quiet)
        log = (folder / name / "log.jsonl").read_text().splitlines()
        reports[name] = [json.loads(line)["loss"] for line in log if "loss" in line]
    assert reports["plain"] == pytest.approx(reports["equal"], rel=1e-5)
    assert reports["plain"] != pytest.approx(reports["other"], rel=1e-3)
