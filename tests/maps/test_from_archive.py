"""From labels and an archive to a map."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet
import pytest
import rasterio
import shapely
from absl.testing import flagsaver

from launch import finetune, predict
from olmoearth_jax.data import work_list
from olmoearth_jax.inference import quantize
from olmoearth_jax.maps import (
    conventions,
    fine_tuning,
    from_archive,
    plan,
    predicting,
    store,
)
from olmoearth_jax.maps.archive_scenes import ArchiveOptions
from olmoearth_jax.maps.fine_tuning import ImageOptions, Options
from olmoearth_jax.maps.labelled import LabelOptions
from olmoearth_jax.maps.lattice import Lattice
from olmoearth_jax.maps.token_head import HeadOptions
from tests.maps import stores, world

NAMES, SIDE, TOKEN = ("field", "forest", "water"), 64, 20.0
YEARS = plan.periods_of(["2023", "2024"])


def quiet(_):
    pass


def kinds(year, shape):
    """Class of each token: stripes of 4, moved on by the year."""
    return (np.add.outer(np.arange(shape[0]) // 4, np.arange(shape[1]) // 4) + year) % 3


def make(path, around=0, **provenance):
    """An archive of 128 x 192 tokens of 20 m whose vectors say the class.

    `around`: shards that its arrays reach farther on all sides.
    """
    rule = quantize.rule_of("float32", None, "none")
    told = {"normalize": "none", "patch_size": 2, "pooling": "spatial", "model_digest": "abc",
            "job_digest": "d", **provenance}  # fmt: skip
    attrs = conventions.root_attributes(
        rule, 8, TOKEN, "urn:sha256:0", ["sentinel2_l2a"], "olmoearth-jax 0", (8, 4), told
    )
    form = store.Form(8, rule, YEARS, SIDE, 32, 4, attrs)
    lattice = Lattice(TOKEN, SIDE)
    first = lattice.shard_at(500_000, 5_600_000)
    corner = (at - around for at in first)
    grid = stores.Grid(33, lattice, *corner, 2 + 2 * around, 3 + 2 * around)
    store.make_store(path / store.NAME, form, {33: grid})
    writer, rng = store.Writer(path / store.NAME, form, {33: grid}), np.random.default_rng(0)
    units = []
    for year, period in enumerate(YEARS):
        whole = kinds(year, (2 * SIDE, 3 * SIDE))
        x = np.eye(8, dtype=np.float32)[whole] + rng.normal(0, 0.1, (*whole.shape, 8))
        for r in range(2):
            for c in range(3):
                here = np.s_[r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE]
                shard = plan.Shard(33, period.name, first[0] + r, first[1] + c)
                units.append(shard.id)
                coverage = np.full((SIDE, SIDE), 5, np.uint8)
                if (r, c) == (1, 2):
                    coverage[32:] = 0
                part = np.moveaxis(x[here], -1, 0).astype(np.float32)
                part[:, coverage == 0] = np.nan
                writer.write(shard, part, None, coverage)
    if around:
        (path / "job").mkdir()
        (path / "job" / "job.json").write_text('{"job_digest": "d"}')
        (path / "job" / "plan.jsonl").write_text("".join(f'{{"id": "{u}"}}\n' for u in units))
    return first[1] * SIDE * TOKEN, -first[0] * SIDE * TOKEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("archive")
    left, top = make(out / "a")
    rng, truth = np.random.default_rng(3), kinds(1, (2 * SIDE, 3 * SIDE))
    shapes, points, values = [], [], []
    for row, col in np.argwhere(rng.random((32, 48)) < 0.4):
        x, y = left + col * 80, top - row * 80
        shapes.append(shapely.box(x, y - 80, x + 80, y))
        points.append(shapely.Point(x + 33, y - 47))
        values.append(NAMES[truth[row * 4, col * 4]])
    world.write_labels(out / "fields.geojson", shapes, values)
    world.write_labels(out / "points.geojson", points, values)
    return out


def options(folder, output, source="fields.geojson", **change):
    base = Options(
        "", ArchiveOptions(str(folder / "a"), ["2024"]),
        LabelOptions(str(folder / source), "kind", block="1280"), str(folder / output),
        head=HeadOptions(30),
    )  # fmt: skip
    return dataclasses.replace(base, **change)


@pytest.fixture(scope="module")
def run(folder):
    return from_archive.run(options(folder, "run"), quiet)


def test_it_learns_from_tokens_and_maps_them(folder, run):
    assert run["splits"]["test"]["macro_f1"] > 0.99 and run["labels"]["on_nodata"] > 0
    o = predicting.Options(
        str(folder / "run"), ArchiveOptions(str(folder / "a"), ["2023", "2024"]),
        str(folder / "map"), block=64,
    )  # fmt: skip
    predicting.run(o, quiet)
    for year in (0, 1):
        with rasterio.open(folder / "map" / YEARS[year].name / "classes.tif") as file:
            got = file.read(1)
            assert file.crs == "EPSG:32633" and file.transform.a == TOKEN
        truth = kinds(year, got.shape) + 1
        assert (got[96:, 128:] == 255).all()
        valid = got != 255
        assert (got == truth)[valid].mean() > 0.99 and valid.sum() == got.size - 32 * 64
    table = pyarrow.parquet.read_table(folder / "run" / "predictions.parquet").to_pydict()
    with rasterio.open(folder / "map" / "2024" / "classes.tif") as file:
        xs, ys = rasterio.warp.transform("EPSG:4326", file.crs, table["lon"], table["lat"])
        found = [int(v[0]) for v in file.sample(zip(xs, ys, strict=True))]
    assert found == [NAMES.index(name) + 1 for name in table["predicted"]]


def test_arrays_of_a_whole_zone_give_the_map_of_what_was_planned(folder, run):
    make(folder / "wide", around=40)
    for name in ("wide", "a"):
        o = predicting.Options(
            str(folder / "run"), ArchiveOptions(str(folder / name), ["2024"]),
            str(folder / f"map_{name}"), block=64,
        )  # fmt: skip
        predicting.run(o, quiet)
    maps = [rasterio.open(folder / f"map_{name}" / "classes.tif") for name in ("wide", "a")]
    with maps[0] as got, maps[1] as there:
        np.testing.assert_array_equal(got.read(), there.read())
        assert got.transform == there.transform and got.crs == there.crs
    few = options(folder, "run_wide", images=ArchiveOptions(str(folder / "wide"), ["2024"]))
    assert from_archive.run(few, quiet)["splits"] == run["splits"]


def test_a_point_labels_the_token_that_holds_it(folder):
    report = from_archive.run(options(folder, "points", "points.geojson"), quiet)
    assert report["splits"]["test"]["macro_f1"] > 0.99
    again = from_archive.run(options(folder, "points", "points.geojson"), quiet)
    assert again == json.loads((folder / "points" / "report.json").read_text())


def test_archives_that_do_not_fit_the_run(folder, run):
    make(folder / "b", model_digest="xyz")
    o = predicting.Options(str(folder / "run"), ArchiveOptions(str(folder / "b")),
                           str(folder / "x"))  # fmt: skip
    with pytest.raises(ValueError, match="archive with model_digest abc, but this one has xyz"):
        predicting.run(o, quiet)
    o = dataclasses.replace(o, images=ArchiveOptions(str(folder / "a"), ["2022"]))
    with pytest.raises(ValueError, match="2022 is not in the archive; there are 2023, 2024"):
        predicting.run(o, quiet)
    (folder / "i.csv").write_text("path,date\nx.tif,2024\n")
    o = dataclasses.replace(o, images=ImageOptions(str(folder / "i.csv")))
    with pytest.raises(ValueError, match="trained on an archive, not on images: give --archive"):
        predicting.run(o, quiet)
    assert not (folder / "x").exists()
    o = options(folder, "y", images=ArchiveOptions(str(folder / "a")))
    with pytest.raises(ValueError, match="several periods .2023, 2024."):
        from_archive.run(o, quiet)
    with pytest.raises(ValueError, match="take --mode=probe"):
        from_archive.run(options(folder, "y", mode="full"), quiet)
    assert not (folder / "y").exists()
    assert fine_tuning.MODES == ("probe", "full")


def test_archives_made_otherwise_do_not_fit(folder, run):
    for name, given, said in (
        ("radar", {"modalities": ["sentinel1"]}, "with modalities None, but .* \\['sentinel1'\\]"),
        ("max", {"pooling_type": "max"}, "with pooling_type None, but this one has max"),
        ("light", {"searchlight": True}, "with searchlight None, but this one has True"),
    ):
        make(folder / name, **given)
        o = predicting.Options(str(folder / "run"), ArchiveOptions(str(folder / name)),
                               str(folder / "x"))  # fmt: skip
        with pytest.raises(ValueError, match=said):
            predicting.run(o, quiet)


def unfinished(path):
    """An archive with a job folder whose plan has one shard that nobody has made."""
    make(path)
    digest = work_list.open_job(path / "job" / "job.json", {"a": 1}, ["a"])
    units = ["utm33/2024/0_0", "utm33/2024/0_1"]
    (path / "job" / "plan.jsonl").write_text("".join(f'{{"id": "{u}"}}\n' for u in units))
    work = work_list.WorkList(path / "job", path / store.NAME, digest, units)
    work.finish(units[0], {"valid": 1}, [])
    return lambda: work.finish(units[1], {"valid": 1}, [])


@pytest.mark.parametrize("given", ["", store.NAME])
def test_an_unfinished_archive_is_named_and_another_when_it_is_finished(folder, run, given):
    path = folder / f"unfinished{given}"
    finish = unfinished(path)
    images = ArchiveOptions(str(path / given), ["2024"])
    lines, out = [], str(folder / f"map{path.name}")
    o = predicting.Options(str(folder / "run"), images, out)
    predicting.run(o, lines.append)
    assert "warning: 1 shards of the archive are missing; they are nodata here" in lines
    mine = options(folder, f"run{path.name}", images=images)
    assert any("1 shards of the archive" in n for n in from_archive.run(mine, quiet)["notes"])
    finish()
    for again in (lambda: predicting.run(o, quiet), lambda: from_archive.run(mine, quiet)):
        with pytest.raises(ValueError, match="another job.*missing_shards:? 1"):
            again()


def test_archives_without_a_digest_are_told_apart(folder, run):
    for name in ("other1", "other2"):
        make(folder / name, job_digest=None)
    o = predicting.Options(str(folder / "run"), ArchiveOptions(str(folder / "other1"), ["2024"]),
                           str(folder / "nameless"))  # fmt: skip
    predicting.run(o, quiet)
    o = dataclasses.replace(o, images=ArchiveOptions(str(folder / "other2"), ["2024"]))
    with pytest.raises(ValueError, match="holds another job"):
        predicting.run(o, quiet)


@pytest.mark.parametrize("program, given, said", [
    (finetune, ["--archive=a", "--patch_size=1"], "--patch_size does not go with --archive"),
    (finetune, ["--archive=a", "--s2_offset=0"], "--s2_offset does not go with --archive"),
    (finetune, ["--archive=a", "--model=m"], "--model does not go with --archive"),
    (finetune, ["--inputs=a", "--model=m", "--width=4"], "--width goes with --archive"),
    (finetune, ["--archive=a", "--year=2023", "--years=2024"], "--year or --years, one of them"),
    (predict, ["--archive=a", "--overlap=8"], "--overlap does not go with --archive"),
    (predict, ["--archive=a", "--inputs=b"], "--inputs does not go with --archive"),
    (predict, ["--archive=a", "--nocheck_units"], "--check_units does not go with --archive"),
])  # fmt: skip
def test_flags_without_a_meaning_are_refused(program, given, said):
    saved = flagsaver.save_flag_values(program.FLAGS)
    try:
        more = ["--labels=l"] if program is finetune else ["--run=r"]
        program.FLAGS(["x", "--output=o", *more, *given])
        with pytest.raises(ValueError, match=said):
            program.options()
    finally:
        flagsaver.restore_flag_values(saved, program.FLAGS)
