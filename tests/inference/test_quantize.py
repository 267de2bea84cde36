"""Rules of stored values."""

import numpy as np
import pytest

from olmoearth_jax.inference import quantize

EVERY = [
    quantize.rule_of("int8", "signed_power", None),
    quantize.rule_of("int8", "per_pixel_scale", None),
    quantize.rule_of("int8", "linear", None, 0.02, 0.1),
    quantize.rule_of("float16", None, None),
    quantize.rule_of("float32", None, "none"),
]


def _vectors() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(5, 6, 16)).astype(np.float32)
    valid = draw.random((5, 6)) > 0.3
    x[~valid] = np.nan
    return x, valid


@pytest.mark.parametrize("rule", EVERY, ids=lambda r: r.method or r.dtype)
def test_nodata_is_nodata_in_every_band_and_nothing_else_is(rule):
    x, valid = _vectors()
    q, scales, _ = quantize.quantize(x, valid, rule)
    gone = np.isnan(q) if rule.dtype != "int8" else q == quantize.NO_VALUE
    assert (gone == ~valid[..., None]).all()
    if scales is not None:
        assert (np.isposinf(scales) == ~valid).all()
    back = quantize.restore(q, rule, scales)
    assert (np.isnan(back) == ~valid[..., None]).all()
    want = quantize.unit(x[valid]) if rule.normalize == "l2" else x[valid]
    if rule.method != "linear":
        assert np.abs(back[valid] - want).max() < 0.02


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", EVERY, ids=lambda r: r.method or r.dtype)
def test_values_that_are_not_finite_are_refused(rule, bad):
    x, valid = _vectors()
    x[tuple(np.argwhere(valid)[0])][3] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize.quantize(x, valid, rule)


def test_clipped_vectors_are_counted():
    x = np.array([[0.5, 0.2], [9.0, 9.0], [9.0, 0.0]], np.float32)
    rule = quantize.rule_of("int8", "linear", None, 0.01)
    assert quantize.quantize(x, np.array([True, True, False]), rule)[2] == 1
    with pytest.raises(ValueError, match="float16 cannot hold"):
        big = np.full((1, 2), 1e6, np.float32)
        quantize.quantize(big, np.ones(1, bool), quantize.rule_of("float16", None, "none"))


def test_vectors_of_no_length_and_of_tiny_values():
    x = np.array([[0, 0], [1e-40, 0], [1e-45, 1e-45]], np.float32)
    for rule in EVERY[:3]:
        q, scales, _ = quantize.quantize(x, np.ones(3, bool), rule)
        assert (q != quantize.NO_VALUE).all()
        assert np.isfinite(quantize.restore(q, rule, scales)).all()


@pytest.mark.parametrize("given, said", [
    (("bfloat16", None, None), "float16"),
    (("int4", None, None), "unknown dtype"),
    (("int8", "power", None), "unknown quantization"),
    (("float32", "linear", None), "goes with --dtype=int8"),
    (("int8", "signed_power", "none"), "--quantization=per_pixel_scale with --normalize=none"),
    (("int8", "per_pixel_scale", "l2"), "--quantization=signed_power with --normalize=l2"),
    (("int8", "linear", None), "--scale"),
    (("int8", "linear", None, 0.0), "--scale"),
    (("int8", "signed_power", None, 0.1), "--quantization=linear"),
])  # fmt: skip
def test_choices_that_do_not_fit_name_the_pair(given, said):
    with pytest.raises(ValueError, match=said):
        quantize.rule_of(*given)


def test_defaults():
    def chosen(*given, **kw):
        rule = quantize.rule_of(*given, **kw)
        return rule.method, rule.normalize

    assert chosen("int8", None, None) == ("signed_power", "l2")
    assert chosen("int8", None, None, short=False) == ("per_pixel_scale", "none")
    assert chosen("int8", None, "none") == ("per_pixel_scale", "none")
    assert chosen("int8", None, "l2", short=False) == ("signed_power", "l2")
    assert chosen("float32", None, None, short=False) == ("", "none")
