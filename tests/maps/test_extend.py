"""Archives that grow by later periods."""

import contextlib
import json

import numpy as np
import pytest

import olmoearth_jax
from olmoearth_jax.maps import embed_job, store
from tests.maps import region
from tests.maps.test_embed import objects, run

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Arguments, and the archives of the first year alone and of both made at once."""
    folder = tmp_path_factory.mktemp("region")
    given = [a for a in region.build(folder) if not a.startswith("--years")]
    rows = json.loads((folder / "imagery.json").read_text())
    # The same rasters in both years, so that the arrays span the same ground.
    rows = [r for r in rows if r["path"] != "b_2023_5.tif"]
    (folder / "imagery.json").write_text(json.dumps(rows))
    assert run(*given, "--years=2023,2024", f"--output={folder / 'both'}") == 0
    return folder, given


@pytest.fixture
def first(world, tmp_path):
    folder, given = world
    assert run(*given, "--years=2023", f"--output={tmp_path / 'out'}") == 0
    return tmp_path / "out", [*given, f"--output={tmp_path / 'out'}"]


def test_a_later_year_makes_the_archive_of_both(world, first, capsys):
    out, given = first
    before = objects(out)
    assert run(*given, "--years=2023,2024") == 2
    assert "holds another job" in capsys.readouterr().err
    assert run(*given, "--years=2023,2024", "--extend") == 0
    assert "complete" in capsys.readouterr().out
    got, want = objects(out), objects(world[0] / "both")
    assert got == want
    assert all(got[k] == v for k, v in before.items() if "/c/0/" in k and "/time/" not in k)
    archive = olmoearth_jax.open_archive(out)
    assert archive.periods == [2023, 2024]
    assert archive.dataset(32)["time"].values.tolist() == [2023, 2024]
    held = json.loads((out / "job" / "job.json").read_text())
    assert len(held["extends"]) == 1
    report = json.loads((out / "job" / "report.json").read_text())
    assert report["done"] == report["shards"] == len(embed_job.read_plan(out).units)
    # Again does nothing, with the flag and without.
    for more in (["--extend"], []):
        assert run(*given, "--years=2023,2024", *more) == 0
    assert objects(out) == want


def test_shards_that_were_done_are_not_done_again(first):
    out, given = first
    marks = {p: p.read_bytes() for p in (out / "job" / "done").rglob("*.json")}
    assert run(*given, "--years=2023,2024", "--extend") == 0
    assert all(p.read_bytes() == text for p, text in marks.items())


def test_a_kill_on_the_way_is_made_good(world, first, monkeypatch):
    """The old archive can be read at any moment, and the same command ends the work."""
    out, given = first
    x, _ = olmoearth_jax.open_archive(out).points([[9.02, 50.55]], periods=[2023])
    whole, left = store.os.replace, [0]

    class Killed(BaseException):
        pass

    def replace(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        whole(source, target)

    for stop in (0, 3, 8, 15, 18):
        monkeypatch.setattr(store.os, "replace", replace)
        left[0] = stop
        with contextlib.suppress(Killed):
            run(*given, "--years=2023,2024", "--extend")
        monkeypatch.undo()
        again, _ = olmoearth_jax.open_archive(out).points([[9.02, 50.55]], periods=[2023])
        np.testing.assert_array_equal(again, x)
    assert run(*given, "--years=2023,2024", "--extend") == 0
    assert objects(out) == objects(world[0] / "both")


def test_what_does_not_grow(world, first, tmp_path, capsys):
    out, given = first
    before = objects(out)

    def refused(said, *more):
        assert run(*given, *more, "--extend") == 2
        told = capsys.readouterr().err
        assert said in told and objects(out) == before, told

    refused("--extend appends later periods: name those that are there (2023)", "--years=2024")
    refused("tile: 48 there, 40 here", "--years=2023,2024", "--tile=40", "--overlap=8")
    claim = out / "job" / "claims" / f"{embed_job.read_plan(out).units[0]}.json"
    claim.parent.mkdir(parents=True, exist_ok=True)
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "x"}))
    refused("1 shards", "--years=2023,2024")
    claim.unlink()
    place = region.Affine(10, 0, 560_000, 0, -10, 5_600_640)
    late = region.write_raster(tmp_path / "far.tif", region.image(1, 64, 64), place)
    rows = json.loads((world[0] / "imagery.json").read_text())
    rows = [{**r, "path": str(world[0] / r["path"])} for r in rows]
    rows.append({"path": late, "date": "2024-05-10", "modality": "sentinel2_l2a"})
    (tmp_path / "more.json").write_text(json.dumps(rows))
    refused("reach beyond the arrays", "--years=2023,2024", f"--inputs={tmp_path / 'more.json'}")
    empty = [a for a in given if not a.startswith("--output")]
    assert run(*empty, "--years=2023,2024", "--extend", f"--output={tmp_path / 'none'}") == 2
    assert "no archive that could grow" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
