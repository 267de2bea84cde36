"""Archives whose metadata contradict each other or nature are refused with a sentence."""

import json
import shutil

import pytest

import olmoearth_jax
from olmoearth_jax.maps import embed_job
from tests.maps.test_archive_tool import build, run

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
VERBS = (
    ["export", "--bbox=11.99,46.99,12.01,47.01"], ["search", "--point=12.002,46.998"],
    ["cluster", "--k=3"],
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    out = tmp_path_factory.mktemp("good")
    build(out)
    return out


def spoilt(good, tmp_path, edit):
    """A copy whose consolidated metadata were edited; `edit` gets root attributes and members."""
    out = tmp_path / "a"
    shutil.copytree(good, out)
    path = out / "embeddings.zarr" / "zarr.json"
    held = json.loads(path.read_text())
    edit(held["attributes"], held["consolidated_metadata"]["metadata"])
    path.write_text(json.dumps(held))
    return out


def on_zones(key, value):
    """Sets an attribute of both zones."""

    def edit(_, members):
        for name in ("utm32", "utm33"):
            members[name]["attributes"][key] = value

    return edit


def on_arrays(key, value, *names):
    """Sets a member of arrays of both zones."""

    def edit(_, members):
        for name in ("utm32", "utm33"):
            for array in names:
                members[f"{name}/{array}"][key] = value

    return edit


def without(name):
    def edit(_, members):
        for zone in ("utm32", "utm33"):
            members.pop(f"{zone}/{name}")

    return edit


def other_years(_, members):
    members["utm33"]["attributes"]["olmoearth:periods"].reverse()


def zone_99(_, members):
    for name in list(members):
        if name.startswith("utm33"):
            members[f"utm99{name[5:]}"] = members.pop(name)


def two_bytes(_, members):
    """Values of two bytes, in an order that newer zarr wants to be told."""

    def ordered(codec):
        if codec["name"] == "bytes":
            codec["configuration"] = {"endian": "little"}
        for inner in codec.get("configuration", {}).get("codecs", []):
            ordered(inner)

    on_arrays("data_type", "int16", "embeddings")(_, members)
    for name in ("utm32", "utm33"):
        for codec in members[f"{name}/embeddings"]["codecs"]:
            ordered(codec)


TRANSFORM = "spatial:transform"
CASES = {
    "south": (on_zones("proj:code", "EPSG:32733"), "is in EPSG:32733; archives are read in EPSG"),
    "bottom up": (on_zones(TRANSFORM, [10.0, 0, 5e5, 0, 10.0, 5e6]), "damaged: its spatial:trans"),
    "rotated": (on_zones(TRANSFORM, [10.0, 1.0, 5e5, 0, -10.0, 5e6]), "damaged: its spatial:trans"),
    "short": (on_zones(TRANSFORM, [10.0]), "damaged: its spatial:transform"),
    "texts": (on_zones(TRANSFORM, ["a"] * 6), "damaged: its spatial:transform"),
    "gsd": (on_zones("geoemb:gsd", 20), "damaged: its geoemb:gsd are 20, but its tokens 10"),
    "huge": (on_arrays("shape", [2, 10**9, 10**9], "coverage"), "reach beyond the earth"),
    "no coverage": (without("coverage"), "holds no array 'coverage'"),
    "dtype": (on_arrays("data_type", "uint8", "embeddings"), "cannot be read as an archive"),
    "int16": (two_bytes, "embeddings is int16"),
    "bands": (lambda attrs, _: attrs.update({"geoemb:dimensions": 64}), "not int8 (2, 64, "),
    "text": (lambda attrs, _: attrs.update({"geoemb:dimensions": "8"}), "its geoemb:dimensions"),
    "widths": (lambda attrs, _: attrs.update({"geoemb:matryoshka_dims": "x"}), "matryoshka_dims"),
    "days": (on_zones("olmoearth:periods", [["2023-01-01"]]), "damaged: its olmoearth:periods"),
    "other years": (other_years, "utm32 and utm33 hold different periods"),
    "zone": (zone_99, "no UTM zone utm99"),
    "scale": (
        lambda attrs, _: attrs.update({"geoemb:quantization": {"method": "linear", "scale": {
            "scale": "x"}}}), "have no scale and offset",
    ),
    "scales": (
        lambda attrs, _: attrs.update({"geoemb:quantization": {"method": "per_pixel_scale"}}),
        "holds no array 'scales'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_metadata_that_lie(good, tmp_path, capsys, case):
    edit, said = CASES[case]
    folder = spoilt(good, tmp_path, edit)
    for verb, *flags in VERBS:
        out = tmp_path / ("like" if verb == "search" else f"{verb}.tif")
        assert run(verb, folder, "--year=2024", f"--output={out}", *flags) == 2
        assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_shard_too_large_to_hold(good, tmp_path):
    def edit(_, members):
        for name, held in members.items():
            if name.endswith("/coverage"):
                grid = held["chunk_grid"]["configuration"]
                grid["chunk_shape"] = [1, 1 << 18, 1 << 18]

    archive = olmoearth_jax.open_archive(spoilt(good, tmp_path, edit))
    with pytest.raises(ValueError, match="too many to hold"):
        archive.points([[12.002, 46.998]])


@pytest.mark.parametrize("line", ['{"id": "../x"}', "[]", "{}", "5", '{"id": 5}'])
def test_a_plan_that_is_none(good, tmp_path, line):
    folder = spoilt(good, tmp_path, lambda *_: None)
    (folder / "job" / "plan.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="plan.jsonl is damaged"):
        embed_job.read_plan(folder)


@pytest.mark.parametrize("objects", [[], {"../../../etc/hosts": [1, "a"]}, {"/a": [1, "a"]},
                                     {"a": 5}])  # fmt: skip
def test_markers_that_are_none(good, tmp_path, capsys, objects):
    folder = spoilt(good, tmp_path, lambda *_: None)
    path = next((folder / "job" / "done").rglob("*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "objects": objects}))
    assert run("verify", folder) == 1
    assert "its marker is damaged" in capsys.readouterr().out
