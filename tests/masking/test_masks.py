"""Codes of tokens, and which samples are holes."""

import numpy as np
import pytest

from olmoearth_jax import modalities
from olmoearth_jax.masks import CODES, DECODE, MISSING_TOKEN, TARGET_ONLY, VISIBLE, living


def test_every_code_has_its_words():
    assert [CODES[c].name for c in (VISIBLE, TARGET_ONLY, DECODE, MISSING_TOKEN)] == [
        "encoded", "target_only", "decoded", "missing",
    ]  # fmt: skip
    assert all(0 <= part <= 255 for code in CODES for part in code.rgb)


def test_a_sample_lives_if_it_is_good_and_seen_in_every_view():
    first = {"a": np.array([[[0]], [[0]], [[2]], [[0]]]), "b": np.array([[3], [1], [0], [3]])}
    second = {"a": np.array([[[0]], [[2]], [[0]], [[0]]]), "b": np.array([[3], [1], [3], [0]])}
    ok = np.array([True, True, True, False])
    views = [view.values() for view in (first, second)]
    assert living(ok, views).tolist() == [True, False, True, False]
    assert ok.tolist() == [True, True, True, False]
    assert living(ok, []).tolist() == ok.tolist()


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("sentinel2_l2a", (3, 3, 5)),
        ("worldcover", (3, 3, 1)),
        ("era5_10", (5,)),
        ("latlon", ()),
    ],
)
def test_axes_of_every_kind(name, axes):
    assert modalities.get(name).axes(3, 5) == axes
    assert len({modalities.get(n).kind for n in modalities.names()}) == 4
