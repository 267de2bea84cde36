"""tools.learned: intervals and verdicts."""

import math
import types

import numpy as np
import pytest

from configs import common
from olmoearth_jax.configlib import tasks
from olmoearth_jax.evals import models, runner
from tools import learned


def every(value: float) -> learned.Scores:
    return {(task, split): value for task in learned.TASKS for split in learned.SPLITS}


def test_intervals():
    mean, half = learned.interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert math.isnan(learned.interval([0.1])[1])
    many = [0.1, 0.3] * 8
    spread = math.sqrt(16 * 0.01 / 15)
    assert learned.interval(many)[1] == pytest.approx(2.262 * spread / 4)


def test_a_gain_counts_only_beyond_its_interval():
    fresh = [every(x) for x in (0.10, 0.20, 0.30)]
    lines, said = learned.table([every(x) for x in (0.14, 0.25, 0.34)], fresh, every(0.2))
    assert all("better than untrained beyond" in x and "not better" not in x for x in said)
    assert all("above raw bands" in x for x in said) and len(said) == 4
    assert "+0.043 ± 0.014" in lines[2]
    _, said = learned.table([every(x) for x in (0.14, 0.15, 0.34)], fresh, every(0.9))
    assert all("not better" in x and "below raw bands" in x for x in said)
    _, said = learned.table([every(0.5)], [every(0.1)], every(0.2))
    assert all("one seed says nothing" in x for x in said)


def test_both_tasks_judge_embeddings_that_are_made_once(monkeypatch):
    caches = []

    def scored(name, task, model, options, hooks):
        caches.append(hooks.cache)
        part = types.SimpleNamespace(primary=0.5)
        return types.SimpleNamespace(valid=part, test=part)

    monkeypatch.setattr(learned, "run_task", scored)
    assert learned.scores(models.baseline("raw_bands").model, 2) == every(0.5)
    assert len(caches) == 2 and caches[0] is caches[1] is not None
    found = tasks.change_all(tasks.select(tasks.catalogue(), list(learned.TASKS)), patch_size=2)
    assert len({runner._encoding(task, tasks.RunOptions()) for task in found.values()}) == 1


def test_the_picture_shows_image_land_use_and_features():
    config = common.config("smoke", "nano", version="v1")
    model = learned.untrained(config.to_dict())
    image = learned.picture(model, model, 16)
    crop, gap = 64 * 3, 6
    assert image.dtype == np.uint8 and image.shape == (3 * crop + 2 * gap, 4 * crop + 3 * gap, 3)
    columns = [image[:, i * (crop + gap) :][:, :crop] for i in range(4)]
    assert (columns[2] == columns[3]).all() and not (columns[0] == columns[1]).all()
    assert len(np.unique(columns[1][:crop].reshape(-1, 3), axis=0)) > 2  # land use
    patch = columns[2][: 16 * 3, : 16 * 3].reshape(-1, 3)
    assert (patch == patch[0]).all()
    assert (image[crop : crop + gap] == 255).all()


def test_a_picture_replaces_no_file_of_others_and_is_told_before_the_work(tmp_path):
    mine = tmp_path / "mine.png"
    mine.write_text("a user's")
    learned.FLAGS(["learned", f"--picture={mine}"])
    try:
        with pytest.raises(SystemExit, match="mine.png exists and was not written"):
            learned.main(["learned", str(tmp_path / "no_run")])
    finally:
        learned.FLAGS(["learned", "--picture="])
        learned.FLAGS.unparse_flags()
    assert mine.read_text() == "a user's"
