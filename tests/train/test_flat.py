"""Gradients as one vector and back."""

import jax.numpy as jnp
import numpy as np

from olmoearth_jax.train import flat


def test_a_tree_goes_through_a_vector_unchanged():
    rng = np.random.default_rng(0)
    shapes = {"a": {"kernel": (3, 2), "bias": (2,)}, "b": {"scale": (), "table": (4, 1, 2)}}
    tree = {
        name: {k: rng.standard_normal(s).astype(np.float32) for k, s in leaves.items()}
        for name, leaves in shapes.items()
    }
    vector = flat.ravel(tree)
    assert vector.shape == (17,) and vector.dtype == jnp.float32
    back = flat.unravel(vector, tree)
    assert back.keys() == tree.keys()
    for name, leaves in tree.items():
        assert back[name].keys() == leaves.keys()
        for key, leaf in leaves.items():
            np.testing.assert_array_equal(np.asarray(back[name][key]), leaf)
