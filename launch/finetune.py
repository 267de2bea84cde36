"""Trains a map from labels and images, and says how good it is.

    python -m launch.finetune --model=OlmoEarth-v1_2-Base --inputs=imagery.csv \\
        --labels=fields.geojson --label_column=crop --output=runs/crops
    python -m launch.finetune ... --labels=plots.csv --value_column=biomass --unit=t/ha
    python -m launch.finetune ... --labels=landuse.tif --classes=water,forest,field
    python -m launch.finetune --archive=/data/paraguay --year=2024 --labels=fields.geojson \\
        --label_column=crop --output=runs/crops

--labels is GeoJSON, GeoParquet, .gpkg or a CSV with lon and lat, of points or polygons with a
column of classes (--label_column) or values (--value_column), or a GeoTIFF of one band. The columns
split (train, valid, test), date or year, and id are used if they are there: a label sees the images
of the period that holds it, or with --months=-6:6 those of the year around its own month.

--inputs is a manifest of GeoTIFFs as `tools.embed` takes it, a folder with --name, or STAC items (a
file or folder of them, a collection with links, stac-geoparquet); all but folders may be URLs.
Labels are split by blocks on the ground, so that no test label lies beside training labels. With
--archive the embeddings of `launch.embed` are taken instead, and no model is needed.

The folder --output then holds report.md, report.json, confusion.png, predictions.parquet,
split.geojson, task.json, log.jsonl and the weights; `launch.predict --run` makes the map. The same
command again goes on where it was stopped.
"""

from __future__ import annotations

from typing import cast

from absl import flags

from olmoearth_jax import commands
from olmoearth_jax.maps import fine_tuning, from_archive, plan, tokens
from olmoearth_jax.maps.archive_scenes import ArchiveOptions
from olmoearth_jax.maps.fine_tuning import Options
from olmoearth_jax.maps.labelled import LabelOptions
from olmoearth_jax.maps.token_head import HeadOptions
from olmoearth_jax.maps.tokens import Settings
from olmoearth_jax.model.pooling import PoolingType

from . import _flags, _image_flags

FLAGS = flags.FlagValues()
"""This program's own flags; other programs have flags of the same names."""

_bool, _enum, _float, _integer, _list, _string = commands.definers(
    FLAGS, "bool enum float integer list string"
)

_image_flags.define(FLAGS)
_MODEL = _string("model", None, "Folder or published name.")
_YEAR = _string("year", None, "As --years, for one.")
_WIDTH = _integer("width", None, "The first bands of an archive only.", lower_bound=1)
_MONTHS = _string("months", None, "Window around each label's date, as -6:6.")
_LABELS = _string("labels", None, "File of labels, see above.")
_LABEL = _string("label_column", None, "Column of classes.")
_VALUE = _string("value_column", None, "Column of values.")
_UNIT = _string("unit", "", "Unit of the values.")
_CLASSES = _list("classes", None, "Names of the classes, in their order.")
_COLORS = _string("class_colors", None, ".json or .csv of colours by class.")
_RARE = _bool("drop_rare", False, "Leave out classes with fewer than 5 samples.")
_TOUCHED = _bool("all_touched", False, "Polygons take every pixel they touch.")
_IGNORE = _list("ignore_values", [], "Numbers of a label raster that are no label.")
_RESAMPLE = _enum("resample_labels", None, ["nearest"], "For a label raster on another grid.")
_BLOCK = _string("block", "auto", "Side of the blocks of the split in metres.")
_GAP = _float("gap", None, "Metres between training samples and other blocks.", lower_bound=0)
_SPLIT = _list("split", ["0.7", "0.15", "0.15"], "Shares of training, validation and test.")
_OUTPUT = _string("output", None, "Folder of the run.")
_MODE = _enum("mode", "probe", fine_tuning.MODES, "Train a linear head, or the whole encoder.")
_PATCH = _integer("patch_size", 4, "Side of a patch in pixels.", lower_bound=1)
_POOLING = _enum("pooling", "spatial", tokens.POOLINGS, "How patches become embeddings.")
_POOLING_TYPE = _enum("pooling_type", "mean", ["mean", "max"], "How tokens are pooled.")
_LOCATION = _integer("location_size", None, "Pixels per location (v1.3).", lower_bound=1)
_WINDOW = _integer("window", 64, "Side of a window in pixels.", lower_bound=1)
_OVERLAP = _integer("overlap", None, "Pixels that tiles of the map share.", lower_bound=0)
_BATCH = _integer("batch_size", 16, "Windows per call.", lower_bound=1)
_EPOCHS = _integer("epochs", None, "Most epochs: 100, or 50 with --mode=full.", lower_bound=1)
_PATIENCE = _integer("patience", 10, "Epochs without a better validation.", lower_bound=1)
_LR = _float("lr", None, "Learning rate: 0.01, or 0.0001 with --mode=full.")
_HEAD_BATCH = _integer("head_batch_size", 256, "Most tokens per step of the head.", lower_bound=1)
_WEIGHTS = _string("class_weights", "auto", "auto, balanced, none, or a .json file.")
_SEED = _integer("seed", 0, "Seed of the split and the training.", lower_bound=0)

_IMAGES_ONLY = ("model", "patch_size", "pooling", "pooling_type", "location_size", "overlap")
"""Flags without a meaning for an archive, whose embeddings are made."""


def options() -> Options:
    """The flags as options.

    Raises:
      ValueError: a flag is missing, or not of its form.
    """
    path, output = (_flags.needed(FLAGS, name) for name in ("labels", "output"))
    if _YEAR.value and FLAGS.years:
        raise ValueError("give --year or --years, one of them")
    years = [_YEAR.value] if _YEAR.value else FLAGS.years
    if len(_SPLIT.value) != 3:
        raise ValueError("--split takes three shares: training, validation, test")
    try:
        ignore = [float(v) for v in _IGNORE.value]
    except ValueError:
        raise ValueError(f"--ignore_values are numbers, got {','.join(_IGNORE.value)}") from None
    model = "" if FLAGS.archive else _flags.needed(FLAGS, "model")
    images = _image_flags.chosen(FLAGS, years, _WIDTH.value, _IMAGES_ONLY)
    labels = LabelOptions(
        path, _LABEL.value, _VALUE.value, None, _CLASSES.value, _COLORS.value,
        _RARE.value, _TOUCHED.value, ignore, _RESAMPLE.value, _BLOCK.value, _GAP.value,
        dict(zip(("train", "valid", "test"), _SPLIT.value, strict=True)), _UNIT.value,
        plan.months_of(_MONTHS.value) if _MONTHS.value else None,
    )  # fmt: skip
    epochs, lr = (50, 1e-4) if _MODE.value == "full" else (100, 1e-2)
    head = HeadOptions(
        _EPOCHS.value or epochs, _PATIENCE.value, lr if _LR.value is None else _LR.value,
        _HEAD_BATCH.value, _SEED.value,
    )  # fmt: skip
    settings = Settings(
        _PATCH.value, _POOLING.value, cast(PoolingType, _POOLING_TYPE.value), _LOCATION.value
    )
    return Options(
        model, images, labels, output, _MODE.value, settings, _WINDOW.value,
        _OVERLAP.value, _BATCH.value, head, _WEIGHTS.value, _SEED.value,
    )  # fmt: skip


def main() -> int:
    """Runs the program with the flags of the command line."""
    _image_flags.keep_memory_flat()
    o = options()
    run = from_archive.run if isinstance(o.images, ArchiveOptions) else fine_tuning.run
    run(o, commands.say)
    return 0


if __name__ == "__main__":
    _flags.run(main, FLAGS)
