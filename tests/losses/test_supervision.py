"""Maps drawn from the location grid: records, resize, missing pixels, class tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax import modalities, supervision_maps
from olmoearth_jax.losses import supervision
from olmoearth_jax.losses.rows import Groups
from olmoearth_jax.modalities import MISSING
from olmoearth_jax.supervision_maps import MapTask, task_of

SIX = supervision_maps.names()[:6]


def head(rng, channels, width=5, unfold=4):
    n = channels * unfold * unfold
    kernel, bias = rng.normal(size=(width, n)), rng.normal(size=n)
    return jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32)


def plain(grid, kernel, bias, unfold, size):
    """The map, written as the text says: unfold, then resize every pixel from its neighbours."""
    b, h, w, _ = grid.shape
    y = np.asarray(grid) @ np.asarray(kernel) + np.asarray(bias)
    y = y.reshape(b, h, w, -1, unfold, unfold).transpose(0, 1, 4, 2, 5, 3)
    y = y.reshape(b, h * unfold, w * unfold, -1)
    out = np.zeros((b, *size, y.shape[-1]))
    axes = []
    for n, to in zip(y.shape[1:3], size, strict=True):
        x = np.maximum((np.arange(to) + 0.5) * n / to - 0.5, 0)
        i = np.minimum(np.floor(x).astype(int), n - 1)
        axes.append([(i, 1 - (x - i)), (np.minimum(i + 1, n - 1), x - i)])
    for rows, row_weight in axes[0]:
        for cols, col_weight in axes[1]:
            weight = row_weight[:, None] * col_weight
            out += y[:, rows][:, :, cols] * weight[None, :, :, None]
    return out[:, :, :, None]


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (2, 3), (6, 9), (5, 9), (16, 24), (2, 9)])
def test_a_map_has_the_size_of_its_target(size):
    rng = np.random.default_rng(0)
    grid = jnp.asarray(rng.normal(size=(2, 2, 3, 5)), jnp.float32)
    kernel, bias = head(rng, 3)
    got = supervision.draw_map(grid, kernel, bias, 4, size)
    np.testing.assert_allclose(got, plain(grid, kernel, bias, 4, size), rtol=1e-5, atol=1e-5)


def test_a_constant_stays_constant_under_any_resize():
    grid = jnp.ones((1, 2, 2, 1))
    for size in ((2, 2), (6, 6), (8, 8), (10, 14)):
        got = supervision.draw_map(grid, jnp.ones((1, 16)), jnp.full(16, 2.0), 4, size)
        np.testing.assert_allclose(got, 3.0, rtol=1e-6)


def test_a_modality_without_pixels_reads_the_mean_of_the_grid():
    grid = jnp.arange(8.0).reshape(1, 2, 2, 2)
    got = supervision.draw_vector(grid, jnp.eye(2), jnp.zeros(2))
    np.testing.assert_allclose(got, [[3.0, 4.0]])


def target_of(task, rng, shape=(3, 4, 4)):
    bands = modalities.get(task.name).num_bands
    if task.task_type == "classification":
        x = rng.choice(task.known_values, (*shape, 1, 1))
    elif task.task_type == "binary_classification":
        x = rng.integers(0, 2, (*shape, 1, bands))
    else:
        x = rng.random((*shape, 1, bands))
    return x.astype(np.float32)


def drawn_for(task, rng, shape=(3, 4, 4)):
    return jnp.asarray(rng.normal(size=(*shape, 1, task.channels)), jnp.float32)


def value_and_grad(task, drawn, target, groups=None):
    def loss(drawn):
        judge = supervision.Supervision((task,))
        return judge({task.name: drawn}, {task.name: jnp.asarray(target)}, groups)[0].sum()

    return jax.value_and_grad(loss)(drawn)


@pytest.mark.parametrize("name", SIX)
def test_missing_pixels_have_no_effect(name):
    rng, task = np.random.default_rng(1), task_of(name)
    target, drawn = target_of(task, rng), drawn_for(task, rng)
    gone = rng.random(target.shape[:-1]) < 0.4
    holes = np.where(gone[..., None], np.float32(MISSING), target)
    if holes.shape[-1] > 1:  # a pixel with one missing band is missing
        holes[..., 1:] = target[..., 1:]
    value, grad = value_and_grad(task, drawn, holes)
    other = jnp.where(gone[..., None], 100.0, drawn)
    again, _ = value_and_grad(task, other, holes)
    assert value == again and not np.any(np.where(gone[..., None], grad, 0))
    more = np.concatenate([holes, np.full_like(holes, MISSING)])
    wider, _ = value_and_grad(task, jnp.concatenate([drawn, drawn * 7]), more)
    np.testing.assert_allclose(wider, value, rtol=1e-6)


@pytest.mark.parametrize("name", SIX)
def test_nothing_valid_gives_zero(name):
    rng, task = np.random.default_rng(2), task_of(name)
    drawn, target = drawn_for(task, rng), target_of(task, rng)
    value, grad = value_and_grad(task, drawn, np.full_like(target, MISSING))
    assert value == 0 and not np.any(grad)
    total, metrics = supervision.Supervision((task,))({name: drawn}, {})
    assert total == 0 and metrics[f"supervision/{name}"] == 0
    holes = Groups(jnp.zeros(3, jnp.int32), jnp.zeros(3))
    value, grad = value_and_grad(task, drawn, target, holes)
    assert value == 0 and not np.any(grad)


@pytest.mark.parametrize("name", ["worldcover", "openstreetmap_raster", "srtm"])
def test_groups_are_judged_apart(name):
    rng, task = np.random.default_rng(3), task_of(name)
    drawn, target = drawn_for(task, rng), target_of(task, rng)
    judge = supervision.Supervision((task,))
    groups = Groups(jnp.asarray([0, 1, 1]), jnp.ones(3), 2)
    got, _ = judge({name: drawn}, {name: jnp.asarray(target)}, groups)
    for group, mine in enumerate((slice(0, 1), slice(1, 3))):
        alone, _ = judge({name: drawn[mine]}, {name: jnp.asarray(target[mine])})
        np.testing.assert_allclose(got[group], alone[0], rtol=1e-5)


def test_channels_may_be_permuted():
    rng, task = np.random.default_rng(4), task_of("openstreetmap_raster")
    drawn, target = drawn_for(task, rng), target_of(task, rng)
    order = rng.permutation(task.channels)
    value, _ = value_and_grad(task, drawn, target)
    again, _ = value_and_grad(task, drawn[..., order], target[..., order])
    np.testing.assert_allclose(again, value, rtol=1e-6)


def test_worldcover_is_shifted_by_default_and_right_on_request():
    codes = [10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100]
    values = jnp.asarray(supervision_maps.data_values("worldcover", codes), jnp.float32)
    by_default = supervision.class_index(values, task_of("worldcover").class_values)
    assert by_default.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10]
    fixed = supervision.class_index(values, task_of("worldcover", 1.0, True).class_values)
    assert fixed.tolist() == list(range(11))


def test_codes_off_the_table_are_counted_and_left_out_on_request():
    rng = np.random.default_rng(5)
    codes = np.asarray([[0, 1], [88, 250]])  # 0 is the background, no class
    target = np.asarray(supervision_maps.data_values("cdl", codes.ravel()), np.float32)
    target = target.reshape(1, 2, 2, 1, 1)
    default, fixed = task_of("cdl"), task_of("cdl", 1.0, True)
    drawn = drawn_for(default, rng, (1, 2, 2))
    _, grad = value_and_grad(default, drawn, target)
    assert np.any(grad[0, 0, 0])
    _, grad = value_and_grad(fixed, drawn, target)
    assert not np.any(grad[0, 0, 0]) and np.any(grad[0, 0, 1])
    for task in (default, fixed):
        _, metrics = supervision.Supervision((task,))({"cdl": drawn}, {"cdl": jnp.asarray(target)})
        assert metrics["supervision/cdl_off_table"] == 0.25


def test_a_new_map_is_a_record(monkeypatch):
    for store in ("_REGISTRY", "_USER_RECORDS"):
        monkeypatch.setattr(modalities, store, dict(getattr(modalities, store)))
    for order in ("_SAMPLE_ORDER", "_MASKED_ORDER", "_REGISTRY_ORDER"):
        monkeypatch.setattr(modalities, order, list(getattr(modalities, order)))
    record = {
        "bands": ["kind"],
        "band_sets": [{"bands": ["kind"], "resolution_factor": 16}],
        "tile_resolution_factor": 16,
        "image_tile_size_factor": 1,
        "multitemporal": False,
        "normalization": {"predefined": {"min": [0], "max": [50]}},
        "supervision": {"task_type": "classification", "codes": [3, [7, 9]], "weight": 0.5},
    }
    modalities.register("soil", record)
    task = task_of("soil", base_weight=2.0)
    assert task.channels == 4 and task.weight == 1.0
    np.testing.assert_allclose(task.class_values, [0.06, 0.14, 0.16, 0.18], rtol=1e-6)
    assert "soil" in supervision_maps.names()


BAD_RECORDS = {
    "an object": [1],
    "task_type": {"weight": 1},
    "unknown member 'wieght'; did you mean 'weight'": {"task_type": "regression", "wieght": 1},
    "needs codes": {"task_type": "classification"},
    "whole numbers": {"task_type": "classification", "codes": [[5, 2]]},
    "twice": {"task_type": "classification", "codes": [1, [1, 2]]},
    "scale": {"task_type": "classification", "codes": [1], "scale": 0},
}


@pytest.mark.parametrize("text", BAD_RECORDS)
def test_malformed_records_say_what_is_wrong(text, monkeypatch):
    record = BAD_RECORDS[text]
    monkeypatch.setattr(modalities, "user_records", lambda: {"ndvi": {"supervision": record}})
    with pytest.raises(ValueError, match="ndvi") as e:
        supervision_maps.task_of("ndvi")
    assert text.split(";")[0] in str(e.value)


def test_tasks_that_do_not_fit_their_map_are_refused():
    with pytest.raises(ValueError, match="no record"):
        task_of("sentinel2_l2a")
    with pytest.raises(ValueError, match="num_output_channels is 3, but class_values has 2"):
        MapTask("cdl", "classification", 3, class_values=(0.1, 0.2))
    with pytest.raises(ValueError, match="its 30 bands, got 3"):
        MapTask("openstreetmap_raster", "binary_classification", 3)
    with pytest.raises(ValueError, match="one band, this one has 8"):
        MapTask("worldcereal", "classification", 1, class_values=(0.1,))
    with pytest.raises(ValueError, match="unknown task_type"):
        MapTask("cdl", "classify", 1)
    with pytest.raises(ValueError, match="unknown regression_loss_type"):
        MapTask("srtm", "regression", 1, regression_loss_type="l2")
