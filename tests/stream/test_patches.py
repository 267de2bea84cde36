"""Patch buffers: NumPy on the host and compiled programs on a device write the same."""

from unittest import mock

import jax
import numpy as np
import pytest

from olmoearth_jax.modalities import MISSING
from olmoearth_jax.stream import patches
from olmoearth_jax.stream.loss_terms import own_pixels
from olmoearth_jax.stream.pack import pack_device
from olmoearth_jax.stream.patches import (
    embedded_patches,
    fill_buffers,
    fill_on_device,
)
from olmoearth_jax.stream.patches import fill_on_host as host
from olmoearth_jax.stream.token_counts import count_tokens
from tests.stream.builders import NAMES, make_group, make_spec, small_model


@pytest.mark.parametrize("cut", [embedded_patches, own_pixels])
@pytest.mark.parametrize(("grid", "patch_size"), [(3, 1), (2, 3), (1, 4)])
def test_host_and_device_fill_alike(cut, grid, patch_size):
    rng = np.random.default_rng(grid)
    names = (*NAMES, "latlon")
    group, strategy = make_group(rng, 6, grid, patch_size, names=names, holes=(1,))
    spec = make_spec(small_model(names), strategy, samples=6)
    counts = count_tokens(group, spec)
    runs = pack_device(spec, spec.top_rung(), [counts], [np.array([0, 1, 2, 4, 5])]).runs
    on_host = host(spec, runs, cut)
    device = fill_on_device(spec, runs, jax.devices()[0], cut)
    starts = counts.table.starts
    for i, slot in enumerate(spec.slots):
        # Behind the last patch the device repeats one, where the host leaves zeros.
        used = int(counts.need[runs[0].members, starts[i] : starts[i + 1]].sum())
        a, b = on_host[i], np.asarray(device[i][0])
        assert a.shape == b.shape == (len(a), slot.width)
        np.testing.assert_allclose(a[:used], b[:used], atol=2e-6)
        assert not a[used:].any() and a[:used].any(axis=1).all()
        if cut is own_pixels and slot.modality != "latlon" and patch_size < 4:
            assert (a[:used] == MISSING).any(axis=1).all()


def test_buffers_of_a_cpu_are_used_where_they_are():
    rng = np.random.default_rng(0)
    group, strategy = make_group(rng, 4, 2, 2)
    spec = make_spec(small_model(), strategy, samples=4)
    runs = pack_device(spec, spec.top_rung(), [count_tokens(group, spec)], [np.arange(4)]).runs
    device = jax.devices("cpu")[0]
    made = []
    with mock.patch.object(patches, "fill_on_host", lambda *a: made.extend(host(*a)) or made):
        filled = fill_buffers(spec, runs, device)
    assert [f.shape for f in filled] == [(1, *m.shape) for m in made]
    assert [f.unsafe_buffer_pointer() for f in filled] == [m.ctypes.data for m in made]
    for f, again in zip(filled, host(spec, runs, embedded_patches), strict=True):
        np.testing.assert_array_equal(f[0], again)
