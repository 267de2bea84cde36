"""Downstream evaluation during training (spec/evals.md section 3).

The training loop asks `due(step)` and calls the evaluator with the state after that step. The state
is only read: a copy of the encoder's parameters is evaluated.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib import own_tasks, tasks
from olmoearth_jax.evals import runner
from olmoearth_jax.evals.datasets import split_available
from olmoearth_jax.evals.embeddings import Stopped
from olmoearth_jax.evals.models import EncoderModel
from olmoearth_jax.evals.runner import Hooks, TaskResult, run_task
from olmoearth_jax.mesh import gathered
from olmoearth_jax.train import hosts


class DownstreamEvaluator:
    """Runs the tasks that are due after a step.

    Tasks whose data is not there, or whose modalities the model does not take, are named once at
    construction and left out.

    Args:
      run: config of the run: its model, its evaluator with the tasks, its folder (`<step>.json` and
        `runner.jsonl` go to evals/ there), and its data, for pretrain_subset tasks without any.
      steps_per_epoch: for intervals in epochs.
      say: takes progress lines.

    Raises:
      ValueError: a task's settings are wrong, or an unknown name in tasks_to_run.
    """

    def __init__(
        self, run: ExperimentConfig, steps_per_epoch: int, say: Callable[[str], None] = print
    ):
        config = run.trainer.callbacks.downstream_evaluator
        self.config, self.model = config, run.model
        self.dtype = None if run.precision == "auto" else run.precision
        self.folder, self.run_name, self._say = run.run_folder / "evals", run.common.run_name, say
        chosen = tasks.select(own_tasks.known_tasks(config), config.tasks_to_run)
        for name, task in chosen.items():
            if task.dataset.startswith(tasks.PRETRAIN_PREFIX) and not task.h5py_dir:
                chosen[name] = dataclasses.replace(task, h5py_dir=run.dataset.h5py_dir)
        if config.filter_for_eval_mode:
            mode = config.filter_for_eval_mode
            chosen = {n: t for n, t in chosen.items() if t.eval_mode == mode}
        names = run.model.encoder_config.supported_modality_names
        self.tasks, self.skipped = split_available(chosen, names)
        spans = {n: t.eval_interval for n, t in self.tasks.items()}
        unit = {"steps": 1, "epochs": steps_per_epoch}
        self.intervals = {n: span.value * unit[span.unit] for n, span in spans.items()}
        for name, every in self.intervals.items():
            if every < 1:
                raise ValueError(f"task {name!r}: eval_interval must be at least one step")
        self.options = tasks.RunOptions(
            config.run_on_test, config.n_bootstrap, config.bootstrap_seed
        )
        self.finished_first = False
        for name, task in self.tasks.items():
            tasks.check_task(name, task, self.options)
        for reason in dict.fromkeys(self.skipped.values()):
            names = [n for n, r in self.skipped.items() if r == reason]
            rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
            what = f"tasks {', '.join(names[:2])}{rest} are"
            what = f"task {names[0]} is" if len(names) == 1 else what
            say(f"evaluation {what} skipped: {reason}")

    @property
    def cancel(self) -> bool:
        """Whether training is to end now, as `cancel_after_first_eval` asks."""
        return self.config.cancel_after_first_eval and self.finished_first

    def due_tasks(self, step: int) -> list[str]:
        """Names of the tasks to run after `step`; step 0 is the start of training."""
        if step == 0:
            return list(self.tasks) if self.config.eval_on_startup else []
        return [n for n, every in self.intervals.items() if step > 1 and step % every == 0]

    def due(self, step: int) -> bool:
        """Is there anything to evaluate after this step?"""
        return bool(self.config.enabled and self.due_tasks(step))

    def __call__(
        self, state: Mapping[str, Any], step: int, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Evaluates the tasks due after `step`; None if `stop()` became true.

        With several processes the first one evaluates and the others wait for it. A task that
        fails is reported and gives no value.

        Args:
          state: training state; only `params` is read.

        Returns:
          Values to log by name (spec/evals.md section 3.4).
        """
        params = jax.tree.map(gathered, state["params"]["encoder"])
        values: dict[str, float] | None = {}
        if jax.process_index() == 0:
            values = self._run({"encoder": params}, step, stop)
        # Not a device collective: those end in an error when one waits long for the other.
        if hosts.current().agree(int(values is None)):
            values = None
        self.finished_first = self.finished_first or values is not None
        return values

    def _run(self, params: Mapping[str, Any], step: int, stop: Callable[[], bool]):
        model = EncoderModel(self.model, params, self.dtype)
        values: dict[str, float] = {"checkpoint_step": float(step)}
        results: dict[str, TaskResult] = {}
        begun, hooks = time.perf_counter(), Hooks(stop, cache={})
        due = self.due_tasks(step)
        for place in runner.encoding_order([self.tasks[n] for n in due], self.options):
            name = due[place]
            try:
                results[name] = run_task(name, self.tasks[name], model, self.options, hooks)
            except Stopped:
                return None
            except runner.FAULTS as e:
                told = runner.fault_of(e)
                self._say(f"evaluation task {name} failed at step {step}: {told}")
        found: list[dict[str, Any]] = []
        for result in (results[n] for n in due if n in results):
            values |= runner.log_values(result)
            found += runner.records(result, model=self.run_name, checkpoint_step=step)
        try:  # together, so that an evaluation that was stopped half-way leaves nothing
            for item in found:
                runner.append_line(self.folder, item)
            runner.write_step(self.folder, step, found)
        except (ValueError, OSError) as e:  # which are among the metrics of the run all the same
            self._say(f"the results of step {step} are not in {self.folder}: {e}")
        self._say(f"evaluated {len(results)} tasks in {time.perf_counter() - begun:.1f} s")
        return values


def build_evaluator(
    config: ExperimentConfig, steps_per_epoch: int, say: Callable[[str], None] = print
) -> DownstreamEvaluator | None:
    """The evaluator of a training run; None if evaluation is off or has no task.

    Raises:
      ValueError: see `DownstreamEvaluator`.
    """
    settings = config.trainer.callbacks.downstream_evaluator
    if config.trainer.no_evals or not settings.enabled:
        return None
    evaluator = DownstreamEvaluator(config, steps_per_epoch, say)
    return evaluator if evaluator.tasks else None
