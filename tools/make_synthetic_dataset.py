"""Makes a synthetic dataset in the published layout, for tests, benchmarks and first steps.

  python -m tools.make_synthetic_dataset --output_dir=DIR --num_samples=64

Holds the nine official modalities over twelve months: smooth terrain, patches of land cover that
drive spectra, radar and maps, seasons, clouds, and gaps in time and between modalities. The arrays
depend only on the seed, the sample's number and the sizes. Prints the dataset's folder last.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import shutil
from pathlib import Path

import numpy as np
from absl import flags

from olmoearth_jax import commands
from olmoearth_jax import modalities as registry
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.h5_writer import COMPRESSIONS, Storage, write_sample, write_tables
from olmoearth_jax.modalities import OFFICIAL_MODALITIES

STEPS = 12
SERIES = ("sentinel2_l2a", "sentinel1", "landsat")
WATER, BUILT, CROP, GRASS, TREE, BARE = range(6)
COVER_CODE = np.array([80, 50, 40, 30, 10, 60], np.uint8)

# Per cover class, on the scale of normalised values (0.5 is an average pixel): brightness in the
# visible, near infrared and short-wave infrared, share of it that follows the season (leaves),
# and radar backscatter. Rough figures of field spectra; only their order matters.
_VISIBLE = np.array([0.40, 0.56, 0.50, 0.47, 0.42, 0.60])
_NEAR_IR = np.array([0.28, 0.46, 0.56, 0.58, 0.62, 0.52])
_SHORT_IR = np.array([0.26, 0.54, 0.52, 0.50, 0.40, 0.64])
_LEAVES = np.array([0.00, 0.02, 0.16, 0.10, 0.06, 0.01])
_RADAR = np.array([0.22, 0.70, 0.50, 0.45, 0.56, 0.36])

_NEAR_IR_BANDS = {"sentinel2_l2a": ("B08", "B07", "B8A", "B06"), "landsat": ("B5",)}
_SHORT_IR_BANDS = {"sentinel2_l2a": ("B11", "B12"), "landsat": ("B6", "B7")}
_THERMAL_BANDS = {"sentinel2_l2a": (), "landsat": ("B10", "B11")}


@dataclasses.dataclass(frozen=True)
class Gaps:
    """How much is missing: share of the timesteps, and of the modalities, of a sample."""

    timesteps: float = 0.2
    modalities: float = 0.1


def smooth_field(draw: np.random.Generator, side: int, scale: float) -> np.ndarray:
    """float64 [side, side] of unit variance that varies over about `scale` pixels."""
    knots = int(np.ceil(side / scale)) + 2
    at = np.arange(side) / scale
    low = at.astype(int)
    weights = np.zeros((side, knots))
    weights[np.arange(side), low] = 1 - (at - low)
    weights[np.arange(side), low + 1] = at - low
    field = weights @ draw.standard_normal((knots, knots)) @ weights.T
    return (field - field.mean()) / max(field.std(), 1e-6)


def land_cover(draw: np.random.Generator, side: int, height: np.ndarray) -> np.ndarray:
    """int [side, side] of cover classes: patches that lean on the terrain."""
    scores = np.stack([smooth_field(draw, side, side / 5) for _ in COVER_CODE])
    scores += 0.5 * np.stack([smooth_field(draw, side, side / 16) for _ in COVER_CODE])
    scores[WATER] -= 0.8 * height + 0.6
    scores[BUILT] -= 0.5 + 0.3 * np.abs(height)
    scores[TREE] += 0.5 * height
    scores[BARE] -= 0.6
    return np.argmax(scores, axis=0)


def optical(
    draw: np.random.Generator, name: str, cover: np.ndarray, season: np.ndarray
) -> np.ndarray:
    """uint16 [side, side, 12, bands] of Sentinel-2 or Landsat counts with drifting clouds."""
    modality, side = registry.get(name), len(cover)
    limits = modality.norm_range()
    assert limits is not None
    texture = 0.03 * smooth_field(draw, side, 3.0)[..., None]
    leaves = _LEAVES[cover][..., None] * season
    out = np.empty((side, side, STEPS, modality.num_bands), np.uint16)
    cloud = np.stack([_cloud(draw, side) for _ in range(STEPS)], axis=-1)
    for b, band in enumerate(modality.bands):
        if band in _NEAR_IR_BANDS[name]:
            value = _NEAR_IR[cover][..., None] + leaves
        elif band in _SHORT_IR_BANDS[name]:
            value = _SHORT_IR[cover][..., None] - 0.4 * leaves
        elif band in _THERMAL_BANDS[name]:
            value = 0.5 + 0.2 * season + 0.1 * (_SHORT_IR[cover][..., None] - 0.5)
        else:
            value = _VISIBLE[cover][..., None] - 0.5 * leaves
        value = value + texture + 0.01 * draw.standard_normal((side, side, STEPS))
        value = value * (1 - cloud) + 0.95 * cloud
        lo, hi = limits[0][b], limits[1][b]
        out[..., b] = _coarse(np.clip(lo + value * (hi - lo), 1, 65535), modality, b)
    return out


def _coarse(values: np.ndarray, modality: registry.Modality, band: int) -> np.ndarray:
    """Repeats every k-th pixel k times, as coarser bands look after being brought to 10 m."""
    factor = next(
        f
        for bands, f in zip(modality.band_sets, modality.band_set_resolutions, strict=True)
        if band in bands
    )
    k, side = factor // 16, len(values)
    return np.repeat(np.repeat(values[::k, ::k], k, 0), k, 1)[:side, :side]


def _cloud(draw: np.random.Generator, side: int) -> np.ndarray:
    """Cloud cover in [0, 1]; most dates are clear."""
    if draw.random() > 0.3:
        return np.zeros((side, side))
    return np.clip(smooth_field(draw, side, side / 4) - draw.uniform(0, 1.5), 0, 1)


def radar(draw: np.random.Generator, cover: np.ndarray, season: np.ndarray) -> np.ndarray:
    """float32 [side, side, 12, 2] of backscatter in dB with speckle."""
    modality, side = registry.get("sentinel1"), len(cover)
    limits = modality.norm_range()
    assert limits is not None
    value = _RADAR[cover][..., None, None] + 0.3 * (_LEAVES[cover][..., None] * season)[..., None]
    speckle = 0.06 * draw.standard_normal((side, side, STEPS, modality.num_bands))
    return (limits[0] + (value + speckle) * (limits[1] - limits[0])).astype(np.float32)


def maps(draw: np.random.Generator, cover: np.ndarray, height: np.ndarray) -> dict[str, np.ndarray]:
    """The static maps [side, side, 1, bands] that follow from cover and terrain."""
    side = len(cover)
    fields = smooth_field(draw, side, side / 8)
    crop_kind = np.digitize(fields, (-0.8, 0.0, 0.8))  # 0 to 3
    trees = np.clip(12 + 5 * fields, 1, 40) * (cover == TREE)
    cereal = np.zeros((side, side, registry.get("worldcereal").num_bands), np.float32)
    for band in range(cereal.shape[-1]):
        grown = cover == CROP if band == 0 else (cover == CROP) & (crop_kind == band % 4)
        cereal[..., band] = 100.0 * grown
    crops = np.array([1, 5, 24, 36], np.uint8)[crop_kind]
    other = np.array([111, 122, 0, 176, 141, 131], np.uint8)[cover]
    out = {
        "worldcover": COVER_CODE[cover][..., None],
        "srtm": np.maximum(250 + 180 * height, -400).astype(np.int32)[..., None],
        "wri_canopy_height_map": trees.astype(np.uint8)[..., None],
        "cdl": np.where(cover == CROP, crops, other).astype(np.uint8)[..., None],
        "worldcereal": cereal,
        "openstreetmap_raster": _street_map(draw, cover),
    }
    return {name: array[:, :, None, :] for name, array in out.items()}


def _street_map(draw: np.random.Generator, cover: np.ndarray) -> np.ndarray:
    """uint8 0/1 [side, side, 30]: water, buildings, farmland and a few straight roads."""
    names, side = registry.get("openstreetmap_raster").bands, len(cover)
    out = np.zeros((side, side, len(names)), np.uint8)

    def put(name: str, where: np.ndarray) -> None:
        out[..., names.index(name)] |= where.astype(np.uint8)

    put("river", cover == WATER)
    put("building", (cover == BUILT) & (draw.random((side, side)) < 0.5))
    put("leisure", (cover == GRASS) & (smooth_field(draw, side, side / 4) > 1))
    rows, cols = np.mgrid[:side, :side]
    for _ in range(3):
        angle, offset = draw.uniform(0, np.pi), draw.uniform(0.2, 0.8) * side
        distance = (rows - offset) * np.cos(angle) + (cols - side / 2) * np.sin(angle)
        put("highway", np.abs(distance) < 0.7)
    return out


def make_sample(seed: int, number: int, tile_px: int, gaps: Gaps):
    """(arrays, timestamps, masks, latlon) of one sample, as `write_sample` takes them."""
    draw = rng(seed, "synthetic sample", number)
    latlon = np.array([draw.uniform(-55, 70), draw.uniform(-180, 180)])
    day = datetime.date(2016, 1, 1) + datetime.timedelta(days=int(draw.integers(0, 5 * 365)))
    dates = [day + datetime.timedelta(days=30 * i) for i in range(STEPS)]
    stamps = np.array([(d.day, d.month - 1, d.year) for d in dates], np.int32)
    year_part = np.array([d.timetuple().tm_yday / 365.25 for d in dates])
    warmth = -np.cos(2 * np.pi * (year_part - 0.05))
    season = warmth * np.sign(latlon[0]) * min(1.0, abs(latlon[0]) / 35)
    height = smooth_field(draw, tile_px, tile_px / 3)
    height = height + 0.2 * smooth_field(draw, tile_px, tile_px / 20)
    cover = land_cover(draw, tile_px, height)
    arrays = {
        "sentinel2_l2a": optical(draw, "sentinel2_l2a", cover, season),
        "landsat": optical(draw, "landsat", cover, season),
        "sentinel1": radar(draw, cover, season),
        **maps(draw, cover, height),
    }
    return (*_with_gaps(draw, arrays, stamps, gaps), latlon)


def _with_gaps(draw: np.random.Generator, arrays, stamps: np.ndarray, gaps: Gaps):
    """Drops modalities and timesteps; one series always keeps all twelve, as in converted data."""
    whole = SERIES[draw.integers(len(SERIES))]
    masks, kept = {}, {}
    for name in OFFICIAL_MODALITIES:
        absent, steps = draw.random() < gaps.modalities, draw.random(STEPS) >= gaps.timesteps
        if absent and name != whole:
            continue
        array = arrays[name]
        if name in SERIES:
            steps = np.ones(STEPS, bool) if name == whole else steps
            if not steps.any():
                continue
            masks[name], array = steps, array[:, :, steps]
        kept[name] = array
    return kept, stamps, masks


def make_dataset(
    output_dir: str | Path,
    num_samples: int,
    *,
    tile_px: int = 128,
    seed: int = 0,
    storage: Storage | None = None,
    gaps: Gaps | None = None,
    int64_timestamps: bool = False,
    progress: bool = False,
) -> Path:
    """Writes a synthetic dataset and returns its folder.

    Args:
      output_dir: folder in which the dataset's own folder is made.
      num_samples: samples to make.
      tile_px: side of a sample in 10 m pixels.
      seed: of everything.
      storage: compression and chunks; None for zstd level 3 in whole-array chunks.
      gaps: what is missing.
      int64_timestamps: store timestamps as older files do.
      progress: print a line now and then.

    Raises:
      ValueError: sizes below 1 or 8 pixels, shares outside [0, 1), or an existing dataset.
    """
    storage, gaps = storage or Storage(), gaps or Gaps()
    if num_samples < 1 or tile_px < 8:
        raise ValueError(f"need at least 1 sample of at least 8 px, got {num_samples}, {tile_px}")
    if not (0 <= gaps.timesteps < 1 and 0 <= gaps.modalities < 1):
        raise ValueError(f"missing shares must be in [0, 1), got {gaps}")
    final = Path(output_dir) / storage.folder(OFFICIAL_MODALITIES, num_samples, tile_px)
    if final.exists():
        raise ValueError(f"the dataset folder exists already: {final}")
    folder = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    rows, centres = [], []
    try:
        for number in range(num_samples):
            arrays, stamps, masks, latlon = make_sample(seed, number, tile_px, gaps)
            stamps = stamps.astype(np.int64 if int64_timestamps else np.int32)
            path = folder / f"sample_{number}.h5"
            write_sample(path, arrays, stamps, masks, latlon, storage)
            rows.append([number, *(int(n in arrays) for n in OFFICIAL_MODALITIES)])
            centres.append(latlon)
            if progress and (number + 1) % 50 == 0:
                print(f"{number + 1} of {num_samples} samples", flush=True)
        write_tables(folder, OFFICIAL_MODALITIES, rows, np.stack(centres), storage)
        os.replace(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return final


def _define_flags() -> None:
    flags.DEFINE_string("output_dir", None, "Folder to make the dataset in.", required=True)
    flags.DEFINE_integer("num_samples", 64, "Samples.", lower_bound=1)
    flags.DEFINE_integer("tile_px", 128, "Side of a sample in 10 m pixels.", lower_bound=8)
    flags.DEFINE_integer("seed", 0, "Seed of everything.")
    flags.DEFINE_enum("compression", "zstd", COMPRESSIONS, "How arrays are compressed.")
    flags.DEFINE_integer("level", 3, "Level of gzip or zstd.")
    flags.DEFINE_integer("chunk_hw", None, "Side of spatial chunks; default one chunk per array.")
    flags.DEFINE_bool("int64_timestamps", False, "Store timestamps as older files do.")
    flags.DEFINE_float("missing_fraction", 0.2, "Share of missing timesteps.")
    flags.DEFINE_float("missing_modality_fraction", 0.1, "Share of missing modalities.")


def main() -> None:
    given = flags.FLAGS
    level = given.level if given.compression in ("gzip", "zstd") else None
    folder = make_dataset(
        given.output_dir,
        given.num_samples,
        tile_px=given.tile_px,
        seed=given.seed,
        storage=Storage(given.compression, level, chunk_px=given.chunk_hw),
        gaps=Gaps(given.missing_fraction, given.missing_modality_fraction),
        int64_timestamps=given.int64_timestamps,
        progress=True,
    )
    print(folder)


if __name__ == "__main__":
    _define_flags()
    commands.run_alone(main)
