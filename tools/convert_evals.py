"""Prepares published evaluation data in the form that the readers take.

    python -m tools.convert_evals pastis --source=PASTIS-R --target=DIR [--whole_patches]
    python -m tools.convert_evals mados --source=MADOS --target=DIR
    python -m tools.convert_evals floods --source=Sen1Floods11 --target=DIR
    python -m tools.convert_evals geobench2 --source=FOLDER_OF_TORTILLAS --target=DIR
    python -m tools.convert_evals quantiles --checkpoint=RUN --h5py_dir=DIR --target=FILE.h5

`quantiles` fits the buckets of percentile quantisation on patch embeddings of pretraining data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from olmoearth_jax.files import replacing
from olmoearth_jax.inference import quantize
from olmoearth_jax.outputs import MARK, check, claim, expand_home

# What takes seconds to import is imported where it is used: help and mistakes need none of it.


def _convert_pastis(source: Path, target: Path, whole: bool, overwrite: bool = False) -> None:
    """All three splits of PASTIS-R."""
    from .evaldata import pastis

    for split in pastis.FOLDS:
        claim(target / f"pastis_r_{split}", overwrite)
    for split in pastis.FOLDS:
        count = pastis.convert(source, target, split, cut=not whole)
        print(f"{split}: {count} samples")


def _convert_mados(source: Path, target: Path, overwrite: bool = False) -> None:
    """All three splits of MADOS, from its split files."""
    from .evaldata import mados

    files = {split: target / f"MADOS_{split}.npz" for split in ("train", "val", "test")}
    for path in files.values():
        check(path, overwrite=overwrite)
    target.mkdir(parents=True, exist_ok=True)
    for split, path in files.items():
        images, labels = mados.convert(source, source / "splits" / f"{split}_X.txt")
        _save(path, images=images, labels=labels)
        print(f"{split}: {len(images)} tiles")


def _convert_floods(source: Path, target: Path, overwrite: bool = False) -> None:
    """All splits of Sen1Floods11 whose table flood_<split>_data.csv is below `source`."""
    from .evaldata import floods

    tables = sorted(source.glob("**/flood_*_data.csv"))
    if not tables:
        raise ValueError(f"{source} holds no flood_<split>_data.csv")
    files = [target / f"{table.stem}.npz" for table in tables]
    if twice := next((p for p in files if files.count(p) > 1), None):
        raise ValueError(f"{source} holds several {twice.stem}.csv; name the folder of one of them")
    for path in files:
        check(path, overwrite=overwrite)
    target.mkdir(parents=True, exist_ok=True)
    for table, path in zip(tables, files, strict=True):
        tiles = floods.convert(source, table)
        _save(path, s1=tiles["s1"], labels=tiles["labels"])
        print(f"{table.stem}: {len(tiles['labels'])} tiles")


def _save(path: Path, **arrays: Any) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, software=np.array(MARK))


def fit_buckets(x: np.ndarray, bits: int) -> quantize.Buckets:
    """Buckets of equal population from embeddings [N, D].

    Raises:
      ValueError: a bit depth other than 1, 2, 4 or 8.
    """
    quantize.check_bits(bits)
    n = 2**bits
    edges = np.percentile(x, np.arange(n + 1) / n * 100, axis=0).T
    middles = np.percentile(x, (np.arange(n) + 0.5) / n * 100, axis=0).T
    return quantize.Buckets(edges.astype(np.float32), middles.astype(np.float32))


def save_buckets(path: str | Path, tables: dict[int, quantize.Buckets]) -> None:
    """Writes quantile tables by bit depth as HDF5 groups '8bit' ... '1bit' and the scalar 'dim'."""
    with replacing(Path(path)) as temporary, h5py.File(temporary, "w") as f:
        f.attrs["software"] = MARK
        for bits, table in tables.items():
            group = f.create_group(f"{bits}bit")
            group["quantiles"], group["midpoints"] = table.quantiles, table.midpoints
            f.attrs["dim"] = len(table.quantiles)
        f["dim"] = f.attrs["dim"]


def _fit_quantiles(
    run: str, h5py_dir: str, target: Path, samples: int, overwrite: bool = False
) -> None:
    """Bucket tables of every bit depth from patch embeddings (patch size 4, mean pooling)."""
    from olmoearth_jax.configlib.tasks import EvalTaskConfig
    from olmoearth_jax.evals import models
    from olmoearth_jax.evals.datasets import open_split
    from olmoearth_jax.evals.embeddings import Extraction, extract
    from olmoearth_jax.model.pooling import Pooling

    check(target, Path(h5py_dir).glob("*.h5"), overwrite)
    model = models.load_checkpoint(run).model
    task = EvalTaskConfig(
        dataset="pretrain_subset", eval_mode="embedding_diagnostics",
        h5py_dir=h5py_dir, pretrain_max_samples=samples,
        input_modalities=[m for m in ("sentinel2_l2a",) if m in model.modalities],
    )  # fmt: skip
    split = open_split("quantiles", task, "train")
    how = Extraction(4, Pooling(place="spatial"), 8)
    x, _ = extract(model, split, split.modalities, how)
    flat = x.reshape(-1, x.shape[-1])
    tables = {bits: fit_buckets(flat, bits) for bits in quantize.BITS}
    save_buckets(target, tables)
    print(f"{len(flat)} embeddings of {flat.shape[1]} dimensions -> {target}")


def _convert(args: argparse.Namespace) -> None:
    """Does what the arguments say."""
    from olmoearth_jax.evals.datasets.base import of_another_form

    with of_another_form(f"what lies in {args.source or args.h5py_dir}"):
        if args.what == "pastis":
            _convert_pastis(args.source, args.target, args.whole_patches, args.overwrite)
        elif args.what == "mados":
            _convert_mados(args.source, args.target, args.overwrite)
        elif args.what == "floods":
            _convert_floods(args.source, args.target, args.overwrite)
        elif args.what == "geobench2":
            from .evaldata import geobench2

            found = geobench2.convert(args.source, args.target, args.overwrite)
            for name, count in found.items():
                print(f"{name}: {count} samples")
        else:
            _fit_quantiles(
                args.checkpoint, args.h5py_dir, args.target, args.samples, args.overwrite
            )


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 for a mistake in the arguments or the data."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["pastis", "mados", "floods", "geobench2", "quantiles"])
    parser.add_argument("--source", type=Path)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--whole_patches", action="store_true")
    parser.add_argument("--checkpoint")
    parser.add_argument("--h5py_dir")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that are not of this program"
    )
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--helpshort", "--helpfull", action="help", help="as --help")
    args = parser.parse_args(argv)
    needed = ("checkpoint", "h5py_dir") if args.what == "quantiles" else ("source",)
    missing = [n for n in needed if getattr(args, n) is None]
    if missing:
        parser.error(f"{args.what} needs --{missing[0]}")
    try:
        _convert(args)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(expand_home(sys.argv)[1:]))
