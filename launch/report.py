"""Writes report.html of a training run: curves, pictures, settings, evaluations, in one file.

    python -m launch.report --run=local_output/my_run

A run writes it at its end; this renews it, also while the run goes on or after `launch.evaluate`.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from olmoearth_jax import commands

from . import _flags

FLAGS = flags.FlagValues()
"""This program's own flags; other programs have flags of the same names."""

_RUN = flags.DEFINE_string("run", None, "Folder of the run.", flag_values=FLAGS)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace a page that is not of this program.", flag_values=FLAGS
)


def main() -> int:
    """Writes the page."""
    from . import _run_page

    run = Path(_flags.needed(FLAGS, "run")).expanduser()
    print(_run_page.write(run, _OVERWRITE.value))
    return 0


if __name__ == "__main__":
    commands.run(lambda rest: _flags.guarded(main, rest), FLAGS)
