"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and sinks added by the caller."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from olmoearth_jax.checkpoints import integrity
from olmoearth_jax.files import (
    json_of_line,
    no_folder,
    read_json_lines,
    replacing,
    write_atomically,
)
from olmoearth_jax.images import png
from olmoearth_jax.train.runfolder import RunFolder

_TIMING = ("throughput/", "system/", "eval_time/")
"""How the names of fields begin that depend on the machine and the hour. All other fields of
metrics.jsonl are equal, bit for bit, between a run and the same run interrupted."""

log = logging.getLogger(__name__)

_BOARD_NEEDS = 2 << 20  # bytes
_LARGEST = 1 << 63  # of whole numbers
_FIRST_ON_BOARD = {"train/loss": "Loss/train", "val/loss": "Loss/val"}
"""Second tags of the losses: TensorBoard, which sorts capital letters first, shows them on top."""

Values = Mapping[str, Any]


class Sink(Protocol):
    """Anything else that wants the numbers (Weights & Biases, ...)."""

    def write(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class MetricWriter:
    """Writes the numbers of a run on process 0; on other processes it does nothing.

    `start_step` is the step that was restored: what an interrupted run has written beyond it is
    cut from metrics.jsonl and hidden by TensorBoard. On a full disk lines are kept until there is
    room again, and TensorBoard is left out.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        start_step: int = 0,
        tensorboard: bool = True,
        sinks: Iterable[Sink] = (),
    ) -> None:
        self._active = jax.process_index() == 0
        self._sinks = list(sinks) if self._active else []
        self._file: io.RawIOBase | None = None
        self._pending = b""
        self._root, self._full = folder.root, False
        self._pictures = folder.pictures
        self._board: Any = None
        if not self._active:
            return
        _cut_metrics(folder.metrics, start_step)
        self._file = folder.metrics.open("ab", buffering=0)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(
                str(folder.tensorboard),
                purge_step=start_step + 1,
                # The file name holds only the second: a quick restart must not overwrite it.
                filename_suffix=f".{start_step}.{os.getpid()}",
            )

    def write(self, step: int, values: Values) -> None:
        """One line of metrics.jsonl and the scalars of TensorBoard.

        Values are numbers, or lists of strings (which TensorBoard shows as text). Non-finite
        numbers become the strings 'nan', 'inf' and '-inf', so that every line is valid JSON.
        """
        if not self._active or self._file is None:
            return
        record = {"step": step} | {name: _plain(value) for name, value in values.items()}
        self._pending += (json.dumps(record, allow_nan=False) + "\n").encode()
        for name, value in values.items() if self._room_for_board() else ():
            if isinstance(value, (list, tuple)):
                self._board.add_text(name, ", ".join(map(str, value)), step)
            else:
                self._board.add_scalar(name, float(value), step)
                if name in _FIRST_ON_BOARD:
                    self._board.add_scalar(_FIRST_ON_BOARD[name], float(value), step)
        for sink in self._sinks:
            sink.write(step, values)

    def text(self, name: str, markdown: str, step: int = 0) -> None:
        """A text card in TensorBoard."""
        if self._room_for_board():
            self._board.add_text(name, markdown, step)

    def images(self, found: Mapping[str, np.ndarray], step: int) -> None:
        """Images uint8 [H, W, 3] in TensorBoard; the first and the newest are also files."""
        if not self._room_for_board():
            return
        self._keep(found, step)
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

        for name, image in found.items():
            height, width = image.shape[:2]
            shown = Summary.Image(  # pyright: ignore[reportAttributeAccessIssue]
                height=height, width=width, colorspace=3, encoded_image_string=png(image)
            )
            value = Summary.Value(tag=name, image=shown)  # pyright: ignore[reportAttributeAccessIssue]
            self._board.file_writer.add_summary(Summary(value=[value]), step)

    def _keep(self, found: Mapping[str, np.ndarray], step: int) -> None:
        """Writes images as files `<name>_step_<step>.png`, in the place of all but the first's."""
        folder = self._pictures
        for name, image in found.items():
            stem = name.replace("/", "_")
            path = folder / f"{stem}_step_{step}.png"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(path) as scratch:
                    scratch.write_bytes(png(image))
            except OSError as error:
                log.warning("The picture %s could not be written: %s", stem, error.strerror)
                continue
            for old in folder.glob(f"{stem}_step_*.png"):
                if old.stem not in (path.stem, f"{stem}_step_0"):
                    old.unlink(missing_ok=True)

    def flush(self) -> None:
        """Hands everything written so far to the operating system."""
        try:
            while self._file is not None and self._pending:
                # A short write is no error: the rest of the line follows when there is room.
                self._pending = self._pending[self._file.write(self._pending) or 0 :]
            self._full = False
        except OSError as error:
            if not self._full:
                log.error("metrics.jsonl cannot be written: %s. Training goes on.", error.strerror)
            self._full = True
        if self._room_for_board():
            self._board.flush()

    def _room_for_board(self) -> bool:
        # Its thread dies of a full disk, and then blocks whoever gives it anything to write.
        try:
            return self._board is not None and shutil.disk_usage(self._root).free > _BOARD_NEEDS
        except OSError:
            return False  # the folder was deleted under us

    def close(self) -> None:
        """Flushes and closes; may be called twice."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def _cut_metrics(path: Path, last_step: int) -> None:
    """Removes the lines of later steps, and a half-written last line, in one atomic change."""
    if not path.exists():
        return
    kept, dropped = [], False
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            record = json_of_line(line)
            if _has_step(record) and record["step"] <= last_step and line.endswith("\n"):
                kept.append(line)
            else:
                dropped = True
    if dropped:
        write_atomically(path, "".join(kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl (or of a run folder), non-finite values as floats.

    Raises ValueError if there is no such file or folder.
    """
    path = Path(path).expanduser()
    if not path.exists() and path.suffix != ".jsonl":
        usual = Path("local_output") / path.name
        if usual.is_dir():
            raise ValueError(f"there is no folder {path}; did you mean {usual}?")
        raise ValueError(no_folder(path))
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"There is no metrics file {path}: has the run taken a step?")
    if not path.is_file():
        raise ValueError(f"{path} is a folder, pipe or device and no metrics file")
    records = [record for record in read_json_lines(path) if _has_step(record)]
    return [{key: _number(value) for key, value in record.items()} for record in records]


