"""Checks a dataset file by file before it is trained on.

  python -m tools.verify_dataset --h5py_dir=DIR [--manifest=FILE] [--state=DIR2]

Opens and decodes every file; checks form, dates, tables, duplicates, and whether values look like
the units that training expects. Prints errors, warnings and a table of what each modality holds.
Exits 1 if there is any error. --manifest writes checksums, or compares with those of an earlier
run; the checksums that a conversion left in the folder are compared always. Several workers share
the files through the folder --state (--shard, --of); whoever finds all done prints the report.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from olmoearth_jax import commands, outputs
from olmoearth_jax import modalities as registry
from olmoearth_jax.data.blocks import ALONE
from olmoearth_jax.data.convert.run import CHECKSUM_FILE
from olmoearth_jax.data.pool import WorkerDied, default_workers
from olmoearth_jax.data.verify import (
    Report,
    compare_manifest,
    read_manifest,
    table_lines,
    verify,
    write_manifest,
)

from . import _workers

_SHOWN = 20
"""Lines printed of each kind."""


def _define_flags() -> None:
    flags.DEFINE_string("h5py_dir", None, "Dataset folder.", required=True)
    flags.DEFINE_string("manifest", None, "File of checksums, compared if it exists, else written.")
    flags.DEFINE_integer("max_files", None, "Check so many files only.", lower_bound=1)
    flags.DEFINE_string("modality_file", None, "JSON file of further modality records.")
    flags.DEFINE_integer("num_workers", None, "Worker processes; default: all cores but one.")
    flags.DEFINE_string("state", None, "Folder through which several workers share the files.")
    _workers.define_flags()
    flags.adopt_module_key_flags(_workers)


def _run(given: flags.FlagValues) -> Report:
    if given.modality_file:
        registry.register_file(given.modality_file)
    folder = Path(given.h5py_dir)
    workers = default_workers() if given.num_workers is None else given.num_workers
    state = Path(given.state) if given.state else None
    if state is None and (given.shard is not None or given.of is not None or given.wait):
        raise ValueError("--shard, --of and --wait need --state, a folder that the workers share")
    at = ALONE if state is None else _workers.place(given)
    manifest = Path(given.manifest) if given.manifest else None
    # Before the work, which may take hours.
    wanted = [p for p in (folder / CHECKSUM_FILE, manifest) if p is not None and p.is_file()]
    recorded = {path: read_manifest(path) for path in wanted}
    if manifest is not None and manifest not in recorded:
        outputs.check(manifest)
    report = verify(folder, workers, given.max_files, commands.say, state, at)
    for path, digests in recorded.items():
        report.errors += compare_manifest(path.name, digests, report.digests, folder)
    if manifest is not None and manifest not in recorded:
        write_manifest(manifest, report.digests)
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
    commands.run_alone(lambda: _workers.share(main), refusals=(ValueError, OSError, WorkerDied))
