"""Checkpoints: the only module that knows Orbax.

`checkpoints/<step>/` holds one item per part of the state (`params`, `target`, `opt_state`) and
`meta`, a JSON record with all that a person or a program needs to resume, evaluate or embed. An
item can be read alone, on any number of devices.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from olmoearth_jax.checkpoints import integrity, optimizer_state
from olmoearth_jax.checkpoints.folders import complete_steps, damaged_steps, find_checkpoint
from olmoearth_jax.checkpoints.kept import Kept, promised
from olmoearth_jax.configlib import gone
from olmoearth_jax.platforms import HostMissing

log = logging.getLogger(__name__)

State = dict[str, Any]
Meta = dict[str, Any]

_META_FORMAT = 1
_OPTIMIZER = "opt_state"
_STEP = "step"  # the part of the state that travels in `meta`


@dataclass(frozen=True)
class RunInfo:
    """What every checkpoint of a run says about the run; all values must be ready for JSON."""

    config: Mapping[str, Any] = field(default_factory=dict)
    normalization: Mapping[str, Any] = field(default_factory=dict)
    dataset_fingerprint: str = ""
    dataset_content: str = ""
    seed: int = 0
    steps_per_epoch: int = 1


class Checkpointer:
    """Writes and restores the checkpoints of one run.

    Every `save_interval` steps a checkpoint is kept for good; every `ephemeral_interval` steps
    (None: never) one is written that lives until the next is complete. Saving happens in the
    background. A save that fails (disk full, ...) is logged and leaves older checkpoints alone.
    """

    def __init__(
        self,
        folder: Path,
        info: RunInfo,
        *,
        save_interval: int,
        ephemeral_interval: int | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.info = info
        self.save_interval = save_interval
        self.ephemeral_interval = ephemeral_interval
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._writing: int | None = None  # as _saving, but kept for Orbax's thread
        self.on_disk: int | None = None  # step whose checkpoint is known to be complete
        self.kept = Kept()  # whose step is kept for good too

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None and issubclass(kind, HostMissing):
            self._manager = None  # a save in progress would wait for the missing process
        self.close()

    def due(self, step: int) -> bool:
        """Is a checkpoint to be written after this step?"""
        intervals = (self.save_interval, self.ephemeral_interval)
        return any(interval and step % interval == 0 for interval in intervals)

    def latest_complete(self) -> int | None:
        """Step of the newest checkpoint that was written to its end, or None."""
        return max(complete_steps(self.folder), default=None)

    def check_space(self, state: State, last_step: int) -> None:
        """Raises ValueError if checkpoints of such a state can't fit; warns if they may not."""
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            permanent = last_step // self.save_interval if self.save_interval else 0
            size = integrity.tree_bytes(state)
            if warning := integrity.check_free_space(self.folder, size, permanent):
                log.warning(warning)

    def save(self, step: int, state: State, **extra: Any) -> bool:
        """Starts writing the state after `step` steps; the state may be donated afterwards.

        `extra` goes into the meta record. Returns False if this save, or the one before it that
        was still being written, has failed.
        """
        before = self.wait()
        if step == self.on_disk:
            return before
        permanent = bool(self.save_interval) and step % self.save_interval == 0
        meta = self._meta(step, state, with_digest=permanent) | extra
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        self._saving = self._writing = step
        try:
            args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
            self._open().save(step, args=args, force=True)
        except Exception as error:
            self._give_up(step, error)
            return False
        return before

    def wait(self) -> bool:
        """Waits for the save in progress. False if it failed."""
        if self._manager is None or self._saving is None:
            return True
        step, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(step, error)
            return False
        self.on_disk = step
        return True

    def close(self) -> bool:
        """Waits for the save in progress and releases Orbax's threads. False if it failed."""
        good = self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None
        return good

    def restore_latest(
        self,
        abstract: State,
        *,
        allow_dataset_change: bool = False,
        allow_config_change: bool = False,
    ) -> tuple[State, Meta] | None:
        """Restores the newest good checkpoint onto the shardings of `abstract`; None if none is.

        Damaged checkpoints are set aside (renamed to `damaged-<step>`) with a warning. Raises
        ValueError if only such ones are left, or for another architecture, dataset or config.
        """
        damaged = []
        while True:
            step, fault = self._newest()
            if step is None and (damaged := damaged or damaged_steps(self.folder)):
                raise ValueError(
                    f"All checkpoints in {self.folder} are damaged (steps {damaged}). Start anew "
                    "with another --run_name."
                )
            if step is None:
                return None
            folder = self.folder / str(step)
            try:
                if fault:
                    raise _Damaged(fault)
                meta = _read_meta_or_damaged(folder)
                _check_compatible(
                    meta,
                    abstract,
                    self.info,
                    allow_dataset_change=allow_dataset_change,
                    allow_config_change=allow_config_change,
                )
                state = _restore_or_damaged(folder, abstract)
            except _Damaged as error:
                damaged.append(step)
                self._set_aside(folder, str(error))
                continue
            self.on_disk = step
            return state, meta

    def _newest(self) -> tuple[int | None, str | None]:
        """Newest step and its damage if any, as process 0 sees them."""
        step, fault = -1, ""
        if jax.process_index() == 0:
            newest = self.latest_complete()
            step = -1 if newest is None else newest
            fault = (integrity.damage(self.folder / str(step)) or "") if step >= 0 else ""
        if jax.process_count() > 1:
            step, bad = multihost_utils.broadcast_one_to_all(np.array([step, bool(fault)]))
            fault = (fault or "damaged") if bad else ""
        return (None if step < 0 else int(step)), (fault or None)

    def _set_aside(self, folder: Path, fault: str) -> None:
        log.warning("Checkpoint %s is damaged: %s. Falling back to an older one.", folder, fault)
        if jax.process_index() == 0:
            target = folder.with_name(f"damaged-{folder.name}")
            number = 1
            while target.exists():
                number += 1
                target = folder.with_name(f"damaged-{folder.name}-{number}")
            os.rename(folder, target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint set aside")

    def _meta(self, step: int, state: State, *, with_digest: bool) -> Meta:
        info = self.info
        return {
            "format": _META_FORMAT,
            "step": step,
            "epoch": step // info.steps_per_epoch,
            "steps_into_epoch": step % info.steps_per_epoch,
            # Every draw is keyed by (seed, purpose, position): seed and step are the whole state
            # of the random numbers and of the data order, on any number of workers and hosts.
            "seed": info.seed,
            "steps_per_epoch": info.steps_per_epoch,
            "dataset_fingerprint": info.dataset_fingerprint,
            "content": info.dataset_content,
            "normalization": dict(info.normalization),
            "config": dict(info.config),
            "items": {name: integrity.describe(tree) for name, tree in _items(state).items()},
            "saved_on": {"devices": jax.device_count(), "processes": jax.process_count()},
            "digest": _digest(state.get("params")) if with_digest else None,
        }

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self.kept.earlier |= promised(self.folder)
            keep: list[Any] = [LatestN(1), self.kept]
            if self.save_interval:
                keep.append(EveryNSteps(self.save_interval))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(keep),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._write_checksums
                ),
            )
            self._manager = _Manager(self.folder, options=options)
        return self._manager

    def _write_checksums(self) -> None:
        # Runs in Orbax's thread on process 0, when all is written under a temporary name: the
        # checksums become part of the checkpoint in the same rename.
        for folder in self.folder.glob(f"{self._writing}.*"):
            integrity.write_checksums(folder)

    def _give_up(self, step: int, error: Exception) -> None:
        self._saving = None
        manager, self._manager = self._manager, None
        log.error(
            "The checkpoint of step %d could not be written: %s. Training goes on; the newest "
            "complete checkpoint is that of step %s.",
            step,
            str(error).splitlines()[0][:300] if str(error) else type(error).__name__,
            self.latest_complete(),
        )
        try:
            if manager is not None:
                manager.close()
        except Exception as again:
            log.debug("Closing after the failed save: %s", again)


