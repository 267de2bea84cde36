"""Folders of the reference's layout: ``config.json`` with ``weights.pth`` or safetensors (13)."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.files import remove_leftovers, replacing
from olmoearth_jax.interop import config_json, torch_file
from olmoearth_jax.interop.plain_pickle import PickleRefused
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.proposals import nearest

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
TORCH_FILE = "weights.pth"
SAFETENSORS_FILE = "model.safetensors"
NOTICE_FILE = "ATTRIBUTION.md"
LICENSE_URL = "https://github.com/allenai/olmoearth_pretrain/blob/main/LICENSE"

# Heads of auxiliary losses that some releases still carry; no loader builds them.
TRAINING_ONLY = ("supervision_head.", "location_token_distillation_head.")

_NOTICE = f"""# Attribution

The weights in this folder are OlmoEarth weights by the Allen Institute for AI (Ai2), or were
trained further from them, and were converted by olmoearth-jax. The original models:
https://huggingface.co/collections/allenai/olmoearth

Ai2 releases OlmoEarth under the OlmoEarth Artifact License, which also holds for converted and
fine-tuned weights: {LICENSE_URL}

Keep this file with the weights when you pass them on.
"""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A folder of the reference's layout, read.

    Attributes:
      config: the model.
      state: float32 tensors by the reference's keys, training-only heads left out.
      decode_only: modalities that the encoder never saw; None if the folder does not say.
    """

    config: ModelConfig
    state: dict[str, np.ndarray]
    decode_only: tuple[str, ...] | None


def decode_only_of(doc: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The recorded decode-only modalities of a run's config, or None (model_v1_3.md 5.1).

    Raises:
      ValueError: the record is no list of names.
    """
    for section in ("train_module", "data_loader"):
        node: Any = doc
        for key in (section, "masking_config", "strategy_config", "only_decode_modalities"):
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is not None:
            if not isinstance(node, list | tuple) or not all(isinstance(n, str) for n in node):
                raise ValueError("only_decode_modalities must be a list of names")
            return tuple(node)
    return None


def decode_only_record(names: tuple[str, ...]) -> dict[str, Any]:
    """Config members that record decode-only modalities; inverse of `decode_only_of`."""
    return {"data_loader": {"masking_config": {"strategy_config": {
        "only_decode_modalities": list(names)}}}}  # fmt: skip


def is_reference_folder(folder: Path) -> bool:
    """Does it hold a config and weights of the reference's layout?"""
    files = (TORCH_FILE, SAFETENSORS_FILE)
    return (folder / CONFIG_FILE).is_file() and any((folder / f).is_file() for f in files)


def read_folder(folder: str | Path) -> Reference:
    """Reads a reference folder: ``weights.pth``, or safetensors where that is missing.

    Raises:
      ValueError: files missing, damaged or not weights; the message names the file and the fix.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}{_similar(folder)}")
    config = config_json.read(folder / CONFIG_FILE)
    doc = config_json.load(folder / CONFIG_FILE)
    if (folder / TORCH_FILE).is_file():
        raw = _read_torch(folder / TORCH_FILE)
    elif (folder / SAFETENSORS_FILE).is_file():
        raw = _read_safetensors(folder / SAFETENSORS_FILE)
    else:
        raise ValueError(f"{folder} holds neither {TORCH_FILE} nor {SAFETENSORS_FILE}")
    state = _clean(raw)
    broken = [key for key, value in state.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"the weights in {folder} are not finite in {len(broken)} tensors: "
            f"{', '.join(broken[:5])}; they come from a diverged run or a damaged file"
        )
    return Reference(config, state, decode_only_of(doc))


def _similar(folder: Path) -> str:
    """ "; did you mean ...?" where a folder beside it has almost that name."""
    beside = folder.parent
    names = [p.name for p in beside.iterdir() if p.is_dir()] if beside.is_dir() else []
    near = nearest(folder.name, names)
    return "" if near is None else f"; did you mean {beside / near}?"


def _clean(raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32 tensors without the direct builder's prefix and without training-only heads."""
    if raw and all(key.startswith("model.") for key in raw):
        raw = {key.removeprefix("model."): value for key, value in raw.items()}
    dropped = [key for key in raw if key.startswith(TRAINING_ONLY)]
    if dropped:
        log.info("Left out %d tensors of training-only heads: %s", len(dropped), dropped[:4])
    return {k: np.asarray(v, np.float32) for k, v in raw.items() if k not in dropped}


_POINTER = b"version https://git-lfs"
_SAFE_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8",
                "BOOL")  # fmt: skip


