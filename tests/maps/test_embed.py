"""launch.embed: values, restarts, workers, and what it refuses."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import rasterio
from absl.testing import flagsaver
from rasterio.transform import Affine

import olmoearth_jax
from launch import embed, finetune, predict
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.maps.fine_tuning import ImageOptions
from tests.inference.test_model import S2
from tests.maps import region

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")


def run(*given) -> int:
    """The exit code of the program in this process."""
    saved = flagsaver.save_flag_values(embed.FLAGS)
    try:
        embed.FLAGS(["embed", *map(str, given)])
        return embed.main(["embed"])
    finally:
        flagsaver.restore_flag_values(saved, embed.FLAGS)


def objects_below(path: Path) -> list[str]:
    """Keys of all files of a store but the temporary ones of writers."""
    files = (p for p in path.rglob("*") if p.is_file() and p.suffix != ".partial")
    return sorted(p.relative_to(path).as_posix() for p in files)


def objects(out: Path) -> dict[str, bytes]:
    """Key -> content of everything in the store of an archive."""
    path = out / "embeddings.zarr"
    return {key: (path / key).read_bytes() for key in objects_below(path)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("region")
    given = region.build(folder)
    assert run(*given, f"--output={folder / 'undisturbed'}") == 0
    return folder, given, objects(folder / "undisturbed")


def _edge(path):
    with rasterio.open(path) as file:
        return file.read(), file.transform


def test_values_are_those_of_the_model_on_the_lattice(world, tmp_path):
    folder, given, _ = world
    assert run(*given, "--dtype=float32", f"--output={tmp_path}") == 0
    archive = olmoearth_jax.open_archive(tmp_path)
    model = olmoearth_jax.load_pretrained(folder / "model")
    months = [_edge(folder / f"a_2024_{m}.tif")[0].astype(np.float32) for m in (5, 8)]
    x = np.stack(months, -1)
    x[x == 0] = np.nan
    # Cores of 32 pixels lie at multiples of 32 on the lattice; the corner is pixel 50,048.
    row0, col0 = 560_064, 50_048
    assert row0 % 32 == 0 and col0 % 32 == 0
    zone = archive.zone(32)
    for top, left in ((64, 64), (32, 96), (256, 288)):
        tile = np.full((48, 48, 2, 12), np.nan, np.float32)
        part = x[:, top - 8 : top + 40, left - 8 : left + 40].transpose(1, 2, 3, 0)
        tile[: part.shape[0], : part.shape[1]] = part
        sample = Sample.from_arrays({"sentinel2_l2a": tile}, ["2024-05", "2024-08"],
                                    bands={"sentinel2_l2a": S2}, nan_pixels="mask")  # fmt: skip
        want = model.embed(sample, patch_size=4, pooling="spatial")[0, 2:10, 2:10]
        seen = model.prepare(sample, 4).visible[0, 2:10, 2:10]
        a, _, c, _, _, f = zone.transform
        row, col = round((f - (5_600_640 - 10 * top)) / a), round((500_480 + 10 * left - c) / a)
        got, valid = archive.window(zone, 1, slice(row, row + 8), slice(col, col + 8))
        assert (valid == seen).all() and valid.any()
        np.testing.assert_allclose(got[valid], want[valid], atol=1e-5)


def test_coverage_counts_the_timesteps_with_data(world):
    archive = olmoearth_jax.open_archive(world[0] / "undisturbed")
    zone = archive.zone(32)
    a, _, c, _, _, f = zone.transform

    def at(top, left):
        row, col = round((f - 5_600_640 + 10 * top) / a), round((500_480 + 10 * left - c) / a)
        return int(zone.coverage[1, row, col])

    assert at(200, 200) == 2 and at(60, 80) == 1  # clouds in August
    assert at(-8, 20) == 0 and at(296, 20) == 2 and at(300, 20) == 0


def test_shards_workers_and_blocks_change_nothing(world, tmp_path):
    folder, given, want = world
    for number, of in ((2, 3), (0, 3), (1, 3)):
        assert run(*given, f"--output={tmp_path / 'three'}", f"--shard={number}", f"--of={of}",
                   "--nosteal") == 0  # fmt: skip
    assert objects(tmp_path / "three") == want
    big = f"--output={tmp_path / 'big'}"
    assert run(*given, big, "--shard_side=128", "--block=16", "--batch_size=3") == 0
    one, two = (olmoearth_jax.open_archive(p) for p in (folder / "undisturbed", tmp_path / "big"))
    lonlat = np.random.default_rng(0).uniform([9.0, 50.5], [9.06, 50.58], (300, 2))
    (a, valid), (b, seen) = one.points(lonlat), two.points(lonlat)
    assert (valid == seen).all() and valid.sum() > 100
    np.testing.assert_allclose(a[valid], b[valid], atol=np.abs(a[valid]).max() / 100)


def test_the_encoder_is_compiled_twice_at_most(world, tmp_path):
    from olmoearth_jax.inference import model as inference

    folder, given, _ = world

    def compiled():
        return sum(inference._compiled(one)._cache_size() for one in (False, True))

    jax.clear_caches()
    before = compiled()
    assert run(*given, f"--output={tmp_path}") == 0
    assert 1 <= compiled() - before <= 2


def test_the_same_command_again_does_nothing(world, capsys):
    folder, given, want = world
    before = {p: p.stat().st_mtime_ns for p in (folder / "undisturbed").rglob("*")}
    assert run(*given, f"--output={folder / 'undisturbed'}") == 0
    assert "complete" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in (folder / "undisturbed").rglob("*")}
    assert {p for p in after if p.is_file()} == {p for p in before if p.is_file()}
    assert objects(folder / "undisturbed") == want


def test_another_job_in_the_folder_is_refused_with_what_differs(world, capsys):
    folder, given, want = world
    out = f"--output={folder / 'undisturbed'}"
    assert run(*given, out, "--overlap=8", "--tile=40") == 2
    assert "tile: 48 there, 40 here" in capsys.readouterr().err
    assert run(*given, out, "--quantization=signed_power") == 2
    told = capsys.readouterr().err
    assert 'quantization: "per_pixel_scale" there, "signed_power" here' in told
    assert objects(folder / "undisturbed") == want


def test_the_catalogue_has_an_item_per_shard(world):
    import pyarrow.parquet
    import shapely

    out = world[0] / "undisturbed"
    table = pyarrow.parquet.read_table(out / "index.parquet")
    plan = [json.loads(x)["id"] for x in (out / "job" / "plan.jsonl").read_text().splitlines()]
    assert table["id"].to_pylist() == plan
    shapes = shapely.from_wkb(table["geometry"].to_pylist())
    place = shapely.Point(9.03, 50.55)
    assert sum(s.contains(place) for s in shapes) == 2  # one of each year
    assert table["start_datetime"].to_pylist()[0] == "2023-01-01T00:00:00Z"
    assert sum(table["olmoearth:valid"].to_pylist()) > 10_000
    report = json.loads((out / "job" / "report.json").read_text())
    assert report["done"] == report["shards"] == len(plan)
    assert report["valid"] == sum(table["olmoearth:valid"].to_pylist())
    collection = json.loads((out / "collection.json").read_text())
    west, south, east, north = collection["extent"]["spatial"]["bbox"][0]
    assert west < 9.03 < east and south < 50.55 < north


def test_tools_embed_agrees_where_its_tiles_lie_alike(world, tmp_path):
    """Of one raster, apart from its edges: the same tiles, so the same values."""
    from rasterio.transform import Affine

    from tools import embed as one_area

    folder, given, _ = world
    # tools.embed keeps 8 pixels more of the first tile; its next cores begin at pixel 40.
    top, left = 32 * -17_500 - 40, 32 * 1_564 - 40
    x = region.image(5, 200, 232)
    corner = Affine(10, 0, 10 * left, 0, -10, -10 * top)
    path = region.write_raster(tmp_path / "x.tif", x, corner)
    (tmp_path / "m.csv").write_text("path,date,modality\nx.tif,2024-05-15,sentinel2_l2a\n")
    flags = [a for a in given if not a.startswith(("--inputs", "--years"))]
    assert run(*flags, f"--inputs={tmp_path / 'm.csv'}", "--years=2024", "--dtype=float32",
               f"--output={tmp_path / 'out'}") == 0  # fmt: skip
    o = one_area.Options(str(folder / "model"), [path], str(tmp_path / "map.tif"), patch_size=4,
                         tile=48, overlap=16, dates=["2024-05-15"])  # fmt: skip
    one_area.run(o)
    with rasterio.open(tmp_path / "map.tif") as file:
        want = np.moveaxis(file.read(), 0, -1)
    archive = olmoearth_jax.open_archive(tmp_path / "out")
    zone = archive.zone(32)
    row = round((zone.transform[5] + 10 * top) / 40)
    col = round((10 * left - zone.transform[2]) / 40)
    got, valid = archive.window(zone, 0, slice(row, row + 50), slice(col, col + 58))
    inner = np.s_[10:34, 10:42]
    assert valid[inner].all()
    np.testing.assert_allclose(got[inner], want[inner], atol=1e-5)


def _start(given, out, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "launch.embed", *given, f"--output={out}", *more], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_kills_leave_no_trace(world, tmp_path):
    """Eight SIGKILLs over three workers, two of them with one number; then one ends the work."""
    _, given, want = world
    draw, out = random.Random(1), tmp_path / "killed"
    for _ in range(4):
        workers = [_start(given, out, f"--shard={k}", "--of=3") for k in (0, 1, 1)]
        before = time.monotonic()
        delay = draw.uniform(3, 14)
        while time.monotonic() - before < delay:
            _look(out, want)
            time.sleep(0.05)
        for worker in draw.sample(workers, 2):
            worker.kill()
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert run(*given, f"--output={out}") == 0
    assert objects(out) == want


def _look(out: Path, want: dict[str, bytes]) -> None:
    """A reader sees fill or final values, and coverage only with the embeddings it speaks of."""
    path = out / "embeddings.zarr"
    if not path.is_dir():
        return
    seen = {}
    for key in sorted(want, key=lambda k: "coverage" not in k):
        try:
            seen[key] = (path / key).read_bytes()
        except FileNotFoundError:
            continue
    for key, content in seen.items():
        assert content == want[key], key
        if "/coverage/c/" in key:
            step, row, col = key.split("/")[3:]
            zone = key.split("/")[0]
            assert f"{zone}/embeddings/c/{step}/0/{row}/{col}" in seen, key


@pytest.mark.slow
def test_a_kill_at_every_rename_of_a_shard(world, tmp_path):
    """The process ends right before its n-th rename, for every n of the first shard."""
    _, given, want = world
    code = """
