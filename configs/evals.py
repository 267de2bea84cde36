"""The catalogue of downstream tasks, as config files and the command line name them.

Records: olmoearth_jax/configlib/tasks.json (tasks) and datasets.json (data sets). A new task is one
record there; its data is found by the environment variable that `launch.evaluate --list` names.
"""

from __future__ import annotations

from olmoearth_jax.configlib import tasks
from olmoearth_jax.configlib.tasks import EvalTaskConfig
from olmoearth_jax.model.versions import VERSIONS


def get_tasks(which: str = "knn_lp") -> dict[str, EvalTaskConfig]:
    """Tasks of a catalogue: 'knn_lp', 'finetune', 'diagnostics', or the in-loop tasks of 'v1'...

    Raises:
      ValueError: another name.
    """
    if which in VERSIONS:
        return tasks.official_tasks(which)
    return tasks.catalogue(which)