def is_timing(name: str) -> bool:
    """Whether a field depends on the machine rather than on the computation."""
    return name.startswith(_TIMING)


def without_timing(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that must be equal between a run and its repetition."""
    return {name: value for name, value in record.items() if not is_timing(name)}


def parameter_table(params: Any, *, norms: bool = True) -> list[tuple[str, str, str, int, str]]:
    """Rows (path, shape, dtype, number of values, 2-norm or '') of all leaves, sorted by path."""
    rows = []
    for path, leaf in integrity.leaf_paths(params).items():
        norm = ""
        if norms and getattr(leaf, "is_fully_addressable", True):
            norm = f"{np.linalg.norm(np.asarray(leaf, np.float64).ravel()):.6g}"
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        count = int(np.prod(leaf.shape, dtype=np.int64))
        rows.append((path, shape, str(np.dtype(leaf.dtype)), count, norm))
    return rows


def markdown_table(rows: list[tuple[str, str, str, int, str]]) -> str:
    """The parameter table as Markdown, with the total in the last row."""
    lines = ["| parameter | shape | dtype | values | norm |", "|---|---|---|--:|--:|"]
    lines += [f"| {p} | {s} | {d} | {n:,} | {norm} |" for p, s, d, n, norm in rows]
    return "\n".join([*lines, f"| total | | | {sum(row[3] for row in rows):,} | |"])


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [str(entry) for entry in value]
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool) or not isinstance(number, float) or math.isfinite(number):
        return number
    return str(number)


def _number(value: Any) -> Any:
    if type(value) is int and abs(value) > _LARGEST:
        return math.inf if value > 0 else -math.inf  # no float could hold it
    return float(value) if value in ("nan", "inf", "-inf") else value


def _has_step(record: Any) -> bool:
    step = record.get("step") if isinstance(record, dict) else None
    return type(step) is int and 0 <= step <= _LARGEST


def check_wandb() -> None:
    """Raises ValueError if the package or the API key that Weights & Biases needs is missing."""
    if "WANDB_API_KEY" not in os.environ and os.environ.get("WANDB_MODE") != "offline":
        raise ValueError(
            "trainer.callbacks.wandb.enabled needs the environment variable WANDB_API_KEY "
            "(or WANDB_MODE=offline)."
        )
    if sys.modules.get("wandb") is None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "trainer.callbacks.wandb.enabled needs the package: pip install 'olmoearth-jax[wandb]'."
        )


class WandbSink:
    """Sends each record to a W&B run, and goes on with that run after a restart.

    The run's id is kept in wandb/wandb_runid.txt of the run folder. Raises ValueError as
    `check_wandb` does.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        project: str,
        name: str,
        entity: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_wandb()
        import wandb  # pyright: ignore[reportMissingImports]

        place = folder.root / "wandb"
        place.mkdir(parents=True, exist_ok=True)
        id_file = place / "wandb_runid.txt"
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        self._run = wandb.init(
            project=project,
            entity=entity,
            name=name,
            dir=str(folder.root),
            config=dict(config or {}),
            id=known,
            resume="allow",
        )
        write_atomically(id_file, self._run.id)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends the numbers of a record; lists of names stay in metrics.jsonl."""
        numbers = {name: v for name, v in values.items() if not isinstance(v, (list, tuple))}
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