import os, sys
from olmoearth_jax.maps import embed_job, store
left = int(sys.argv[1])
def stopping(real):
    def call(*a, **k):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return real(*a, **k)
    return call
os.replace, os.rename, os.link = map(stopping, (os.replace, os.rename, os.link))
import pathlib
pathlib.Path.replace = stopping(pathlib.Path.replace)
from launch import embed
embed.FLAGS(["embed", *sys.argv[2:]])
sys.exit(embed.main(["embed"]))
"""
    killed = 0
    out = tmp_path / "out"
    for left in range(0, 9, 2):
        done = subprocess.run([sys.executable, "-c", code, str(left), *given, f"--output={out}"],
                              cwd=ROOT, capture_output=True, text=True)  # fmt: skip
        killed += done.returncode == -signal.SIGKILL
        _look(out, want)
    assert killed >= 4
    assert run(*given, f"--output={out}") == 0
    assert objects(out) == want


def test_sigterm_ends_with_75_and_gives_the_claim_back(world, tmp_path):
    _, given, _ = world
    worker = _start(given, tmp_path / "out")
    while not list((tmp_path / "out" / "job" / "claims").rglob("*.json")):
        assert worker.poll() is None
        time.sleep(0.02)
    worker.send_signal(signal.SIGTERM)
    told, _ = worker.communicate(timeout=60)
    assert worker.returncode == 75 and "goes on" in told
    assert not list((tmp_path / "out" / "job" / "claims").rglob("*.json"))


def test_an_area_in_two_zones_and_both_hemispheres(world, tmp_path):
    """Tokens outside the area are nodata; a bottom-up southern raster is read as it lies."""
    from rasterio.transform import Affine

    folder, given, _ = world
    x = region.image(3, 200, 220)
    # Around 12 E on the equator: the same ground in zones 32 and 33, southern and northern form.
    region.write_raster(tmp_path / "n.tif", x, Affine(10, 0, 832_640, 0, -10, 1_280), "EPSG:32632")
    y = region.image(4, 200, 220)
    region.write_raster(tmp_path / "s.tif", y[:, ::-1], Affine(10, 0, 165_120, 0, 10, 9_999_280),
                        "EPSG:32733")  # fmt: skip
    (tmp_path / "m.csv").write_text("path,date,modality\nn.tif,2024-05,sentinel2_l2a\n"
                                    "s.tif,2024-05,sentinel2_l2a\n")  # fmt: skip
    ring = [[11.99, -0.004], [12.01, -0.004], [12.01, 0.008], [11.99, 0.008], [11.99, -0.004]]
    (tmp_path / "area.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    out = tmp_path / "out"
    flags = [a for a in given if not a.startswith(("--inputs", "--years"))]
    assert run(*flags, f"--inputs={tmp_path / 'm.csv'}", "--years=2024", f"--output={out}",
               f"--area={tmp_path / 'area.geojson'}") == 0  # fmt: skip
    archive = olmoearth_jax.open_archive(out)
    assert archive.zones == [32, 33]
    lonlat = [[11.992, -0.002], [11.992, 0.006], [12.008, -0.002], [12.008, 0.006],
              [11.98, 0.0], [12.02, 0.0], [12.0, 0.02]]  # fmt: skip
    _, valid, places = archive.locate(lonlat)
    assert valid[:4].all() and not valid[4:].any()
    assert places[:4, 0].tolist() == [32, 32, 33, 33]


def _manifest(tmp_path, *rows):
    (tmp_path / "m.json").write_text(json.dumps(list(rows)))
    return f"--inputs={tmp_path / 'm.json'}"


@pytest.mark.parametrize("flags, said", [
    (["--years="], "--years=2023,2024 or --periods"),
    (["--years=2019"], "no raster lies in the period 2019: their dates are 2023-05-10 to"),
    (["--shard=1"], "--shard and --of go together"),
    (["--shard=3", "--of=3"], "must be one of 0..2"),
    (["--quantization=signed_power", "--normalize=none"], "per_pixel_scale with --normalize=none"),
    (["--quantization=linear"], "--scale"),
    (["--dtype=bfloat16"], "float16"),
    (["--shard_side=50"], "--shard_side=64"),
    (["--chunk=48"], "--shard_side="),
    (["--tile=47"], "whole patches"),
    (["--pooling=student"], "only models of v1.3"),
    (["--location_size=2"], "location_size goes with"),
    (["--model=OlmoEarth-v1_3-Bas"], "OlmoEarth-v1_3-Base"),
    (["--inputs=nothing.csv"], "there is no file nothing.csv"),
    (["--name={modality}_{date}.tif"], "--name is for a folder of rasters"),
    (["--area=nothing.geojson"], "no area file"),
    (["--patch_size=9", "--tile=72", "--overlap=36"], "patch_size must be a whole number 1..4"),
    (["--device=7"], "no device 7"),
])  # fmt: skip
def test_mistakes_are_told_and_nothing_is_written(world, tmp_path, capsys, flags, said):
    _, given, _ = world
    out = tmp_path / "out"
    assert run(*given, f"--output={out}", *flags) == 2
    told = capsys.readouterr().err
    assert said in told and told.startswith("error: ") and told.count("\n") == 1
    assert not out.exists()


def test_inputs_that_do_not_fit_are_told(world, tmp_path, capsys):
    folder, given, _ = world
    flags = [a for a in given if not a.startswith("--inputs")]
    out = f"--output={tmp_path / 'out'}"
    x, t = _edge(folder / "a_2023_5.tif")
    region.write_raster(tmp_path / "few.tif", x[:10], t, names=S2[:10])
    region.write_raster(tmp_path / "scaled.tif", (x / 10_000).astype(np.float32), t)
    date, a = {"date": "2023-05", "modality": "sentinel2_l2a"}, str(folder / "a_2023_5.tif")
    late = {**date, "date": "2024-05"}
    cases = [
        ([{"path": a, **date}, {"path": "few.tif", **date}, {"path": a, **late}],
         "hold different bands"),
        ([{"path": "scaled.tif", **date}, {"path": a, **late}], "scaled.tif"),
        ([{"path": a, **date, "perid": "x"}], "period"),
        ([{"path": a, "modality": "sentinel2_l2a"}], "has no date"),
        ([{"path": a, **date, "period": "2024"}], "no raster lies in the period 2023"),
        ([{"path": a, **late, "date": f"2023-{m:02d}-{d}"} for m in range(1, 8) for d in (10, 20)]
         + [{"path": a, **late}], "14 timesteps"),
    ]  # fmt: skip
    for rows, said in cases:
        more = ["--step=date"] if "timesteps" in said else []
        assert run(*flags, _manifest(tmp_path, *rows), out, *more) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_an_area_beside_the_rasters_names_both_bounds(world, tmp_path, capsys):
    _, given, _ = world
    ring = [[9.5, 50.5], [9.6, 50.5], [9.6, 50.6], [9.5, 50.5]]
    (tmp_path / "area.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    assert run(*given, f"--area={tmp_path / 'area.geojson'}", f"--output={tmp_path / 'out'}") == 2
    told = capsys.readouterr().err
    assert "9.5000, 50.5000, 9.6000, 50.6000" in told and "9.00" in told and "2023" in told


def test_a_damaged_raster_fails_its_shards_alone(world, tmp_path, capsys):
    folder, given, want = world
    rows = json.loads((folder / "imagery.json").read_text())
    for row in rows:
        row["path"] = str(folder / row["path"])
    broken = tmp_path / "b.tif"
    whole, rows[-1]["path"] = region.damage(rows[-1]["path"], broken), str(broken)
    flags = [a for a in given if not a.startswith("--inputs")]
    flags += [_manifest(tmp_path, *rows), f"--output={tmp_path / 'out'}", "--nocheck_units"]
    assert run(*flags) == 1
    told = capsys.readouterr()
    assert "b.tif" in told.err and "--attempts=6" in told.out
    failed = list((tmp_path / "out" / "job" / "failed").rglob("*.json"))
    assert 0 < len(failed) < 9
    broken.write_bytes(whole)
    assert run(*flags, "--attempts=6") == 0
    got = objects(tmp_path / "out")
    assert got.keys() == want.keys()
    assert all(got[key] == want[key] for key in want if "/c/" in key)


def test_flags_of_images_are_the_same_in_every_program():
    names = ("inputs", "name", "modality", "bands", "years", "periods", "assets", "s2_offset",
             "step", "check_units")  # fmt: skip
    told = [
        {n: (program.FLAGS[n].help, program.FLAGS[n].default) for n in names}
        for program in (embed, finetune, predict)
    ]
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("alone", [False, True])
def test_fills_that_an_offset_moves_are_told(tmp_path, capsys, alone):
    """In files of all bands, and in those of one."""
    given = [a for a in region.build(tmp_path) if not a.startswith(("--inputs", "--years"))]
    x = region.image(3, 200, 200)
    x[:, :30] = 0
    place = Affine(10, 0, 500_480, 0, -10, 5_600_640)
    parts = [slice(k, k + 1) for k in range(12)] if alone else [slice(0, 12)]
    rows = []
    for k, part in enumerate(parts):
        region.write_raster(tmp_path / f"f{k}.tif", x[part], place, nodata=None,
                            names=region.S2[part])  # fmt: skip
        rows.append({"path": f"f{k}.tif", "date": "2023-05-10", "modality": "sentinel2_l2a"})
    for more, told in (({"offset": -1000}, True), ({"offset": -1000, "nodata": 0}, False)):
        (tmp_path / "f.json").write_text(json.dumps([{**row, **more} for row in rows]))
        out = tmp_path / f"out{len(more)}"
        assert run(*given, "--years=2023", f"--inputs={tmp_path / 'f.json'}",
                   f"--output={out}") == 0  # fmt: skip
        assert ("15% of the pixels of sentinel2_l2a are 0" in capsys.readouterr().out) == told
        images = ImageOptions(str(tmp_path / "f.json"))
        with images.open(images.rasters()[0]) as (_, notes):
            assert any("give nodata 0 in the manifest" in n for n in notes) == told