def _refuse_pointer(path: Path) -> None:
    """Refuses what Git leaves in a file's place when Git LFS is not installed."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer and not the weights: run 'git lfs pull' in its "
                "folder, or download the file from the Hub"
            )


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    _refuse_pointer(path)
    try:
        raw = torch_file.read(path)
    except PickleRefused as e:
        raise ValueError(
            f"{path} was refused: it holds other things than tensors, or is not a PyTorch file "
            "at all. A pickle can run code when it is read, so only plain weights are accepted; "
            f"download the published file again ({_first_line(e)})"
        ) from None
    except ValueError as e:
        raise ValueError(
            f"{path} is damaged or cut off, download it again ({_first_line(e)})"
        ) from None
    if not isinstance(raw, Mapping) or not raw:
        raise ValueError(f"{path} is not a state dict: it holds a {type(raw).__name__}")
    odd = [str(k) for k, v in raw.items() if not isinstance(v, np.ndarray)]
    if odd:
        raise ValueError(f"{path} is not a plain state dict: {', '.join(odd[:5])} are no tensors")
    return {str(k): v.astype(np.float32) for k, v in raw.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(
            f"{path} needs safetensors: pip install 'olmoearth-jax[convert]'"
        ) from None
    _refuse_pointer(path)
    try:
        with safe_open(path, "numpy") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            odd = [f"{k} ({v})" for k, v in kinds.items() if v not in _SAFE_DTYPES]
            if not odd:
                return {key: file.get_tensor(key) for key in kinds}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{path} is damaged or cut off, download it again ({_first_line(e)})"
        ) from None
    raise ValueError(
        f"{path} holds numbers of a kind that no weights are read from: {', '.join(odd[:5])}; "
        "save them as float32, float16 or bfloat16"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def write_folder(
    folder: str | Path,
    config: ModelConfig,
    state: Mapping[str, np.ndarray],
    decode_only: tuple[str, ...] | None,
) -> list[Path]:
    """Writes a folder that the PyTorch loaders accept: config, weights and attribution.

    Files of an earlier export are replaced.

    Args:
      state: float32 tensors by the reference's keys.
      decode_only: recorded in the config, where PyTorch loaders ask for it. None: the maps among
        the model's modalities, which no official recipe encodes.

    Returns:
      The files written.

    Raises:
      ValueError: the config has no such form.
    """
    folder = Path(folder).expanduser()
    if decode_only is None:
        names = config.encoder_config.supported_modality_names
        decode_only = tuple(n for n in names if n in modalities.OFFICIAL_DECODE_ONLY)
        log.warning("Decode-only modalities were not recorded; taken to be %s", decode_only)
    doc = config_json.to_json(config) | decode_only_record(decode_only)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder / TORCH_FILE)
    remove_leftovers(folder / CONFIG_FILE)
    with replacing(folder / TORCH_FILE) as scratch:
        torch_file.write({k: np.asarray(v, np.float32) for k, v in state.items()}, scratch)
    (folder / SAFETENSORS_FILE).unlink(missing_ok=True)
    with replacing(folder / CONFIG_FILE) as scratch:
        scratch.write_text(json.dumps(doc, indent=1) + "\n")
    return [folder / TORCH_FILE, folder / CONFIG_FILE, write_notice(folder)]


def write_notice(folder: Path) -> Path:
    """Writes the attribution and the licence link into a converted folder."""
    (folder / NOTICE_FILE).write_text(_NOTICE)
    return folder / NOTICE_FILE
