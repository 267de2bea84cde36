"""From labels to a run."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet
import pytest

from olmoearth_jax.maps import fine_tuning
from olmoearth_jax.maps.fine_tuning import ImageOptions, Options
from olmoearth_jax.maps.labelled import LabelOptions
from olmoearth_jax.maps.token_head import HeadOptions
from olmoearth_jax.maps.tokens import Settings
from tests.maps import world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world"))


def options(folder, output, source="fields.geojson", **change):
    labels = LabelOptions(str(folder / source), "kind", block="640")
    base = Options(
        str(folder / "model"), ImageOptions(str(folder / "imagery.csv")), labels, str(output),
        "probe", Settings(4), 32, head=HeadOptions(epochs=30),
    )  # fmt: skip
    return dataclasses.replace(base, **change)


def quiet(_):
    pass


@pytest.fixture(scope="module")
def done(folder):
    lines = []
    report = fine_tuning.run(options(folder, folder / "run"), lines.append)
    return report, lines


def test_it_learns_and_says_so(folder, done):
    report, lines = done
    print("\n".join(lines))
    assert report["splits"]["test"]["macro_f1"] > 0.9
    assert report["baselines"]["majority class"]["macro_f1"] < 0.4
    low, high = report["interval"]
    assert low <= report["splits"]["test"]["macro_f1"] <= high
    run = folder / "run"
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "job.json", "task.json", "weights", "report.json", "report.md", "split.geojson",
        "predictions.parquet", "log.jsonl", "confusion.png",
    } and "cache" not in names  # fmt: skip
    table = pyarrow.parquet.read_table(run / "predictions.parquet").to_pydict()
    hit = np.mean([a == b for a, b in zip(table["truth"], table["predicted"], strict=True)])
    assert hit == pytest.approx(report["splits"]["test"]["overall_accuracy"])
    blocks = json.loads((run / "split.geojson").read_text())["features"]
    assert {f["properties"]["split"] for f in blocks} == {"train", "valid", "test"}
    assert "macro_f1" in (run / "report.md").read_text()


def test_again_says_done_and_another_job_is_refused(folder, done):
    lines = []
    again = fine_tuning.run(options(folder, folder / "run"), lines.append)
    assert again == json.loads(json.dumps(done[0])) and "finished already" in lines[-1]
    with pytest.raises(ValueError, match=r"holds another job \(seed 0 there, 4 now\)"):
        fine_tuning.run(options(folder, folder / "run", seed=4), quiet)
    # Of nested settings, too, only what differs is shown.
    with pytest.raises(ValueError, match=r"another job \(head\.epochs \d+ there, 77 now\)"):
        fine_tuning.run(options(folder, folder / "run", head=HeadOptions(epochs=77)), quiet)
    (folder / "other").mkdir()
    (folder / "other" / "x.txt").write_text("mine")
    with pytest.raises(ValueError, match="files of something else"):
        fine_tuning.run(options(folder, folder / "other"), quiet)


def test_values_from_points(folder):
    labels = LabelOptions(
        str(folder / "plots.geojson"), value_column="height", unit="m", block="640"
    )
    report = fine_tuning.run(options(folder, folder / "values", labels=labels), quiet)
    test = report["splits"]["test"]
    assert report["primary_metric"] == "rmse" and test["r2"] > 0.2
    assert test["rmse"] < report["baselines"]["mean of training"]["rmse"]
    assert report["left_out_by_the_gap"] > 0
    task = json.loads((folder / "values" / "task.json").read_text())
    assert task["task"] == "values" and task["unit"] == "m" and task["standardised_by"][1] > 1
    table = pyarrow.parquet.read_table(folder / "values" / "predictions.parquet")
    assert table.column_names == ["id", "lon", "lat", "truth", "predicted"]


def _folder_bytes(path):
    kept = ("report.json", "task.json", "log.jsonl", "split.geojson", "predictions.parquet")
    out = {}
    for name in (*kept, "weights/head.npz"):
        data = (path / name).read_bytes()
        if name == "task.json":
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "created"})
        out[name] = data
    return out


def test_two_of_one_folder(folder, done):
    """The second is refused while the first works, and neither replaces the other's job."""
    output = folder / "twice"

    def meanwhile(line):
        if "windows" in line and not said:
            said.append(line)
            with pytest.raises(ValueError, match="twice is in use by another launch.finetune"):
                fine_tuning.run(options(folder, output), quiet)
            with pytest.raises(ValueError, match="holds another job"):
                fine_tuning.run(options(folder, output, seed=1), quiet)

    said = []
    fine_tuning.run(options(folder, output), meanwhile)
    assert said and not (output / "run.lock").exists()
    for name, data in _folder_bytes(folder / "run").items():
        assert _folder_bytes(output)[name] == data, name


HOSTILE = {"water": "$\\foo$", "forest": "<script>alert(1)</script>", "field": "a|b\nc" + 99 * "x"}


