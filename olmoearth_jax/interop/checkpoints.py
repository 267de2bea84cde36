"""Reference weights to a checkpoint of ours, and a checkpoint back to reference weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.configlib import limits, schema
from olmoearth_jax.interop import torch_keys, weights
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import ModelConfig

_INERT = "inert"
"""Item with the tensors that no part of ours uses, kept so that an export is exact."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of a model in our layout."""

    config: ModelConfig
    params: dict[str, Any]
    """Trained parameters, nested dict of float32 arrays."""
    target: dict[str, Any] | None
    extras: dict[str, np.ndarray]
    """Unused tensors by the reference's keys."""
    decode_only: tuple[str, ...] | None
    """Modalities that the encoder never saw; None if not recorded."""
    normalization: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Ranges stored with the weights; {} means those of the registry."""

    @property
    def digest(self) -> str:
        """SHA-256 of the trained parameters, as `tools.inspect_checkpoint` prints it."""
        return integrity.parameter_digest(self.params)


def from_reference(folder: str | Path, name: str = "") -> Weights:
    """Reads a reference folder strictly.

    Args:
      folder: where it lies.
      name: what it was asked for by; published models are known by it.

    Raises:
      ValueError: unreadable files, or tensors that do not fit the config, listed by side.
    """
    read = weights.read_folder(folder)
    _form(read.config, f"{folder}: {weights.CONFIG_FILE}")
    try:
        params, target, extras = torch_keys.from_state_dict(read.state, read.config)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None
    decode_only = read.decode_only
    if decode_only is None and weights.published_name(name or Path(folder).name):
        names = read.config.encoder_config.supported_modality_names
        decode_only = tuple(n for n in names if n not in weights.ENCODED)
    return Weights(read.config, params, target, extras, decode_only)


def write(loaded: Weights, folder: str | Path, source: str = "") -> Path:
    """Writes a checkpoint (step 0) below `folder`; returns its step folder.

    Raises:
      ValueError: the folder holds a checkpoint already.
    """
    folder = Path(folder).expanduser().absolute()
    if checkpoint.complete_steps(folder / "checkpoints"):
        raise ValueError(f"{folder} already holds a checkpoint; give another target")
    # Imported here: it needs the whole training stack.
    from olmoearth_jax.modalities import normalization_of

    names = loaded.config.encoder_config.supported_modality_names
    config: dict[str, Any] = {
        "common": {"run_name": folder.name, "recipe": f"converted from {source or 'weights'}"},
        "model": dataclasses.asdict(loaded.config),
    }
    if loaded.decode_only is not None:
        config |= weights.decode_only_record(loaded.decode_only)
    state: dict[str, Any] = {"params": loaded.params, "step": np.int32(0)}
    if loaded.target is not None:
        state["target"] = loaded.target
    if loaded.extras:
        tree = {tuple(key.split(".")): value for key, value in loaded.extras.items()}
        state[_INERT] = latent_mim.unflatten(tree)
    normalization = loaded.normalization or normalization_of(names)
    info = checkpoint.RunInfo(config=config, normalization=normalization)
    with checkpoint.Checkpointer(folder / "checkpoints", info, save_interval=1) as saver:
        saved = saver.save(0, state)
    step_folder = folder / "checkpoints" / "0"
    if not saved or not (step_folder / "meta").is_dir():
        raise ValueError(f"the checkpoint could not be written to {folder}; see the log above")
    weights.write_notice(folder)
    return step_folder


def read(path: str | Path, with_target: bool = True) -> Weights:
    """Reads the parameters of a run folder, a checkpoints folder or a step folder.

    Raises:
      ValueError: no checkpoint there, damaged, or of a model that does not fit its config.
    """
    return read_opened(*checkpoint.open_whole(path), with_target)


def read_opened(folder: Path, meta: Mapping[str, Any], with_target: bool = True) -> Weights:
    """As `read`, for what `train.checkpoint.open_whole` gave."""
    if "model" not in meta["config"]:
        raise ValueError(f"the checkpoint {folder} does not say which model it holds")
    config, wanted = _model(folder, meta["config"]["model"])
    params = checkpoint.load_item(folder, "params")
    if lines := integrity.tree_differences(integrity.describe(params), wanted):
        raise ValueError(f"the checkpoint {folder} does not fit its config: " + "; ".join(lines))
    target, extras = None, {}
    if with_target and "target" in meta["items"]:
        target = checkpoint.load_item(folder, "target")
    if with_target and _INERT in meta["items"]:
        inert = latent_mim.flatten(checkpoint.load_item(folder, _INERT))
        extras = {".".join(key): value for key, value in inert}
    decode_only = weights.decode_only_of(meta["config"])
    if odd := [name for name, r in meta["normalization"].items() if not _is_range(r)]:
        raise ValueError(f"the checkpoint {folder} says nonsense of the ranges of {odd[0][:40]!r}")
    return Weights(config, params, target, extras, decode_only, meta["normalization"])


def _model(folder: Path, values: Any) -> tuple[ModelConfig, dict[str, list[Any]]]:
    """The config of a checkpoint's model, and its parameters as `integrity.describe` has them."""
    try:
        config = schema.convert(ModelConfig, values, "model")
        if absurd := limits.judge(values, "model"):
            raise ValueError("; ".join(absurd.values()))
    except (ValueError, TypeError) as e:
        raise ValueError(f"the checkpoint {folder} holds no valid model config: {e}") from e
    return config, integrity.describe(_form(config, f"the checkpoint {folder}"))


def _form(config: ModelConfig, where: str) -> Any:
    """The shapes of a model's parameters.

    Raises:
      ValueError: there is no such model, as its sizes do not fit each other.
    """
    for name, part in (("encoder", config.encoder_config), ("decoder", config.decoder_config)):
        # No tensor tells of the heads, and a depth below 0 makes no blocks as 0 does.
        if part is not None and (part.num_heads < 1 or part.depth < 0):
            told = f"{part.depth} blocks of {part.num_heads} heads"
            raise ValueError(f"{where} holds a config of no model: its {name} has {told}")
    try:
        return latent_mim.graph(config)[1]
    except (ValueError, TypeError, ArithmeticError) as e:
        raise ValueError(f"{where} holds a config of no model: {e}") from e


def _is_range(ranges: Any) -> bool:
    """{} or per band its name and, unless it is not normalised, both ends."""
    if not isinstance(ranges, dict) or not isinstance(ranges.get("bands", []), list):
        return False
    ends = [ranges[k] for k in ("lo", "hi") if k in ranges]
    if not ends:
        return True
    if len(ends) < 2 or not all(isinstance(e, list) and _are_finite(e) for e in ends):
        return False
    return len(ends[0]) == len(ends[1]) == len(ranges.get("bands", ends[0]))


def _are_finite(values: list[Any]) -> bool:
    return all(isinstance(v, int | float) and abs(v) < float("inf") for v in values)


def to_reference(loaded: Weights, folder: str | Path) -> list[Path]:
    """Writes a reference folder; see `weights.write_folder`."""
    state = torch_keys.to_state_dict(loaded.params, loaded.config, loaded.target, loaded.extras)
    return weights.write_folder(folder, loaded.config, state, loaded.decode_only)
