"""The first example of the page on published models, as written, on a converted folder."""

import re
from pathlib import Path

import pytest

import olmoearth_jax
from olmoearth_jax.inference import model as inference
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import official_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "published_models.md"


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code and len(code[1].strip().splitlines()) <= 15
    config = official_model("nano", "v1_2")
    loaded = checkpoints.Weights(config, latent_mim.initial_params(config), None, {}, ())
    checkpoints.write(loaded, tmp_path / "nano")
    monkeypatch.setattr(inference.weights, "find", lambda name, revision=None: tmp_path / "nano")
    scope = {}
    exec(code[1], scope)
    assert scope["vector"].shape == (1, 128) and scope["grid"].shape == (1, 16, 16, 128)
    assert scope["model"].version == "v1_2" and olmoearth_jax.Sample


@pytest.mark.parametrize(
    ("program", "page"), [("embed", "published_models.md"), ("convert_to_h5", "data.md")]
)
def test_every_flag_is_explained(program, page):
    root = PAGE.parents[1]
    source = (root / "tools" / f"{program}.py").read_text()
    names = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)
    text = (PAGE.parent / page).read_text()
    assert len(names) > 15
    assert [n for n in names if not re.search(rf"--(no)?{n}\b", text)] == []


def test_the_page_of_weights_lists_what_is_published():
    page = (PAGE.parent / "weights.md").read_text()
    rows = re.findall(r"^\| (OlmoEarth-\S+) \| ([\d,]+) \| ([\d,]*) ?\| (\d*) ?\|$", page, re.M)
    assert [row[0] for row in rows] == olmoearth_jax.list_models()
    spec = (PAGE.parent / "spec" / "model.md").read_text()
    for name, encoder, total, megabytes in rows:
        if total:
            _, version, size = name.split("-")
            counts = re.search(rf"^\| {version}-{size.lower()} \|(.*)\|$", spec, re.M)
            assert counts is not None and counts[1].split("|")[0].strip() == encoder
            assert counts[1].split("|")[5].strip() == total
            assert round(int(total.replace(",", "")) * 4e-6) == int(megabytes)


@pytest.mark.parametrize("page", ["weights.md", "published_models.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (PAGE.parent / page).read_text()):
        assert (PAGE.parent / target).exists(), target
