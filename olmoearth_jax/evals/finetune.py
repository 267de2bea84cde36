"""Fine-tuning a whole encoder on a task (spec/evals.md section 11).

The encoder runs as in evaluation, without drop path. Regression ignores targets that are NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.configlib.tasks import (
    DEFAULTS,
    METRICS,
    DatasetInfo,
    EvalTaskConfig,
    RunOptions,
    check_task,
)
from olmoearth_jax.data import npy_file
from olmoearth_jax.data.durable import remove_old
from olmoearth_jax.evals import embeddings, models, probe_heads, scoring
from olmoearth_jax.evals.datasets import open_split, state_of
from olmoearth_jax.evals.samples import IGNORE, EvalSample, check_split, collate
from olmoearth_jax.evals.scoring import EvalResult
from olmoearth_jax.files import replacing
from olmoearth_jax.model.frozen import Call

_FREEZE_SHARE = 0.2
_UNFREEZE_FACTOR = 0.1
_THRESHOLD = 0.5


@dataclasses.dataclass
class Schedule:
    """The learning rate: frozen phase, drop at unfreezing, and cuts when the metric stalls.

    Ask `start_epoch` before and tell `finish_epoch` the validation metric after each epoch.
    """

    lr: float
    epochs: int
    higher_is_better: bool
    factor: float = 0.2
    patience: int = 2
    cooldown: int = 10
    threshold: float = 1e-4
    best: float = math.nan
    bad: int = 0
    resting: int = 0
    max_lr: float = 0.0

    def __post_init__(self) -> None:
        self.max_lr = self.max_lr or self.lr

    @property
    def frozen_epochs(self) -> int:
        return math.ceil(_FREEZE_SHARE * self.epochs)

    def start_epoch(self, epoch: int) -> tuple[float, bool]:
        """Learning rate of an epoch and whether the backbone is frozen in it."""
        if epoch == self.frozen_epochs:
            self.lr = _UNFREEZE_FACTOR * self.max_lr
        return self.lr, epoch < self.frozen_epochs

    def finish_epoch(self, metric: float) -> None:
        """Takes the validation metric; cuts the rate after more than `patience` stale epochs."""
        if self.higher_is_better:
            better = math.isnan(self.best) or metric > self.best * (1 + self.threshold)
        else:
            better = math.isnan(self.best) or metric < self.best * (1 - self.threshold)
        if better:
            self.best, self.bad = metric, 0
        else:
            self.bad += 1
        if self.resting:
            self.resting, self.bad = self.resting - 1, 0
        if self.bad > self.patience:
            cut = self.lr * self.factor
            self.lr = cut if self.lr - cut > 1e-8 else self.lr
            self.resting, self.bad = self.cooldown, 0


@dataclasses.dataclass(frozen=True)
class Job:
    """The static part of a fine-tuning run."""

    head: probe_heads.Head
    size: tuple[int, int] | None
    multilabel: bool
    dice: bool
    class_weights: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class OwnData:
    """Data that is in no catalogue, and ways of training that the reference does not know.

    Attributes:
      info: what is known of it.
      splits: 'train' and 'valid'.
      head: on top of the encoder.
      class_weights: see `probe_heads.cross_entropy`.
      weights: how much each label of each sample of 'train' counts, float32 as the labels.
      patience: stop after so many epochs without a better validation, all of the model training.
    """

    info: DatasetInfo
    splits: Mapping[str, embeddings.Samples]
    head: probe_heads.Head
    class_weights: tuple[float, ...] | None = None
    weights: Sequence[np.ndarray] | None = None
    patience: int | None = None


@functools.partial(jax.jit, static_argnames=("job", "call"))
def logits(job: Job, call: Call, params: Any, batch: Any) -> jax.Array:
    """Logits or values of a batch, see `model.frozen.embed` and `probe_heads.at_labels`."""
    x = models.embed_tokens(call, params["encoder"], *batch)
    return probe_heads.at_labels(
        job.head, probe_heads.forward(job.head, params["head"], {}, x)[0], job.size
    )


@functools.partial(jax.jit, static_argnames=("job", "call"))
def _loss_and_grads(job: Job, call: Call, params, batch, labels, weights):
    def loss(params):
        out = logits(job, call, params, batch)
        by_class = None if job.class_weights is None else jnp.asarray(job.class_weights)
        return probe_heads.loss(job.head, out, labels, job.dice, by_class, job.multilabel, weights)

    return jax.value_and_grad(loss)(params)


@jax.jit
def _update(params, grads, moments, count, lr):
    return probe_heads.adamw_update(params, grads, moments, count, lr)


class FineTuner:
    """One fine-tuning run of one model on one task."""

    def __init__(
        self,
        name: str,
        task: EvalTaskConfig,
        model: models.EncoderModel,
        options: RunOptions,
        own: OwnData | None = None,
    ):
        """Opens the data of the task, or takes one's own.

        Raises:
          ValueError: settings or data that cannot work.
        """
        self.name, self.task, self.model = name, task, model
        names = ("train", "valid", "test") if options.run_on_test else ("train", "valid")
        self.patience = None if own is None else own.patience
        self._weights = None if own is None else own.weights
        self.splits: Mapping[str, embeddings.Samples]
        if own is not None:
            self.info, self.splits, head = own.info, own.splits, own.head
        else:
            self.info = check_task(name, task)
            self.splits = {s: open_split(name, task, s) for s in names}
            head = probe_heads.make_head(
                task.ft_head_type, self.info.task_type, self.info.num_classes,
                model.embedding_size, task.patch_size,
            )  # fmt: skip
        label = self.splits["train"][0][1]
        self.pool = embeddings.pooling_of(task, self.info)
        size = tuple(label.shape[:2]) if self.info.spatial else None
        self.job = Job(
            head, size, self.info.multilabel, task.use_dice_loss,
            None if own is None else own.class_weights,
        )  # fmt: skip
        head_params = jax.tree.map(jnp.asarray, probe_heads.init(head, task.finetune_seed, 4)[0])
        self.params = {"encoder": model.params, "head": head_params}
        primary = task.primary_metric or METRICS[self.info.scoring][0]
        rising = primary not in scoring.LOWER_IS_BETTER
        self.schedule = Schedule(task.ft_lr or 0.0, task.epochs, rising)
        self.moments = {k: probe_heads.adamw_init(v) for k, v in self.params.items()}
        self.counts = {"encoder": 0, "head": 0}
        self.best: tuple[float, Any] = (math.nan, self.params)
        root = options.save_folder
        self.folder = None if root is None else root / name / f"lr{task.ft_lr}"
        self.epoch, self.best_epoch = 0, 0

    @functools.cached_property
    def _source(self) -> dict[str, str]:
        """What a state was made from, beside the task: it is taken up only for the same."""
        state = state_of(self.task, self.info)
        own = {} if state is None else {"data": state}
        return {"model": self.model.digest, "dtype": self.model.dtype.name, **own}

    def _stale(self) -> bool:
        """Whether nothing got better for longer than patience lasts."""
        began = max(self.best_epoch, self.schedule.frozen_epochs)
        return self.patience is not None and self.epoch - began >= self.patience

    def train(self, stop: Callable[[], bool], log: Callable[[str], None] | None) -> None:
        """Runs the epochs that are left; keeps the best state by the validation metric."""
        if self.folder is not None:
            remove_old(self.folder, ".*.ckpt.*.tmp")
        if self._load("best"):
            return
        self._load("last")
        while self.epoch < self.task.epochs and not self._stale():
            lr, frozen = self.schedule.start_epoch(self.epoch)
            loss = self._epoch(lr, frozen, stop)
            result = self.evaluate("valid")
            self.schedule.finish_epoch(result.primary)
            if result.beats(self.best[0]):
                self.best, self.best_epoch = (result.primary, self.params), self.epoch + 1
            self.epoch += 1
            if log:
                log(
                    f"{self.name} epoch {self.epoch}/{self.task.epochs}: loss {loss:.4f}, "
                    f"{result.primary_key} {result.primary:.4f}, lr {lr:.2g}"
                )
            self._save("last")
        self.params = self.best[1]
        self._save("best")
        if self.folder is not None:
            (self.folder / "last.ckpt").unlink(missing_ok=True)

    def _epoch(self, lr: float, frozen: bool, stop: Callable[[], bool]) -> float:
        # The best state so far is that of an epoch before: it must not change with this one.
        self.params = dict(self.params)
        seed, count = self.task.finetune_seed, len(self.splits["train"])
        order = probe_heads.rng(seed, 5, self.epoch).permutation(count)
        parts = ("head",) if frozen else ("encoder", "head")
        batches = -(-len(order) // self.task.ft_batch_size)
        accum, total, kept, known = self.task.ft_grad_accum_steps, 0.0, None, False
        for number, (batch, labels) in enumerate(self._batches("train", order, stop)):
            weights = self._weights_of(order, number)
            loss, grads = _loss_and_grads(
                self.job, *self._inputs(batch), jnp.asarray(labels), weights
            )
            total += float(loss)
            known |= bool(scoring.any_label(labels).any())
            scaled = jax.tree.map(lambda g: g / accum, grads)
            kept = scaled if kept is None else jax.tree.map(jnp.add, kept, scaled)
            if (number + 1) % accum and number + 1 < batches:
                continue
            for part in parts:
                self.counts[part] += 1
                self.params[part], self.moments[part] = _update(
                    self.params[part], kept[part], self.moments[part],
                    jnp.asarray(self.counts[part]), lr,
                )  # fmt: skip
            kept = None
        if not known:
            raise ValueError(f"fine-tuning {self.name}: no train sample carries a label")
        return total / batches

    def _weights_of(self, order: np.ndarray, number: int) -> jax.Array | None:
        """How much the labels of a batch count, see `_batches`; None: alike."""
        if self._weights is None:
            return None
        size = self.task.ft_batch_size
        found = np.stack([self._weights[i] for i in order[number * size : (number + 1) * size]])
        room = np.zeros((size - len(found), *found.shape[1:]), np.float32)
        return jnp.asarray(np.concatenate([found, room]))

    def _inputs(self, batch: EvalSample):
        """The call, the present parameters, and the batch as `embed_tokens` takes it."""
        call, data, *rest = self.model.inputs(batch, self.task.patch_size, self.pool)
        if self.model.dtype == jnp.bfloat16:
            data = {n: probe_heads.round_bf16(jnp.asarray(x)) for n, x in data.items()}
        return call, self.params, (data, *rest)

    def _batches(
        self, split: str, order: np.ndarray, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[EvalSample, np.ndarray]]:
        """Batches of one size; the last is filled up with samples whose labels do not count."""
        reader, size = self.splits[split], self.task.ft_batch_size
        for start in range(0, len(order), size):
            if stop():
                raise embeddings.Stopped
            items = [reader[int(i)] for i in order[start : start + size]]
            labels = np.stack([label for _, label in items])
            room = size - len(items)
            filler = np.nan if labels.dtype.kind == "f" else IGNORE
            labels = np.concatenate([labels, np.full((room, *labels.shape[1:]), filler)])
            batch = collate([s for s, _ in items] + [items[-1][0]] * room)
            yield batch, labels.astype(np.float32 if np.isnan(filler) else np.int32)

    def evaluate(self, split: str) -> EvalResult:
        """Scores the present parameters on a split.

        Raises:
          ValueError: nothing to score, or predictions that are NaN.
        """
        count = len(self.splits[split])
        found, truth = [], []
        for batch, labels in self._batches(split, np.arange(count)):
            found.append(np.asarray(logits(self.job, *self._inputs(batch))))
            truth.append(labels)
        out, labels = np.concatenate(found)[:count], np.concatenate(truth)[:count]
        if not np.isfinite(out).all():
            raise ValueError(f"fine-tuning {self.name} diverged: predictions are not finite")
        info, scores = self.info, None
        check_split(split, out, labels, info)
        guess = out
        if info.multilabel:
            scores = 1 / (1 + np.exp(-out.astype(np.float64)))
            guess = scores > _THRESHOLD
        elif "regression" not in info.task_type:
            scores = np.asarray(jax.nn.softmax(out, axis=-1))
            guess = scores.argmax(-1)
        return scoring.score(self.task, info, guess, labels, scores)

    def _save(self, kind: str) -> None:
        """Writes `<kind>.ckpt`: the arrays in order, and a record of all else; atomically."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "epoch": self.epoch, "counts": self.counts, "best_val_metric": self.best[0],
            "scheduler_state": dataclasses.asdict(self.schedule), "task": repr(self.task),
            "best_epoch": self.best_epoch, **self._source,
            "backbone_unfrozen": self.epoch > self.schedule.frozen_epochs,
        }  # fmt: skip
        leaves = jax.tree.leaves(self._state(kind))
        arrays: dict[str, Any] = {str(i): np.asarray(x) for i, x in enumerate(leaves)}
        with replacing(self.folder / f"{kind}.ckpt") as temporary, open(temporary, "wb") as f:
            np.savez(f, about=json.dumps(about), **arrays)

    def _state(self, kind: str) -> dict[str, Any]:
        state: dict[str, Any] = {"model_state": self.params}
        if kind == "last":
            state |= {"optimizer_state": self.moments, "best_state": self.best[1]}
        return state

    def _load(self, kind: str) -> bool:
        """Takes up `<kind>.ckpt` if it is there and was made with the same settings."""
        path = None if self.folder is None else self.folder / f"{kind}.ckpt"
        if path is None or not path.exists():
            return False
        leaves, tree = jax.tree.flatten(self._state(kind))
        stored = npy_file.read(path)
        if not isinstance(stored, dict) or "about" not in stored:
            raise ValueError(f"{path} is no state of fine-tuning; remove it to start anew")
        about = json.loads(str(stored["about"]))
        if about.get("task") != repr(self.task):
            return False
        # What was kept before these were has none of them.
        if any(about.get(key, mine) != mine for key, mine in self._source.items()):
            return False
        if len(stored) != len(leaves) + 1:
            raise ValueError(f"{path} belongs to another model; remove it to start anew")
        found = [jnp.asarray(stored[str(i)]) for i in range(len(leaves))]
        state = jax.tree.unflatten(tree, found)
        self.params = state["model_state"]
        self.moments = state.get("optimizer_state", self.moments)
        self.epoch, self.counts = about["epoch"], about["counts"]
        self.best_epoch = about.get("best_epoch", self.epoch)
        self.schedule = Schedule(**about["scheduler_state"])
        self.best = (about["best_val_metric"], state.get("best_state", self.params))
        return True


def run(
    name: str,
    task: EvalTaskConfig,
    model: Any,
    options: RunOptions = DEFAULTS,
    *,
    stop: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Fine-tunes a copy of the model on a task; the model itself stays as it is.

    With `options.save_folder` the state is kept in `<task>/lr<ft_lr>` there, to go on after a stop.

    Raises:
      ValueError: a model that cannot be trained, or bad data.
      Stopped: `stop()` became true.
    """
    if not isinstance(model, models.EncoderModel):
        raise ValueError("only an encoder can be fine-tuned; this baseline has no parameters")
    tuner = FineTuner(name, task, model, options)
    tuner.train(stop, log)
    test = tuner.evaluate("test") if options.run_on_test else None
    return {"valid": tuner.evaluate("valid"), "test": test}