class _Damaged(Exception):
    """A checkpoint can't be used; an older one may."""


def _read_meta_or_damaged(folder: Path) -> Meta:
    try:
        return read_meta(folder)
    except (OSError, ValueError) as error:
        raise _Damaged(f"its meta record cannot be read ({error})") from error


def _restore_or_damaged(folder: Path, abstract: State) -> State:
    try:
        return restore_state(folder, abstract)
    except Exception as error:
        # Files that passed their checksums are whole: then it is something else, e.g. memory.
        if (folder / integrity.CHECKSUMS_FILE).exists():
            raise
        raise _Damaged(f"it cannot be read ({str(error).splitlines()[0][:200]})") from error


class _Manager(ocp.CheckpointManager):
    """Leaves the preemption sync point to the training loop.

    Orbax would ask for it from its own thread with an older step number, which could make the
    hosts agree on a step that one of them has already passed.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def read_meta(step_folder: Path) -> Meta:
    """The meta record of a checkpoint. Raises ValueError if it is of an unknown format."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(step_folder / "meta")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"The meta record of {step_folder} cannot be read: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != _META_FORMAT:
        raise ValueError(f"{step_folder} was not written by this version of the software.")
    if fault := integrity.meta_fault(meta):
        raise ValueError(f"The meta record of {step_folder} is damaged: {fault}.")
    return meta


