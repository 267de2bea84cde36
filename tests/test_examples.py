"""The notebooks of docs/examples, cell by cell."""

import json
from pathlib import Path

import pytest

from olmoearth_jax.inference import model as inference
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import official_model

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "examples"
NOTEBOOKS = sorted(p.name for p in FOLDER.glob("*.ipynb"))


def cells(name: str) -> list[str]:
    held = json.loads((FOLDER / name).read_text())["cells"]
    return ["".join(c["source"]) for c in held if c["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_without_output(name):
    held = json.loads((FOLDER / name).read_text())
    assert held["nbformat"] == 4 and len(held["cells"]) > 4
    for cell in held["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), name, "exec")
            assert max(map(len, "".join(cell["source"]).splitlines())) <= 100


@pytest.mark.slow
def test_embeddings(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    config = official_model("nano", "v1_2")
    loaded = checkpoints.Weights(config, latent_mim.initial_params(config), None, {}, ())
    checkpoints.write(loaded, tmp_path / "nano")
    monkeypatch.setattr(inference.weights, "find", lambda name, revision=None: tmp_path / "nano")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    scope: dict = {}
    for text in cells("embeddings.ipynb"):
        exec(compile(text, "embeddings.ipynb", "exec"), scope)
    assert scope["features"].shape == (48, 48, 128)
    assert float(scope["similarity"][20, 20]) == pytest.approx(1, abs=1e-5)
    assert len(scope["known"]) >= 2 and 0 <= scope["accuracy"] <= 1
    scope["plt"].close("all")


@pytest.mark.slow
def test_runs(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    scope: dict = {}
    for text in cells("runs.ipynb"):
        exec(compile(text, "runs.ipynb", "exec"), scope)
    assert scope["difference"] is None
    assert [len(r) for r in scope["runs"].values()] == [12, 12]
    assert scope["runs"]["whole"] != scope["runs"]["lr_4e-4"]
    scope["plt"].close("all")
