"""Checks a dataset file by file before it is trained on.

  python -m tools.verify_dataset --h5py_dir=DIR [--manifest=FILE]

Opens and decodes every file; checks form, dates, tables, duplicates, and whether values look like
the units that training expects. Prints errors, warnings and a table of what each modality holds.
Exits 1 if there is any error. --manifest writes checksums, or compares with those of an earlier
run; the checksums that a conversion left in the folder are compared always.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from olmoearth_jax import commands
from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert.run import CHECKSUM_FILE
from olmoearth_jax.data.pool import WorkerDied, default_workers
from olmoearth_jax.data.verify import (
    Report,
    compare_manifest,
    table_lines,
    verify,
    write_manifest,
)

_SHOWN = 20
"""Lines printed of each kind."""


def _define_flags() -> None:
    flags.DEFINE_string("h5py_dir", None, "Dataset folder.", required=True)
    flags.DEFINE_string("manifest", None, "File of checksums, compared if it exists, else written.")
    flags.DEFINE_integer("max_files", None, "Check so many files only.", lower_bound=1)
    flags.DEFINE_string("modality_file", None, "JSON file of further modality records.")
    flags.DEFINE_integer("num_workers", None, "Worker processes; default: all cores but one.")


def _run(given: flags.FlagValues) -> Report:
    if given.modality_file:
        registry.register_file(given.modality_file)
    folder = Path(given.h5py_dir)
    workers = default_workers() if given.num_workers is None else given.num_workers
    report = verify(folder, workers, given.max_files, commands.say)
    if (folder / CHECKSUM_FILE).is_file():
        report.errors += compare_manifest(folder / CHECKSUM_FILE, report.digests)
    if given.manifest and Path(given.manifest).is_file():
        report.errors += compare_manifest(Path(given.manifest), report.digests)
    elif given.manifest:
        write_manifest(Path(given.manifest), report.digests)
    return report


def main() -> None:
    report = _run(flags.FLAGS)
    print("\n".join(table_lines(report)))
    for kind, lines in (("error", report.errors), ("warning", report.warnings)):
        for line in lines[:_SHOWN]:
            print(f"{kind}: {line}")
        if len(lines) > _SHOWN:
            print(f"{kind}: and {len(lines) - _SHOWN} more")
    print(
        f"{len(report.digests)} files read, {len(report.errors)} errors, "
        f"{len(report.warnings)} warnings"
    )
    sys.exit(1 if report.errors else 0)


if __name__ == "__main__":
    _define_flags()
    commands.run_alone(main, refusals=(ValueError, OSError, WorkerDied))