def open_whole(path: str | Path) -> tuple[Path, Meta]:
    """(step folder, its meta record) of a checkpoint whose files are as they were written.

    Takes what `find_checkpoint` takes; with several processes all must call it.

    Raises:
      ValueError: no checkpoint there, or damaged.
    """
    folder, fault = find_checkpoint(path), ""
    if jax.process_index() == 0:
        fault = integrity.damage(folder) or ""
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.array(bool(fault))):
        fault = fault or "see the first process"
    if fault:
        raise ValueError(f"the checkpoint {folder} is damaged: {fault}")
    return folder, read_meta(folder)


def restore_state(step_folder: Path, abstract: State) -> State:
    """Reads the items of a state onto the shardings of `abstract`."""
    state: State = {}
    for name, tree in abstract.items():
        if name == _STEP:
            state[name] = _scalar(int(read_meta(step_folder)[_STEP]), tree)
        elif not jax.tree.leaves(tree):
            state[name] = tree
        else:
            wanted = optimizer_state.stored(tree) if name == _OPTIMIZER else tree
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                restore = ocp.args.StandardRestore(wanted)
                found = reader.restore(step_folder / name, args=restore)
            state[name] = _own_counts(found, tree) if name == _OPTIMIZER else found
    return state


def _own_counts(found: Any, tree: Any) -> Any:
    """The optimiser's state; each count is an array of its own, since the state is donated."""
    found = optimizer_state.from_stored(found, tree)
    return jax.tree.map(lambda x, to: _scalar(int(x), to) if x.ndim == 0 else x, found, tree)


def load_item(step_folder: Path, item: str = "params") -> dict[str, Any]:
    """Reads one item as a nested dict of NumPy arrays, whatever mesh it was saved from.

    Raises ValueError if it cannot be read.
    """
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            metadata = reader.metadata(step_folder / item)
            tree = getattr(metadata.item_metadata, "tree", metadata.item_metadata)
            integrity.check_declared(step_folder / item, jax.tree.leaves(tree))
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            restore = ocp.args.PyTreeRestore(restore_args=kinds)
            found = reader.restore(step_folder / item, args=restore)
    except Exception as error:
        # Orbax and its storage raise of every kind for files that are not as they were written.
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"the checkpoint {step_folder} is damaged: its {item} cannot be read ({why})"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"the checkpoint {step_folder} is damaged: its {item} are no tree")
    return found


def _check_compatible(
    meta: Meta,
    abstract: State,
    info: RunInfo,
    *,
    allow_dataset_change: bool = False,
    allow_config_change: bool = False,
) -> None:
    """Raises ValueError if a checkpoint belongs to another model, dataset or configuration."""
    gone.note(meta["config"])
    lines = integrity.config_differences(meta["config"], info.config)
    _check_trees(meta, abstract, lines)
    if not allow_dataset_change:
        _check_dataset(meta, info)
    if lines and not allow_config_change:
        raise ValueError(
            f"The config differs from that of the checkpoint of step {meta['step']}:\n  "
            + "\n  ".join(lines)
            + "\nUse the same config or another --run_name, or set "
            "--config.trainer.allow_config_change=true to go on with these changes."
        )
    for line in lines + integrity.config_differences(*_lengths(meta, info), ignored=()):
        log.warning("Resuming with a changed config: %s", line)


