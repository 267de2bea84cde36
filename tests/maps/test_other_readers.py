"""What other programs say of an archive that we wrote.

They need Python 3.12 and stand in an environment of their own, beside that of the tests:
`make env-maps`.
"""

import json
import shutil
import subprocess

import numpy as np
import pytest

import olmoearth_jax
from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.maps.lattice import LONLAT
from tests.maps import region
from tests.maps.other_python import python_with, run_in
from tests.maps.test_embed import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning"),
]

READ = """
import json, sys
import numpy as np, xarray, zarr, zarr_cm
from geotessera import GeoTesseraZarr

path, points, out = sys.argv[1:]
lonlat, found = np.load(points), {}
for name, group in zarr.open_group(path, mode="r").groups():
    zarr_cm.validate_all(dict(group.attrs))
    found[name] = sorted(zarr_cm.detect_revisions(dict(group.attrs)))
tessera = GeoTesseraZarr(path)
values = [tessera.sample_points(lonlat.tolist(), year=y, progress=False) for y in tessera.years]
np.save(out, np.stack(values, 1))
import rioxarray
data = xarray.open_zarr(path, group="utm32", mask_and_scale=False, decode_coords="all")
found |= {"years": list(tessera.years), "crs": data.rio.crs.to_epsg()}
found["transform"] = list(data.rio.transform())[:6]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """An archive of each of two quantizations."""
    folder = tmp_path_factory.mktemp("others")
    given, out = region.build(folder), {}
    for kind, norm in (("per_pixel_scale", "none"), ("signed_power", "l2")):
        out[kind] = folder / kind
        flags = [f"--quantization={kind}", f"--normalize={norm}", f"--output={out[kind]}"]
        assert run(*given, *flags) == 0
    return out


@pytest.mark.parametrize("kind", ["per_pixel_scale", "signed_power"])
def test_the_validator_of_geozarr_accepts_the_groups_of_zones(archives, kind, tmp_path):
    python = python_with("geozarr_toolkit")
    zones = sorted((archives[kind] / "embeddings.zarr").glob("utm*"))
    assert zones
    for zone in zones:
        done = subprocess.run(
            [python.parent / "geozarr", "validate", zone], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "spatial" in done.stdout and "proj" in done.stdout
    spoilt = tmp_path / "utm32"
    shutil.copytree(zones[0], spoilt)
    text = (spoilt / "zarr.json").read_text()
    (spoilt / "zarr.json").write_text(text.replace("spatial:dimensions", "spatial:names"))
    done = subprocess.run([python.parent / "geozarr", "validate", spoilt], capture_output=True)
    assert done.returncode != 0, "the validator passes anything"


def test_geotessera_zarr_cm_and_rioxarray_read_it(archives, tmp_path):
    out = archives["per_pixel_scale"]
    python = python_with("geotessera")
    own = olmoearth_jax.open_archive(out)
    zone, rng = own.zone(32), np.random.default_rng(0)
    rows, cols = (rng.integers(0, n, 300) + 0.5 for n in zone.shape)
    a, b, c, d, e, f = zone.transform
    lonlat = np.stack(
        transform_points(zone.crs, LONLAT, a * cols + b * rows + c, d * cols + e * rows + f), 1
    )
    np.save(tmp_path / "points.npy", lonlat)
    told = json.loads(
        run_in(python, READ, out / "embeddings.zarr", tmp_path / "points.npy", tmp_path / "x.npy")
    )
    assert told["utm32"] == ["proj", "spatial"] and told["years"] == own.periods
    assert told["crs"] == 32632
    np.testing.assert_allclose(told["transform"], zone.transform)
    values, valid = own.points(lonlat)
    theirs = np.load(tmp_path / "x.npy")
    assert 50 < valid.sum() < valid.size
    # It looks into the neighbouring pixel where there is none: compare where there is one.
    np.testing.assert_array_equal(theirs[valid], values[valid])
