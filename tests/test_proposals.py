"""Proposals for mistyped names: slips are told, other things of similar letters are not."""

import pytest

from olmoearth_jax import modalities
from olmoearth_jax.configlib import tasks
from olmoearth_jax.interop import weights
from olmoearth_jax.proposals import closest, nearest

METRICS = sorted({m for names in tasks.METRICS.values() for m in names})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sentinel2", "sentinel2_l2a"),
        ("Sentinel-2", "sentinel2_l2a"),
        ("SENTINEL2-L2A", "sentinel2_l2a"),
        ("sentinal1", "sentinel1"),
        ("sentinel_1", "sentinel1"),
        ("landsat8", "landsat"),
        ("era5", "era5_10"),
        ("worldcovr", "worldcover"),
        ("openstreetmap", "openstreetmap_raster"),
        ("sentinel", None),
        ("sentinel3", None),
        ("sentinel11", None),
        ("sentinel2_l1c", None),
        ("dem", None),
        ("s2", None),
        ("", None),
    ],
)
def test_modalities(name, meant):
    assert nearest(name, modalities.names()) == meant


@pytest.mark.parametrize(
    ("name", "meant"),
    [("B2", "B02"), ("b11", "B11"), ("B1", "B01"), ("B8B", None), ("B10", None), ("B112", None)],
)
def test_bands(name, meant):
    assert nearest(name, modalities.get("sentinel2_l2a").bands) == meant
    assert nearest("B8A", modalities.get("landsat").bands) is None


def test_metrics_and_tasks():
    assert nearest("mIou", METRICS) == nearest("iou", METRICS) == "miou"
    assert nearest("f1_macro", METRICS) == "macro_f1"
    assert nearest("micro_f1", [m for m in METRICS if m != "micro_f1"]) is None
    assert nearest("rmse", [m for m in METRICS if m != "rmse"]) is None
    assert nearest("m_eurosta", tasks.catalogue()) == "m_eurosat"
    assert nearest("pastis_sentinel3", tasks.catalogue()) is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("OLMOEARTH_V1_NANO", "OlmoEarth-v1-Nano"),
        ("olmoearth-v1.3-base", "OlmoEarth-v1_3-Base"),
        ("OlmoEarth-v1_3", "OlmoEarth-v1_3-Base"),
        ("OlmoErth-v1-Tiny", "OlmoEarth-v1-Tiny"),
        ("OlmoEarth-v1-Small", None),  # there is one of v1.2 only
        ("OlmoEarth-v1_3-Large", None),
        ("OlmoEarth-v1_4-Base", None),
        ("OlmoEarth-Base", None),
        ("OlmoEarth-v1", None),
    ],
)
def test_models(name, meant):
    assert nearest(name, weights.PUBLISHED) == meant


def test_constants_of_other_packages_name_models():
    for name in weights.PUBLISHED:
        assert weights.published_name(name.upper().replace("-", "_")) == name
        assert weights.repository(name.replace("_", ".").lower()) == f"allenai/{name}"


def test_what_exists_elsewhere_is_never_taken_for_a_slip():
    bands = [modalities.get(n).bands for n in modalities.names()]
    for known in (modalities.names(), METRICS, weights.PUBLISHED, list(tasks.catalogue()), *bands):
        for name in known:
            others = [k for k in known if k != name]
            near = nearest(name, others)
            assert near is None or near.startswith(f"{name}_")


def test_text_lists_what_is_known():
    assert closest("randm", ["random", "space"]) == "did you mean 'random'? known: random, space"
    assert closest("xyz", ["random", "space"]) == "known: random, space"
