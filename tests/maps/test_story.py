"""From the packaged sample to a map, by the commands of the README alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio

from olmoearth_jax.data.sample import sample_labels, sample_places
from olmoearth_jax.interop import checkpoints
from tests.inference.test_model import weights_of
from tools import export_sample

ROOT = Path(__file__).resolve().parents[2]


def test_the_exported_sample(tmp_path):
    paths = export_sample.export(tmp_path / "sample")
    assert all(p.is_file() for p in paths)
    labels, places = sample_labels().labels, sample_places()
    with rasterio.open(tmp_path / "sample" / "labels.tif") as file:
        assert file.crs == "EPSG:32633" and file.shape == (768, 1536)
        got = file.read(1)
    row, col = places[30]
    np.testing.assert_array_equal(got[row : row + 128, col : col + 128], labels[30])
    features = json.loads((tmp_path / "sample" / "labels.geojson").read_text())
    assert "ODbL" in features["attribution"] and len(features["features"]) > 100
    lon, lat = np.array(features["features"][0]["geometry"]["coordinates"][0]).T
    assert (lon > 12.4).all() and (lon < 12.8).all() and (lat > 52.4).all() and (lat < 52.6).all()
    assert "Copernicus" in (tmp_path / "sample" / "NOTICE.md").read_text()
    export_sample.export(tmp_path / "sample")  # it is ours
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    with pytest.raises(ValueError, match="files of something else"):
        export_sample.export(tmp_path / "mine")
    with pytest.raises(ValueError, match="x is a file, so nothing can be written"):
        export_sample.export(tmp_path / "mine" / "x")


@pytest.mark.slow
def test_labels_to_a_map(tmp_path):
    checkpoints.write(weights_of(), tmp_path / "model")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(module, *given):
        command = (sys.executable, "-m", module, *given)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    def good(*given):
        code, out, err = run(*given)
        assert code == 0, err
        return out

    good("tools.export_sample", "--output=sample")
    train = (
        "launch.finetune", "--model=model", "--inputs=sample/imagery.csv", "--output=runs/landuse",
        "--labels=sample/labels.geojson", "--label_column=landuse",
    )  # fmt: skip
    assert "macro_f1 of the test split" in good(*train)
    assert "finished already" in good(*train)
    code, _, err = run(*train, "--seed=3")
    assert code == 2 and err.startswith("error: runs/landuse holds another job (")
    assert len(err.strip().splitlines()) == 1
    report = json.loads((tmp_path / "runs/landuse/report.json").read_text())
    assert report["splits"]["test"]["macro_f1"] > report["baselines"]["majority class"]["macro_f1"]
    out = good(
        "launch.predict", "--run=runs/landuse", "--inputs=sample/imagery.csv", "--output=maps/use"
    )
    assert "written: maps/use/classes.tif" in out
    with rasterio.open(tmp_path / "maps/use/classes.tif") as file:
        got = file.read(1)
        assert file.tags()["CLASS_1"] == "farm"
    assert set(np.unique(got)) <= {1, 2, 3, 4, 5, 6, 7, 8, 255}
    assert (got == 255).sum() == 256 * 256  # the tile that the sample lacks
    code, _, err = run("launch.predict", "--run=runs/landuse", "--inputs=sample/imagery.csv",
                       "--output=maps/b", "--shard=1")  # fmt: skip
    assert code == 2 and "--of" in err
