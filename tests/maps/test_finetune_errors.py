"""What cannot be trained on is refused in one sentence, and nothing is written."""

import dataclasses
import json

import pytest
import shapely

from olmoearth_jax.dates import parse_date
from olmoearth_jax.maps import fine_tuning, labelled, plan, scenes
from olmoearth_jax.maps.fine_tuning import ImageOptions
from olmoearth_jax.maps.labelled import LabelOptions
from olmoearth_jax.maps.token_head import HeadOptions
from olmoearth_jax.maps.tokens import Settings
from tests.inference.test_model import S2
from tests.maps import world
from tests.maps.test_finetune import options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world"))


def refused(folder, match, **change):
    lines = []
    with pytest.raises(ValueError, match=match) as caught:
        fine_tuning.run(options(folder, folder / "out", **change), lines.append)
    assert not (folder / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labels(folder, shapes, values, **change):
    path = world.write_labels(folder / "l.geojson", shapes, values, **change.pop("columns", {}))
    return LabelOptions(str(path), "kind", **{"block": "640", **change})


def grid(side=4, step=64):
    """Boxes of two tokens in every block of `step` pixels."""
    return [
        world.box(x * step + 8, y * step + 8, x * step + 16, y * step + 16)
        for y in range(side) for x in range(side)
    ]  # fmt: skip


def test_label_options(folder):
    both = LabelOptions(str(folder / "fields.geojson"), "kind", "height")
    refused(folder, "--label_column for classes or --value_column", labels=both)
    refused(folder, "there is no label file", source="none.geojson")
    wrong = LabelOptions(str(folder / "fields.geojson"), "knid")
    refused(folder, "no column 'knid'; it has: kind", labels=wrong)
    some = LabelOptions(str(folder / "fields.geojson"), "kind", classes=["water", "forest"])
    refused(folder, "--classes names water, forest, but the labels hold field, fo", labels=some)
    for said, more in (
        ("--classes does not go with --value_column", {"classes": ["a"]}),
        ("--drop_rare does not go with --value_column", {"drop_rare": True}),
        ("--ignore_values does not go with labels in a table", {"ignore_values": [0.0]}),
    ):
        values = LabelOptions(str(folder / "plots.geojson"), None, "height", **more)
        refused(folder, said, labels=values)
    values = LabelOptions(str(folder / "plots.geojson"), None, "height", block="640")
    refused(folder, "--class_weights are for classes", labels=values, class_weights="balanced")
    raster = LabelOptions(str(folder / "a.tif"), all_touched=True)
    refused(folder, "--all_touched is for polygons", labels=raster)
    side = LabelOptions(str(folder / "fields.geojson"), "kind", block="x")
    refused(folder, "--block is a side in metres or 'auto', got 'x'", labels=side)


@pytest.mark.parametrize("patch", [0, 5, 40])
def test_patches_that_the_model_does_not_take(folder, patch):
    """Told before a window is asked for that is whole patches of them."""
    refused(folder, rf"patch_size must be a whole number 1\.\.4, got {patch}",
            settings=Settings(patch))  # fmt: skip


def test_too_few_of_something(folder):
    boxes = grid()
    one = labels(folder, boxes, ["a"] * 16)
    refused(folder, r"all labels are of one class \(a\)", labels=one)
    values = ["a"] * 15 + ["rare"]
    rare = labels(folder, boxes, values)
    refused(folder, "at least 5 samples: rare 4; label more, or pass --drop_rare", labels=rare)
    dropped = dataclasses.replace(rare, drop_rare=True)
    refused(folder, r"all labels are of one class \(a\)", labels=dropped)
    big = labels(folder, boxes, ["a", "b"] * 8, block="20000")
    refused(folder, "blocks of 2.*at least 3: take --block=2560", labels=big)
    flat = dataclasses.replace(
        labels(folder, boxes, ["x"] * 16, columns={"height": [2.0] * 16}),
        label_column=None, value_column="height",
    )  # fmt: skip
    refused(folder, "all values of .* are 2: there is nothing to learn", labels=flat)
    alone = [world.box(8, 8, 24, 24), *boxes[1:]]
    lonely = labels(folder, alone, ["only"] + ["a", "b", "c"] * 5, fractions={
        "train": "0.34", "valid": "0.33", "test": "0.33"})  # fmt: skip
    # Wherever the one block of a class goes: it is in training, or the run is refused.
    told = []
    for seed in range(8):
        try:
            o = options(folder, folder / f"lonely{seed}", labels=lonely, seed=seed)
            with_scenes(o)
        except ValueError as e:
            told.append(str(e))
    assert told and all("without training samples (only: " in text for text in told)


def with_scenes(o):
    """Reads and splits the labels of a run, and no more."""
    with o.images.open(o.images.rasters()[0]) as (opened, _):
        return labelled.read(o.labels, opened, o.window, o.settings.patch_size, 4, o.seed)


def test_labels_elsewhere(folder):
    t = world.CORNER
    far = [shapely.transform(s, lambda p: p + [90_000.0, 0.0]) for s in grid()]
    text = refused(folder, "16 of 16 labels cannot be used", labels=labels(folder, far, ["a"] * 16))
    assert "outside 16" in text and t.a == 10
    mixed = [*far[:10], *grid()[:6]]
    refused(folder, "10 of 16 labels", labels=labels(folder, mixed, ["a", "b"] * 8))


def test_labels_on_nodata_are_counted_or_refused(folder):
    x = world.images(world.classes())
    x[:, :, :160] = 0
    world.write_raster(folder / "half.tif", x)
    (folder / "half.csv").write_text("path,date\nhalf.tif,2023-05\n")
    images = ImageOptions(str(folder / "half.csv"))
    refused(folder, "labelled places have no image data", images=images)
    x = world.images(world.classes())
    x[:, :, :40] = 0
    world.write_raster(folder / "half.tif", x)
    o = options(folder, folder / "counted", images=images)
    report = fine_tuning.run(o, lambda _: None)
    assert report["labels"]["on_nodata"] > 0


def test_images_that_do_not_go_together(folder):
    t = world.CORNER
    moved = type(t)(10, 0, t.c + 5, 0, -10, t.f)
    world.write_raster(folder / "off.tif", world.images(world.classes()), transform=moved)
    (folder / "off.csv").write_text("path,date\na.tif,2023-05\noff.tif,2023-06\n")
    refused(folder, "lie on different grids", images=ImageOptions(str(folder / "off.csv")))
    world.write_raster(folder / "few.tif", world.images(world.classes())[:10], S2[:10])
    (folder / "bands.csv").write_text("path,date\na.tif,2023-05\nfew.tif,2023-05\n")
    refused(folder, "a.tif and .*few.tif are both sentinel2_l2a of 2023-05, but hold different",
            images=ImageOptions(str(folder / "bands.csv")))  # fmt: skip
    rows = "".join(f"a.tif,{y}-{m:02d}\n" for y in (2022, 2023) for m in range(1, 8))
    (folder / "many.csv").write_text("path,date\n" + rows)
    many = ImageOptions(str(folder / "many.csv"))
    text = refused(folder, "14 timesteps, but the models take at most 12", images=many)
    assert "2022-01, 2022-02" in text
    refused(folder, "several periods .2022, 2023., but the labels have no column",
            images=dataclasses.replace(many, years=["2022", "2023"]))  # fmt: skip
    refused(folder, "no raster lies in the period 2019: their dates are 2022-01 to 2023-07",
            images=dataclasses.replace(many, years=["2019"]))  # fmt: skip
    refused(folder, "--years=2023,2024 or --periods", images=dataclasses.replace(
        many, years=["2022"], periods=["2022-01/2022-05"]))  # fmt: skip
    refused(folder, "there is no file", images=ImageOptions(str(folder / "none.csv")))
    refused(folder, "say how its rasters are named", images=ImageOptions(str(folder)))


def test_settings_that_do_not_fit(folder):
    refused(folder, "window of 30 pixels is not whole patches of 4; take 28 or 32", window=30)
    refused(folder, "student' needs an attention pooler", settings=Settings(4, "student"))
    refused(folder, "overlap of 32 pixels leaves nothing of windows of 32", overlap=32)
    refused(folder, "unknown mode 'prob'; did you mean 'probe'|probe", mode="prob")
    (folder / "w.json").write_text(json.dumps({"water": 1}))
    refused(folder, "weights water; the classes are field, forest, water",
            class_weights=str(folder / "w.json"))  # fmt: skip


def test_labels_see_the_images_of_their_year(folder):
    """Each label learns from its own period: in the other one the classes are turned round."""
    kinds = world.classes()
    world.write_raster(folder / "y1.tif", world.images(kinds, 4))
    world.write_raster(folder / "y2.tif", world.images(2 - kinds, 5))
    (folder / "years.csv").write_text("path,date\ny1.tif,2022-05\ny2.tif,2023-05\n")
    held = json.loads((folder / "fields.geojson").read_text())
    for i, feature in enumerate(held["features"]):
        year, props = 2022 + i % 2, feature["properties"]
        if year == 2023:
            props["kind"] = {"water": "field", "field": "water"}.get(props["kind"], props["kind"])
        props["year"] = year
    (folder / "dated.geojson").write_text(json.dumps(held))
    images = ImageOptions(str(folder / "years.csv"), years=["2022", "2023"])
    report = fine_tuning.run(
        options(folder, folder / "dated", "dated.geojson", images=images), lambda _: None
    )
    assert report["splits"]["test"]["macro_f1"] > 0.8


def test_without_periods_all_dates_are_one():
    (one,) = scenes.periods_of()
    assert one.name == "" and one.holds(parse_date("1999-01")) and one.holds(parse_date("2050-12"))


def test_windows_of_months():
    for text, first, last in (
        ("-6:6", "2022-11-01", "2023-10-31"), ("0:1", "2023-05-01", "2023-05-31"),
        ("-5:-2", "2022-12-01", "2023-02-28"),
    ):  # fmt: skip
        found = plan.around(parse_date("2023-05-17"), plan.months_of(text))
        assert found.days == [first, last]
    for text in ("6", "6:-6", "-7:6", "a:b", "0:0"):
        with pytest.raises(ValueError, match="--months is a window of at most 12 months"):
            plan.months_of(text)


def test_labels_see_the_months_around_their_date(folder):
    """The classes of the images turn round every month; only the label's own month fits."""
    kinds = world.classes()
    rows = ["path,date"]
    for m in (3, 4, 5, 6):
        world.write_raster(folder / f"m{m}.tif", world.images(kinds if m % 2 else 2 - kinds, m))
        rows.append(f"m{m}.tif,2023-{m:02d}-10")
    (folder / "months.csv").write_text("\n".join(rows) + "\n")
    held = json.loads((folder / "fields.geojson").read_text())
    for i, feature in enumerate(held["features"]):
        month, props = 3 + i % 5, feature["properties"]
        if month % 2 == 0:
            props["kind"] = {"water": "field", "field": "water"}.get(props["kind"], props["kind"])
        props["date"] = f"2023-{month:02d}-20"
    (folder / "monthly.geojson").write_text(json.dumps(held))
    images = ImageOptions(str(folder / "months.csv"))
    o = options(folder, folder / "monthly", "monthly.geojson", images=images)
    o = dataclasses.replace(o, labels=dataclasses.replace(o.labels, months=(0, 1)))
    report = fine_tuning.run(o, lambda _: None)
    assert report["splits"]["test"]["macro_f1"] > 0.8
    in_july = sum(f["properties"]["date"] == "2023-07-20" for f in held["features"])
    assert report["labels"]["without_period"] == in_july > 0
    refused(folder, "--months needs a column 'date'",
            labels=dataclasses.replace(o.labels, path=str(folder / "fields.geojson")))  # fmt: skip
    refused(folder, "--months does not go with --years", labels=o.labels,
            images=dataclasses.replace(images, years=["2023"]))  # fmt: skip
    refused(folder, "no raster lies in the period 2024-03",
            labels=dataclasses.replace(o.labels, months=(12, 13)))  # fmt: skip


def test_labels_of_years_without_images_are_told(folder):
    """Without --years all images are one period, and so are all labels."""
    held = json.loads((folder / "fields.geojson").read_text())
    for i, feature in enumerate(held["features"]):
        feature["properties"]["year"] = 2019 if i < 5 else 2023
    (folder / "old.geojson").write_text(json.dumps(held))
    labels = LabelOptions(str(folder / "old.geojson"), "kind", block="640")
    for years, said in (((), 1), (["2023"], 0)):
        images = ImageOptions(str(folder / "imagery.csv"), years=years)
        with images.open(images.rasters()[0]) as (opened, _):
            notes = labelled.read(labels, opened, 32, 4, 4, 0).notes
        told = [n for n in notes if n.startswith("5 labels are of 2019, but learn from")]
        assert len(told) == said


def test_numbers_that_mean_nothing(folder):
    plain = LabelOptions(str(folder / "fields.geojson"), "kind", block="640")
    for gap in (float("nan"), float("inf"), -1.0):
        refused(folder, "--gap is a distance in metres",
                labels=dataclasses.replace(plain, gap=gap))  # fmt: skip
    refused(folder, "--block is a side in metres", labels=dataclasses.replace(plain, block="inf"))
    for lr in (0.0, -1.0, float("nan"), float("inf")):
        refused(folder, "--lr must be a number above 0", head=HeadOptions(lr=lr))
    refused(folder, "--seed must be at least 0, got -1", seed=-1)
    for text in ('{"water": -1, "field": 1, "forest": 1}', '{"water": NaN}', '{"water": 0}'):
        (folder / "w.json").write_text(text)
        refused(folder, "must be numbers from 0 on, and not all 0",
                class_weights=str(folder / "w.json"))  # fmt: skip
    gone = dataclasses.replace(plain, colors=str(folder / "none.json"))
    refused(folder, "the colours in .*none.json cannot be read", labels=gone)


@pytest.mark.parametrize("year", ["abc", True, 1e400, 2023.5, -5, 20230])
def test_years_that_are_none(folder, year):
    shapes = grid()
    wrong = labels(folder, shapes, ["a", "b"] * 8, columns={"year": [year] * 16})
    images = ImageOptions(str(folder / "imagery.csv"), years=["2023"])
    refused(folder, "column 'year' holds .*; years are numbers", labels=wrong, images=images)


def test_a_class_must_be_in_training(folder):
    """Also where the labels say the split, or where its images have no data."""
    shapes, kinds = grid(), ["a", "b"] * 8
    said = ["test" if k == "b" else "train" for k in kinds]
    told = labels(folder, shapes, kinds, columns={"split": said})
    refused(folder, r"without training samples \(b: test 32\): leave them out", labels=told)
    x = world.images(world.classes())
    x[:, :24, :24] = 0
    world.write_raster(folder / "hole.tif", x)
    (folder / "hole.csv").write_text("path,date\nhole.tif,2023-05\n")
    said = ["train"] * 8 + ["valid", "test"] * 4
    kinds = ["c", *["a", "b"] * 4, *["c", "a", "b"] * 2, "c"]
    told = labels(folder, shapes, kinds, columns={"split": said})
    refused(folder, "no training label with image data is of the classes c", labels=told,
            images=ImageOptions(str(folder / "hole.csv")))  # fmt: skip


def test_weights_of_nothing(folder):
    said = ["train"] * 12 + ["test"] * 4
    told = labels(folder, grid(), ["a", "b"] * 8, columns={
        "split": said, "weight": [0] * 12 + [1] * 4})  # fmt: skip
    refused(folder, "all labels of the training split have the weight 0", labels=told)


def test_an_output_that_is_a_file(folder):
    (folder / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file and no folder; give another --output"):
        fine_tuning.run(options(folder, folder / "file"), lambda _: None)
    assert (folder / "file").read_text() == "mine"
