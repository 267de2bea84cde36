"""Rates, the progress line, and the recorder that turns step reports into written metrics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from olmoearth_jax.train.metrics import MetricWriter

_GOOD_MICRO_STEPS = "train/good_micro_steps"
VAL_LOSS = "val/loss"
_BAD_STEPS_IN_A_ROW = 3
MAX_IN_FLIGHT = 2
"""Steps the host may run ahead of the device: enough to keep it busy, few enough for memory."""


class Report(Protocol):
    """What a program returns for one step (see olmoearth_jax.train.step)."""

    @property
    def metrics(self) -> Mapping[str, Any]: ...

    @property
    def host(self) -> Mapping[str, Any]: ...

    @property
    def bad_ids(self) -> list[str]: ...


class TrainingDiverged(RuntimeError):
    """Several steps in a row had no finite micro-step."""


@dataclass
class _Window:
    """Sums since the last flush."""

    step_times: list[float] = field(default_factory=list)
    wait: float = 0.0
    checkpoint: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)


class Recorder:
    """Keeps the reports of steps that the device may still be working on, then writes them.

    `add` waits only for steps that lie more than MAX_IN_FLIGHT back, so the device never idles.
    What is finished is written every `interval` steps and by `flush`; `drain` waits for all.
    """

    def __init__(
        self,
        writer: MetricWriter,
        *,
        last_step: int,
        interval: int = 1,
        compile_count: Callable[[], int] = lambda: 0,
        say: Callable[[str], None] = print,
        guard: Callable[[], None] = lambda: None,
        tflops: float | None = None,
    ) -> None:
        """`guard` is called before every write; what it raises is raised, and nothing written.

        `tflops` is the rate of products of all devices together, where it is known.
        """
        self._tflops = tflops
        self._writer = writer
        self._guard_folder = guard
        self._last_step = last_step
        self._interval = interval
        self._compile_count = compile_count
        self._say = say
        self._pending: deque[tuple[int, Report]] = deque()
        self._records: list[tuple[int, dict[str, Any]]] = []
        self._window = _Window()
        self._recent: deque[float] = deque(maxlen=200)
        self._finished_at: float | None = None
        self._bad_steps: list[tuple[int, list[str]]] = []
        self._validated: dict[str, float] = {}  # the last validation, for the progress line

    def add(self, step: int, report: Report, data_wait_s: float) -> None:
        """Takes the report of a step just dispatched. Raises TrainingDiverged."""
        self._pending.append((step, report))
        self._window.wait += data_wait_s
        while len(self._pending) > MAX_IN_FLIGHT:
            self._finish_oldest()

    def add_checkpoint_time(self, seconds: float) -> None:
        """Time for which a checkpoint held up training."""
        self._window.checkpoint += seconds

    def drain(self) -> None:
        """Waits for the device. Raises TrainingDiverged."""
        while self._pending:
            self._finish_oldest()

    def flush(self) -> None:
        """Writes the records of the finished steps, the rates with the last of them, and a line."""
        if not self._records:
            return
        self.guard()
        step, last = self._records[-1]
        rates = self._rates(step)
        for number, record in self._records[:-1]:
            self._writer.write(number, record)
        self._writer.write(step, last | rates)
        self._writer.flush()
        self._say(progress_line(step, self._last_step, last | self._validated, rates))
        self._records.clear()
        self._window = _Window()

    def guard(self) -> None:
        """Raises what says that nothing may be written any more; what was kept is given up."""
        try:
            self._guard_folder()
        except Exception:
            self._records.clear()
            raise

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes values that are no step's own, e.g. of an evaluation, at once."""
        self.guard()
        self._writer.write(step, values)
        self._writer.flush()
        if VAL_LOSS in values:
            self._validated = {VAL_LOSS: float(values[VAL_LOSS]), "val/step": step}
        if self._finished_at is not None:  # the time they took is not the next step's
            self._finished_at = time.perf_counter()

    def images(self, step: int, draw: Callable[[Any], Mapping[str, Any]], state: Any) -> None:
        """Draws and writes pictures of the parameters after `step`."""
        self.drain()
        self.guard()
        self._writer.images(draw(state["params"]), step)
        if self._finished_at is not None:  # the first step has no predecessor
            self._finished_at = time.perf_counter()

    def _finish_oldest(self) -> None:
        step, report = self._pending.popleft()
        metrics = {name: np.asarray(v).item() for name, v in jax.device_get(report.metrics).items()}
        self._clock()
        record: dict[str, Any] = dict(metrics)
        for name, value in jax.device_get(dict(report.host)).items():
            if name != "flops":
                record[name if "/" in name else f"data/{name}"] = float(value)
            self._window.sums[name] = self._window.sums.get(name, 0.0) + float(value)
        if report.bad_ids:
            record["data/bad_ids"] = list(report.bad_ids)
        self._records.append((step, record))
        self._stop_if_diverged(step, metrics, report.bad_ids)
        if step % self._interval == 0:
            self.flush()

    def _clock(self) -> None:
        now = time.perf_counter()
        # The first step of a process has no predecessor, and mostly compiles.
        if self._finished_at is not None:
            self._window.step_times.append(now - self._finished_at)
            self._recent.append(now - self._finished_at)
        self._finished_at = now

    def _stop_if_diverged(
        self, step: int, metrics: Mapping[str, float], bad_ids: list[str]
    ) -> None:
        if metrics.get(_GOOD_MICRO_STEPS, 1) > 0:
            self._bad_steps.clear()
            return
        self._bad_steps.append((step, bad_ids))
        if len(self._bad_steps) < _BAD_STEPS_IN_A_ROW:
            return
        self.flush()
        ids = sorted({name for _, names in self._bad_steps for name in names})
        raise TrainingDiverged(
            f"Steps {self._bad_steps[0][0]} to {step} had no finite loss and gradient at all; "
            "the parameters were left as they were before them. "
            + (f"Samples left out as unusable: {', '.join(ids)}. " if ids else "")
            + "Lower --config.train_module.optim_config.lr, check the normalisation, or look at "
            "these samples with tools.verify_dataset. The newest checkpoint is untouched."
        )

    def _rates(self, step: int) -> dict[str, float]:
        window = self._window
        times = np.asarray(window.step_times)
        elapsed = float(times.sum())
        rates: dict[str, float] = {}
        if elapsed > 0:
            # Only steps with a known duration count, but sums hold all of the window's steps.
            share = len(times) / max(len(self._records), 1)
            for name in ("samples", "encoded_tokens", "decoded_tokens"):
                if name in window.sums:
                    rates[f"throughput/{name}_per_s"] = window.sums[name] * share / elapsed
            if "flops" in window.sums:
                tflops = window.sums["flops"] * share / elapsed / 1e12
                rates["throughput/model_tflops_per_s"] = tflops
                if self._tflops:
                    rates["throughput/mfu"] = tflops / self._tflops
            for percent in (50, 90, 99):
                value = float(np.percentile(times, percent))
                rates[f"throughput/step_time_p{percent}_s"] = value
            rates["throughput/data_wait_share"] = min(window.wait / elapsed, 1.0)
            # Steps that compiled say nothing about those to come.
            recent = np.asarray(self._recent)
            usual = float(recent[recent <= 5 * np.median(recent)].mean())
            rates["throughput/eta_s"] = usual * (self._last_step - step)
        rates["throughput/data_wait_s"] = window.wait
        rates["throughput/checkpoint_s"] = window.checkpoint
        rates["throughput/compile_count"] = self._compile_count()
        return rates | memory()


