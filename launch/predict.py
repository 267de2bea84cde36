"""Makes the map of a run of `launch.finetune` on images.

    python -m launch.predict --run=runs/crops --inputs=imagery_2024.csv --output=maps/crops_2024
    python -m launch.predict --run=runs/crops --archive=/data/paraguay --years=2023,2024 \\
        --output=maps/crops
    python -m launch.predict ...same flags... --shard=$I --of=64      any number of workers

The images must fit those of the training: modalities, bands, size of pixels, number of timesteps.
The folder --output then holds classes.tif and probabilities.tif (or values.tif), areas.csv and a
STAC item; a folder for each period or grid if there are several. Workers may come, go and be
killed; the same command again goes on, and whoever finds all blocks done puts them together.

Exit codes: 0 nothing is left to do here, 1 some blocks failed, 2 a mistake of the user, 75 stopped
by SIGTERM.
"""

from __future__ import annotations

import sys

from absl import flags

from olmoearth_jax import commands
from olmoearth_jax.data import work_list, worker_place
from olmoearth_jax.maps import map_files, predicting
from olmoearth_jax.maps.predicting import Options

from . import _flags, _image_flags

FLAGS = flags.FlagValues()
"""This program's own flags; other programs have flags of the same names."""

_bool, _enum, _integer, _list, _string = commands.definers(FLAGS, "bool enum integer list string")

_image_flags.define(FLAGS)
_RUN = _string("run", None, "Folder of a finished launch.finetune.")
_OUTPUT = _string("output", None, "Folder of the map.")
_MODEL = _string("model", None, "Where the model lies, if not where the run had it.")
_AREA = _string("area", None, "File of polygons; outside of them is no data.")
_OVERLAP = _integer("overlap", None, "Pixels that tiles share; as in the run.", lower_bound=0)
_BATCH = _integer("batch_size", 16, "Windows per call.", lower_bound=1)
_BLOCK = _integer("block", 1024, "Pixels per side of the unit of work.", lower_bound=64)
_PROBABILITIES = _enum("probabilities", "uint8", map_files.PROBABILITIES, "Form of the file.")
_SHARD = _integer("shard", None, "Number of this worker, from 0.")
_OF = _integer("of", None, "Number of workers.")
_STEAL = _bool("steal", True, "Take the blocks of others when the own ones are done.")
_WAIT = _bool("wait", False, "Wait for blocks that other workers hold.")
_ATTEMPTS = _integer("attempts", 3, "Times that a block is tried.", lower_bound=1)
_DEVICE = _integer("device", None, "Number of the device to use.", lower_bound=0)


def options() -> Options:
    """The flags as options.

    Raises:
      ValueError: a flag is missing, or not of its form.
    """
    run, output = (_flags.needed(FLAGS, n) for n in ("run", "output"))
    index, count = worker_place.place_of(_SHARD.value, _OF.value)
    images = _image_flags.chosen(FLAGS, FLAGS.years, None, ("model", "overlap"))
    return Options(
        run, images, output, _MODEL.value, _OVERLAP.value, _BATCH.value, _BLOCK.value,
        _PROBABILITIES.value, _AREA.value, index, count, _STEAL.value, _WAIT.value, _ATTEMPTS.value,
    )  # fmt: skip


def main() -> int:
    """Runs the program with the flags of the command line."""
    _image_flags.keep_memory_flat()
    o = options()
    _flags.take_device(_DEVICE.value)
    try:
        with work_list.stopping():
            found = predicting.run(o, commands.say)
    except work_list.Stopped:
        print("stopped; run it again to go on", file=sys.stderr)
        return work_list.STOPPED
    for unit, error in found.failed.items():
        print(f"failed: {unit}: {error}", file=sys.stderr)
    if found.failed:
        print(
            f"{len(found.failed)} blocks failed {o.attempts} times: mend their inputs and start "
            f"again with --attempts={2 * o.attempts}"
        )
    if found.busy:
        print(f"{len(found.busy)} blocks are with other workers")
    return 1 if found.failed else 0


if __name__ == "__main__":
    _flags.run(main, FLAGS)