def _check_dataset(meta: Meta, info: RunInfo) -> None:
    """A dataset is the same if its content is, wherever it lies."""
    # Checkpoints have had it under the second name.
    before, now = meta.get("content", meta.get("dataset_content")), info.dataset_content
    if before is not None and before == now:
        return
    if before is None and meta["dataset_fingerprint"] == info.dataset_fingerprint:
        return  # a checkpoint of before contents were kept, and the folder it names
    steps = meta.get("steps_per_epoch") or 0
    if before is None and steps == info.steps_per_epoch and steps > 1:
        # Other modalities are another config, which is judged by itself.
        log.warning(
            "The checkpoint of step %s does not say what its dataset held. This one lies elsewhere "
            "and has as many steps an epoch (%s), so it is taken for the same.",
            meta["step"], steps,
        )  # fmt: skip
        return
    was = before or meta["dataset_fingerprint"]
    raise ValueError(
        f"The dataset has changed since the checkpoint of step {meta['step']}: its content was "
        f"{(was or '(none)')[:12]} and is now {(now or '(none)')[:12]}. Give the same dataset, "
        "or set --config.trainer.allow_dataset_change=true to go on with this one."
    )


def _lengths(meta: Meta, info: RunInfo) -> tuple[Meta, Meta]:
    # A run may be prolonged, but its learning rate then follows another curve: worth a word.
    trainers = (meta["config"].get("trainer", {}), info.config.get("trainer", {}))
    before, now = ({"trainer.max_duration": t.get("max_duration", {})} for t in trainers)
    return before, now


def _check_trees(meta: Meta, abstract: State, changed: list[str] | None = None) -> None:
    items = {name: integrity.describe(tree) for name, tree in _items(abstract).items()}
    for name in sorted({*items, *meta["items"]}):
        saved, wanted = meta["items"].get(name, {}), items.get(name, {})
        if lines := integrity.tree_differences(saved, wanted):
            about = " (was the model or optimizer config changed?)"
            if changed:
                about = (
                    ". The config differs in:\n  " + "\n  ".join(changed)
                    + "\nUse the same config or another --run_name. The trees differ in"
                )  # fmt: skip
            raise ValueError(
                f"The checkpoint of step {meta['step']} holds another {name} tree than this "
                "model" + about + ":\n  " + "\n  ".join(lines)
            )  # fmt: skip


def _items(state: State) -> State:
    items = {name: tree for name, tree in state.items() if name != _STEP and jax.tree.leaves(tree)}
    if _OPTIMIZER in items:
        items[_OPTIMIZER] = optimizer_state.stored(items[_OPTIMIZER])
    return items


def _scalar(value: int, like: Any) -> jax.Array:
    array = np.asarray(value, dtype=like.dtype)
    if getattr(like, "sharding", None) is None:
        return jax.numpy.asarray(array)
    return jax.make_array_from_callback((), like.sharding, lambda _: array)


def _digest(params: Any) -> str | None:
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves):
        return None
    return integrity.parameter_digest(params)


def restore_as_start(
    step_folder: Path,
    abstract: State,
    fresh: Callable[[], State],
    *,
    weights_only: bool = False,
) -> State:
    """State of another run as the start of a new one: everything but the step, which is 0.

    With `weights_only`, and from converted weights, which have no optimizer state, `fresh` gives
    that. Raises ValueError if the checkpoint is of another architecture.
    """
    meta = read_meta(step_folder)
    if weights_only or _OPTIMIZER not in meta["items"]:
        parts = {name: abstract[name] for name in ("params", "target") if name in abstract}
        held = {name: meta["items"][name] for name in parts if name in meta["items"]}
        _check_trees({**meta, "items": held}, parts)
        return fresh() | restore_state(step_folder, parts)
    _check_trees(meta, abstract)
    state = restore_state(step_folder, {k: v for k, v in abstract.items() if k != _STEP})
    return state | {_STEP: _scalar(0, abstract[_STEP])} if _STEP in abstract else state