def memory() -> dict[str, float]:
    """Memory of the fullest local device (where the backend tells) and of this process, in GiB."""
    found: dict[str, float] = {}
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if stats:
        found["system/device_memory_gib"] = max(s.get("bytes_in_use", 0) for s in stats) / 2**30
        peak = max(s.get("peak_bytes_in_use", 0) for s in stats)
        found["system/device_memory_peak_gib"] = peak / 2**30
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                found["system/host_memory_gib"] = int(line.split()[1]) / 2**20
    except OSError:
        pass  # no /proc on this system
    return found


_LINE = (
    "{throughput/samples_per_s:.3g} samples/s",
    "{tokens} tokens/s",
    "MFU {throughput/mfu:.1%}",
    "padded {data/padded_share:.0%}",
    "{throughput/step_time_p50_s:.3g} s/step (p99 {throughput/step_time_p99_s:.3g})",
    "data wait {throughput/data_wait_share:.0%}",
    "{memory:.1f} GiB",
    "ETA {eta}",
)
"""Parts of the progress line; those whose fields are not known are left out."""


def progress_line(
    step: int, last_step: int, record: Mapping[str, Any], rates: Mapping[str, float]
) -> str:
    """One readable line: step, losses, rates, padding, waiting, memory, time left."""
    known: dict[str, Any] = {**record, **rates}
    losses = [n for n in record if n.startswith("train/") and n != _GOOD_MICRO_STEPS]
    losses.sort(key=lambda name: name != "train/loss")  # the sum of the others comes first
    parts = [f"step {step}/{last_step}"]
    parts += [f"{name.removeprefix('train/')} {record[name]:.4g}" for name in losses[:3]]
    if VAL_LOSS in record:
        parts.append(f"{VAL_LOSS} {record[VAL_LOSS]:.4g} (step {record['val/step']})")
    tokens = {k: known.get(f"throughput/{k}_tokens_per_s") for k in ("encoded", "decoded")}
    if shown := [f"{short(rate)} {kind}" for kind, rate in tokens.items() if rate is not None]:
        known["tokens"] = " + ".join(shown)
    for name in ("system/device_memory_gib", "system/host_memory_gib"):
        if name in known:
            known.setdefault("memory", known[name])
    if "throughput/eta_s" in known:
        known["eta"] = duration(known["throughput/eta_s"])
    for text in _LINE:
        try:
            parts.append(text.format_map(known))
        except KeyError:
            continue
    return "  ".join(parts)


def short(number: float) -> str:
    """12345.6 -> '12.3k'."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, with days in front if there are any."""
    total = round(seconds)
    clock = f"{total % 86400 // 3600}:{total % 3600 // 60:02d}:{total % 60:02d}"
    return f"{total // 86400}d {clock}" if total >= 86400 else clock
