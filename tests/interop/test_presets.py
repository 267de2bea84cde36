"""Import and export are inverse for every preset."""

import math

import numpy as np
import pytest

from olmoearth_jax.interop import torch_keys
from olmoearth_jax.model.config import official_model

PRESETS = [
    ("v1", "nano"), ("v1", "tiny"), ("v1", "base"), ("v1", "large"),
    ("v1_1", "nano"), ("v1_1", "tiny"), ("v1_1", "base"),
    ("v1_2", "nano"), ("v1_2", "tiny"), ("v1_2", "small"), ("v1_2", "base"), ("v1_2", "large"),
    ("v1_2", "base_faster"),
]  # fmt: skip


def marked(version, size):
    large = size.startswith(("base", "large"))
    return pytest.param(version, size, marks=[pytest.mark.slow] if large else [])


@pytest.mark.parametrize(("version", "size"), [marked(*p) for p in PRESETS])
def test_import_export_import_is_the_identity(version, size):
    name, _, faster = size.partition("_")
    config = official_model(name, version, faster=bool(faster))
    months = torch_keys._tables(config)
    state, start = {}, 0
    for key, shape in torch_keys.state_dict_shapes(config).items():
        # Values differ within and between tensors; their bits survive float32 exactly.
        count = math.prod(shape)
        values = (np.arange(start, start + count) % 16_777_213).astype(np.float32)
        state[key] = months[key] if key in months else values.reshape(shape)
        start += count % 9973
    params, target, extras = torch_keys.from_state_dict(state, config)
    again = torch_keys.to_state_dict(params, config, target, extras)
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert np.array_equal(again[key], value), key