def test_names_of_classes_are_texts(folder):
    """Formulas, HTML, line ends and great length: shown as they are, by all that shows them."""
    held = json.loads((folder / "fields.geojson").read_text())
    for feature in held["features"]:
        feature["properties"]["kind"] = HOSTILE[feature["properties"]["kind"]]
    (folder / "hostile.geojson").write_text(json.dumps(held))
    o = options(folder, folder / "hostile", "hostile.geojson", head=HeadOptions(epochs=2))
    report = fine_tuning.run(o, quiet)
    assert sorted(report["classes"]) == sorted(HOSTILE.values())
    assert (folder / "hostile" / "confusion.png").stat().st_size > 1000
    assert "<script" not in (folder / "hostile" / "report.html").read_text()
    text = (folder / "hostile" / "report.md").read_text()
    assert "| \\<script>alert(1)\\</script> |" in text and "| a\\|b cxxx" in text


def test_names_that_look_alike_are_told(folder):
    held = json.loads((folder / "fields.geojson").read_text())
    names = {"water": "e\u0301tang", "forest": "Forest", "field": "forest"}
    for i, feature in enumerate(held["features"]):
        kind = names[feature["properties"]["kind"]]
        feature["properties"]["kind"] = "\u00e9tang" if i % 2 and kind == "e\u0301tang" else kind
    (folder / "alike.geojson").write_text(json.dumps(held))
    o = options(folder, folder / "alike", "alike.geojson", head=HeadOptions(epochs=1))
    report = fine_tuning.run(o, quiet)
    (told,) = [n for n in report["notes"] if "only in how they are written" in n]
    assert "'Forest' and 'forest'" in told and r"'e\u0301tang' and '\xe9tang'" in told


@pytest.mark.parametrize("how", ["shares", "column"])
def test_all_labels_may_be_training(folder, how):
    source, labels = "fields.geojson", options(folder, "").labels
    if how == "column":
        held = json.loads((folder / source).read_text())
        for feature in held["features"]:
            feature["properties"]["split"] = "train"
        (folder / "train.geojson").write_text(json.dumps(held))
        labels = dataclasses.replace(labels, path=str(folder / "train.geojson"))
    else:
        shares = {"train": "1", "valid": "0", "test": "0"}
        labels = dataclasses.replace(labels, fractions=shares)
    o = options(folder, folder / how, labels=labels, head=HeadOptions(epochs=2))
    report = fine_tuning.run(o, quiet)
    assert report["scored_split"] == "train" and list(report["splits"]) == ["train"]
    assert set(report["baselines"]) == {"majority class", "raw bands"}
    assert "macro_f1 of the train split" in (folder / how / "report.md").read_text()


def test_what_killed_processes_left_goes(folder, done):
    output = folder / "tidy"
    left = [
        f"{name}.0123abcd.tmp" for name in ("cache/.last.ckpt", "weights/.head.npz", ".task.json")
    ]

    def meanwhile(line):
        if "windows" in line and not said:
            said.append(line)
            for name in left:
                (output / name).parent.mkdir(exist_ok=True)
                (output / name).write_text("x")
            raise Killed

    said = []
    with pytest.raises(Killed):
        fine_tuning.run(options(folder, output), meanwhile)
    assert len(list(output.rglob(".*.tmp"))) == len(left)
    fine_tuning.run(options(folder, output), quiet)
    assert not list(output.rglob(".*"))
    assert _folder_bytes(output) == _folder_bytes(folder / "run")


class Killed(BaseException):
    pass


