"""From labels and an archive to a run: no images, no model, one class or value a token."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax.maps import fine_tuning, run_folder, run_report, token_head
from olmoearth_jax.maps import labelled as labelling
from olmoearth_jax.maps.archive import open_archive
from olmoearth_jax.maps.archive_scenes import (
    PIXEL,
    ArchiveOptions,
    ArchiveScene,
    ArchiveTokens,
    open_scenes,
    record_of,
    source_of,
    step_of,
)
from olmoearth_jax.maps.fine_tuning import Options, Say
from olmoearth_jax.maps.run_folder import Task
from olmoearth_jax.maps.tokens import Settings
from olmoearth_jax.outputs import SOFTWARE


def run(o: Options, say: Say = print) -> dict[str, Any]:
    """As `fine_tuning.run`, from an archive.

    Args:
      o: its options, with `ArchiveOptions` as images.

    Raises:
      ValueError: what cannot be used; nothing is written then.
    """
    _check(o)
    folder, images = Path(o.output).expanduser(), o.images
    assert isinstance(images, ArchiveOptions)
    archive = open_archive(images.path)
    step, about = step_of(archive), record_of(archive, images.width)
    scenes, notes = open_scenes(images, archive, False)
    side = -(-o.window // step) * step
    found = labelling.read(o.labels, scenes, side, step, step, o.seed)
    found.notes[:0] = notes
    fine_tuning.check_weights(o, found.target)
    record = fine_tuning.settings_record(o) | {
        "archive": about, "source": source_of(archive),
        "periods": [s.period.name for s in scenes], "window": side,
    }  # fmt: skip
    fresh = not folder.exists()
    run_folder.claim(folder, record, {"software": SOFTWARE})
    with run_folder.alone(folder):
        if (folder / run_folder.REPORT).is_file():
            say(f"{folder} is finished already")
            return json.loads((folder / run_folder.REPORT).read_text())
        for note in found.notes:
            say(note)
        reader = ArchiveTokens(step, images.width)
        return _train(o, folder, reader, side, about, scenes, found, fresh, say)


def _train(
    o: Options, folder: Path, reader: ArchiveTokens, side: int, about: dict[str, Any],
    scenes: Sequence[ArchiveScene], found: labelling.Labelled, fresh: bool, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Trains the head, scores it, and writes the folder."""
    tokens = fine_tuning.read_splits(folder, reader, scenes, found, lambda s: True, fresh, say)
    train, valid = tokens["train"], tokens.get("valid", tokens["train"])
    target, log = found.target, []
    counts = fine_tuning.class_counts(target, train)
    weights = fine_tuning.weights_of(o, target, counts, say)
    pairs = (train.x, train.labels), (valid.x, valid.labels)
    head = token_head.fit(target, *pairs, o.head, weights, log.append, train.weights)
    run_folder.save_arrays(
        folder / "weights" / "head.npz", {"params": head.params, "stats": head.stats}
    )
    more = {
        "archive": about, "column": o.labels.label_column or o.labels.value_column,
        "seed": o.seed, "overlap": 0, "labels": found.counts, "block": found.split.side,
        "training_labels": counts.tolist(), "software": SOFTWARE,
        "class_weights": None if weights is None else weights.tolist(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    task = Task(
        "probe", str(about["model"]), str(about["model_digest"]), Settings(reader.step), side,
        PIXEL, {}, 0, target, head.scale, more,
    )  # fmt: skip
    run_folder.write_json(folder / run_folder.TASK, task.to_json())
    guesses = {s: head(t.x) for s, t in tokens.items()}
    o = dataclasses.replace(o, model=str(about["model"]))
    return run_report.write(folder, o, found, tokens, guesses, {}, counts, log, scenes, say)


def _check(o: Options) -> None:
    """Raises ValueError if options do not go with an archive."""
    fine_tuning.check(o)
    if o.mode != "probe":
        raise ValueError("an archive holds embeddings of a frozen model: take --mode=probe")
    if o.labels.months is not None:
        raise ValueError("--months does not go with --archive, whose periods are fixed")