def test_a_kill_anywhere_leads_to_the_same_result(folder, done, monkeypatch):
    """Stopped at every file that is put in place, and started again each time."""
    from olmoearth_jax import files

    whole = files.os.replace
    left = [0]

    def replace(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        whole(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr("olmoearth_jax.maps.token_cache._CHUNK", 16)
    output = folder / "killed"
    for stop in range(20):
        left[0] = stop
        try:
            fine_tuning.run(options(folder, output), quiet)
            break
        except Killed:
            assert not (output / "report.json").exists()
            left[0] = 10**6
    else:
        raise AssertionError("it never ended")
    assert stop > 3
    left[0] = 10**6
    for name, data in _folder_bytes(folder / "run").items():
        assert _folder_bytes(output)[name] == data, name


def test_labels_that_blocks_alone_decide_are_not_learnt(folder):
    """The leakage trap: who knows the block knows the label; test blocks are scored at chance."""
    rng = np.random.default_rng(11)
    shapes, values = [], []
    for row in range(4):
        for col in range(4):
            kind = "ab"[(row + col) % 2]
            for cell in rng.choice(64, 20, replace=False).tolist():
                at = col * 64 + 8 * (cell % 8), row * 64 + 8 * (cell // 8)
                shapes.append(world.box(*at, at[0] + 8, at[1] + 8))
                values.append(kind)
    # The images say nothing of it, but each block has a colour of its own.
    color = np.full((12, 16), 300)
    color[np.arange(16) % 12, np.arange(16)] = 6000
    color[np.arange(16) // 2, np.arange(16)] += 3000
    color = color.reshape(12, 4, 4).repeat(64, 1).repeat(64, 2)
    x = (color + rng.normal(0, 60, color.shape)).clip(50).astype(np.uint16)
    world.write_raster(folder / "trap.tif", x)
    (folder / "trap.csv").write_text("path,date\ntrap.tif,2023-05-10\n")
    images = ImageOptions(str(folder / "trap.csv"))

    def score(name, **more):
        world.write_labels(folder / "trap.geojson", shapes, values, **more)
        o = options(folder, folder / name, "trap.geojson", images=images,
                    head=HeadOptions(lr=0.03))  # fmt: skip
        report = fine_tuning.run(o, quiet)
        heads = report["splits"]["test"], report["baselines"]["raw bands"]
        return [head["overall_accuracy"] for head in heads]

    assert max(score("blocks")) < 0.7
    mixed = [str(s) for s in rng.choice(["train", "val", "test"], len(values), p=[0.6, 0.2, 0.2])]
    assert score("mixed", split=mixed)[1] > 0.75  # as a split of single labels would have it


@pytest.mark.slow
def test_a_whole_encoder_learns(folder, monkeypatch):
    """--mode=full, stopped after an epoch and started again, and the map of its run."""
    from olmoearth_jax.evals import finetune
    from olmoearth_jax.maps import predicting

    o = options(
        folder, folder / "full", mode="full", head=HeadOptions(6, 10, 0.01),
        settings=Settings(2),
    )  # fmt: skip
    save, calls = finetune.FineTuner._save, []

    def killed(self, kind):
        save(self, kind)
        calls.append(kind)
        if len(calls) == 2:
            raise Killed

    monkeypatch.setattr(finetune.FineTuner, "_save", killed)
    with pytest.raises(Killed):
        fine_tuning.run(o, quiet)
    report = fine_tuning.run(o, quiet)
    assert calls == ["last"] * 6 + ["best"]
    assert report["splits"]["test"]["macro_f1"] > 0.5
    lines = (folder / "full" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {p.name for p in (folder / "full" / "weights").iterdir()} == {"encoder.npz"}
    monkeypatch.undo()
    again = fine_tuning.run(dataclasses.replace(o, output=str(folder / "full2")), quiet)
    assert again == report
    images = ImageOptions(str(folder / "imagery.csv"))
    predicting.run(predicting.Options(str(folder / "full"), images, str(folder / "fullmap")), quiet)
    _same_at_test_samples(folder / "full", folder / "fullmap")


def _same_at_test_samples(run, made):
    import rasterio
    import rasterio.warp

    table = pyarrow.parquet.read_table(run / "predictions.parquet").to_pydict()
    with rasterio.open(made / "classes.tif") as file:
        xs, ys = rasterio.warp.transform("EPSG:4326", file.crs, table["lon"], table["lat"])
        found = [int(v[0]) for v in file.sample(zip(xs, ys, strict=True))]
    numbers = {"field": 1, "forest": 2, "water": 3}
    wanted = [numbers[name] for name in table["predicted"]]
    assert np.mean(np.array(found) == wanted) > 0.999


@pytest.mark.slow
def test_a_whole_encoder_learns_values(folder):
    """Regression with --mode=full: standardised while training, in the user's unit in the map."""
    import rasterio
    import rasterio.warp

    from olmoearth_jax.maps import predicting

    labels = LabelOptions(
        str(folder / "plots.geojson"), value_column="height", unit="m", block="640"
    )
    o = options(
        folder, folder / "full_values", labels=labels, mode="full",
        head=HeadOptions(6, 10, 0.01), settings=Settings(4),
    )  # fmt: skip
    report = fine_tuning.run(o, quiet)
    test = report["splits"]["test"]
    assert test["rmse"] < report["baselines"]["mean of training"]["rmse"] and test["r2"] > 0.1
    task = json.loads((folder / "full_values" / "task.json").read_text())
    mean, spread = task["standardised_by"]
    assert 3 < mean < 35 and spread > 1
    images = ImageOptions(str(folder / "imagery.csv"))
    made = folder / "full_values_map"
    assert not predicting.run(
        predicting.Options(str(folder / "full_values"), images, str(made)), quiet
    ).failed
    table = pyarrow.parquet.read_table(folder / "full_values" / "predictions.parquet").to_pydict()
    with rasterio.open(made / "values.tif") as file:
        assert file.dtypes == ("float32",) and file.units == ("m",)
        xs, ys = rasterio.warp.transform("EPSG:4326", file.crs, table["lon"], table["lat"])
        found = [float(v[0]) for v in file.sample(zip(xs, ys, strict=True))]
    np.testing.assert_allclose(found, table["predicted"], rtol=1e-4, atol=1e-3)
    assert not (made / "classes.tif").exists() and not (made / "areas.csv").exists()
