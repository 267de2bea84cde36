"""Published weights: found by name, and their folders read and written (spec section 13).

A folder of the reference's layout holds ``config.json`` with ``weights.pth`` or safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.files import is_pointer, no_folder, remove_leftovers, replacing
from olmoearth_jax.interop import config_json, spellings, torch_file, torch_keys
from olmoearth_jax.interop.plain_pickle import PickleRefused
from olmoearth_jax.modalities import closest
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.heads import check_heads
from olmoearth_jax.model.versions import PUBLISHED

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
TORCH_FILE = "weights.pth"
SAFETENSORS_FILE = "model.safetensors"
NOTICE_FILE = "ATTRIBUTION.md"
LICENSE_URL = "https://github.com/allenai/olmoearth_pretrain/blob/main/LICENSE"

OWNER = "allenai"
ENCODED = ("sentinel2_l2a", "sentinel1", "landsat")
"""Modalities that the encoders of all published models were trained on (model_v1_3.md 5.1)."""

_LONGEST_KEY = 400
# Heads of auxiliary losses that some releases still carry; no loader builds them.
_TRAINING_ONLY = ("supervision_head.", "location_token_distillation_head.")

_WRAPPERS = ("model.", "module.", "_orig_mod.")
"""What training, several devices and compilation put before all names of a model in PyTorch."""

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
    """A folder of the reference's layout, read."""

    config: ModelConfig
    state: dict[str, np.ndarray]
    """float32 tensors by the reference's keys; of training-only heads only those in `config`."""
    decode_only: tuple[str, ...] | None
    """Modalities that the encoder never saw; None if the folder does not say."""


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
    """Does it hold weights of the reference's layout, and a config or at least no checkpoint?"""
    held = any((folder / file).is_file() for file in (TORCH_FILE, SAFETENSORS_FILE))
    return held and ((folder / CONFIG_FILE).is_file() or not is_run(folder))


def is_run(folder: Path) -> bool:
    """Does it hold checkpoints of this package, or is it one?"""
    held = any((folder / part).is_dir() for part in ("checkpoints", "meta"))
    return held or any(folder.glob("[0-9]*/meta"))


def read_folder(folder: str | Path) -> Reference:
    """Reads a reference folder: ``weights.pth``, or safetensors where that is missing.

    Raises:
      ValueError: files missing, damaged or not weights; the message names the file and the fix.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(no_folder(folder))
    held = [file for file in (TORCH_FILE, SAFETENSORS_FILE) if (folder / file).is_file()]
    if not held and is_run(folder):
        raise ValueError(
            f"{folder} holds a checkpoint of this package, which needs no import; other programs "
            f"read it after python -m tools.convert_weights export --checkpoint={folder} "
            "--target=DIR"
        )
    doc = config_json.load(folder / CONFIG_FILE)
    config = config_json.read(folder / CONFIG_FILE, doc)
    if not held:
        raise ValueError(
            f"{folder} holds neither {TORCH_FILE} nor {SAFETENSORS_FILE}{other_names(folder)}"
        )
    path = folder / held[0]
    with _told(path):
        if is_pointer(path):
            raise ValueError(
                f"{path} is a Git LFS pointer and not the weights: run 'git lfs pull' in its "
                "folder, or download the file from the Hub"
            )
        _check_kind(path)
    raw = _read_torch(path) if held[0] == TORCH_FILE else _read_safetensors(path)
    if odd := [key for key in raw if len(key) > _LONGEST_KEY or not key.isprintable()]:
        raise ValueError(f"{path} is not a plain state dict: {_shown(odd)} is no name of a tensor")
    for wrapper in _WRAPPERS * 2:  # they may stand in each other, in any order
        if raw and all(key.startswith(wrapper) for key in raw):
            raw = {key.removeprefix(wrapper): value for key, value in raw.items()}
    try:
        raw = spellings.released_state(raw)
        config, kept = _heads_that_fit(config, raw)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    state = _clean(raw, kept)
    broken = [key for key, value in state.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"the weights in {folder} are not finite in {len(broken)} tensors: "
            f"{_shown(broken)}; they come from a diverged run or a damaged file"
        )
    try:
        return Reference(config, state, decode_only_of(doc))
    except ValueError as e:
        raise ValueError(f"{folder / CONFIG_FILE}: {e}") from None


def other_names(folder: Path) -> str:
    """What to do with the weights of a folder that are there under other names."""
    ends = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
    found = sorted(p.name for p in folder.iterdir() if p.suffix in ends and p.is_file())
    if len(found) == 1:
        right = SAFETENSORS_FILE if found[0].endswith(ends[0]) else TORCH_FILE
        return f"; if {_plain(found[0], 80)} holds the weights, name it {right}"
    if found:
        shown = f"{len(found)} such as {_plain(found[0], 80)}"
        return f"; weights in several files ({shown}) are not read: put them together in one"
    return ""


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Says which file cannot be read."""
    try:
        yield
    except OSError as e:
        raise ValueError(f"{path} cannot be read ({e.strerror or e})") from None


def _check_kind(path: Path) -> None:
    """Raises ValueError for a file of one format under the name of the other."""
    with path.open("rb") as file:
        head = file.read(9)
    if path.name == TORCH_FILE and head[4:] == b"\0\0\0\0{":  # the length of a JSON, and it
        raise ValueError(f"{path} is a safetensors file: name it {SAFETENSORS_FILE}")
    if path.name == SAFETENSORS_FILE and head[:4] == b"PK\3\4":
        raise ValueError(f"{path} is a file of PyTorch: name it {TORCH_FILE}")


def _shown(keys: Iterable[Any]) -> str:
    """The first few keys, on one line; they come from the file and may hold anything."""
    return ", ".join(_plain(key, 80) for key in list(keys)[:5])


def _plain(text: Any, most: int) -> str:
    return str(text)[:most].encode("unicode_escape").decode()


def _heads_that_fit(
    config: ModelConfig, raw: Mapping[str, np.ndarray]
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config less the heads whose tensors are not there as it says, and the heads that are.

    Nothing but training needs them, and how releases name their tensors is not known for sure.
    A head whose config describes none that can be built (one without maps) is left out as well.
    """
    kept = []
    for head in _TRAINING_ONLY:
        member = head[:-1] + "_config"
        if getattr(config, member) is None:
            continue
        held = {k: tuple(v.shape) for k, v in raw.items() if k.startswith(head)}
        if held == _head_shapes(config, head):
            kept.append(head)
        else:
            config = dataclasses.replace(config, **{member: None})
    return config, tuple(kept)


def _head_shapes(config: ModelConfig, head: str) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the tensors of one head by name; None if its config describes no head."""
    others = {other[:-1] + "_config": None for other in _TRAINING_ONLY if other != head}
    alone = dataclasses.replace(config, **others)
    try:
        check_heads(alone)
    except ValueError as e:
        log.info("Left out the config of %s: %s", head[:-1], e)
        return None
    shapes = torch_keys.state_dict_shapes(alone)
    return {k: v for k, v in shapes.items() if k.startswith(head)}


def _clean(raw: Mapping[str, np.ndarray], kept: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """float32 tensors by their released names, without training-only heads but the `kept` ones."""
    dropped = [key for key in raw if key.startswith(_TRAINING_ONLY) and not key.startswith(kept)]
    if dropped:
        log.info("Left out %d tensors of training-only heads: %s", len(dropped), dropped[:4])
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused
        return {k: np.asarray(v, np.float32) for k, v in raw.items() if k not in dropped}


_SAVE_AS = "save them as float32, float16 or bfloat16"
_SAFE_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8",
                "BOOL")  # fmt: skip


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        raw = torch_file.read(path)
    except torch_file.NumbersRefused as e:
        raise ValueError(f"{path}: {_first_line(e)}; {_SAVE_AS}") from None
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
    odd = [k for k, v in raw.items() if not isinstance(v, np.ndarray) or not isinstance(k, str)]
    if odd:
        raise ValueError(f"{path} is not a plain state dict: {_shown(odd)} are no tensors")
    return dict(raw)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(
            f"{path} needs safetensors: pip install 'olmoearth-jax[convert]'"
        ) from None
    try:
        with safe_open(path, "numpy") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            odd = [f"{k[:80]} ({v})" for k, v in kinds.items() if v not in _SAFE_DTYPES]
            if not odd:
                return {key: file.get_tensor(key) for key in kinds}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{path} is damaged or cut off, download it again ({_first_line(e)})"
        ) from None
    raise ValueError(
        f"{path} holds numbers of a kind that no weights are read from: {_shown(odd)}; {_SAVE_AS}"
    )


def _first_line(error: Exception) -> str:
    return _plain((str(error).splitlines() or [type(error).__name__])[0], 160)


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
    notice = write_notice(folder)  # first: it tells even an unfinished export from other folders
    with replacing(folder / TORCH_FILE) as scratch:
        torch_file.write({k: np.asarray(v, np.float32) for k, v in state.items()}, scratch)
    (folder / SAFETENSORS_FILE).unlink(missing_ok=True)
    with replacing(folder / CONFIG_FILE) as scratch:
        scratch.write_text(json.dumps(doc, indent=1) + "\n")
    return [folder / TORCH_FILE, folder / CONFIG_FILE, notice]


def write_notice(folder: Path) -> Path:
    """Writes the attribution and the licence link into a converted folder."""
    (folder / NOTICE_FILE).write_text(_NOTICE)
    return folder / NOTICE_FILE


def published_name(name: str) -> str | None:
    """The published model meant by a name, or None.

    With or without the owner, in any case, with any separators: other packages call
    'OlmoEarth-v1_1-Tiny' OLMOEARTH_V1_1_TINY.
    """
    bare = name.split("/")[-1] if name.startswith(f"{OWNER}/") or "/" not in name else name
    return next((known for known in PUBLISHED if _spelled(known) == _spelled(bare)), None)


def _spelled(name: str) -> str:
    return re.sub(r"[-_. ]+", "_", name.strip().lower())


def repository(name: str) -> str:
    """Repository id of a name: 'OlmoEarth-v1_2-Base' -> 'allenai/OlmoEarth-v1_2-Base'.

    Raises:
      ValueError: neither a published name nor an 'owner/name' id.
    """
    if known := published_name(name):
        return f"{OWNER}/{known}"
    owner, _, rest = name.partition("/")
    if rest and owner not in ("", ".", "..", "~", OWNER) and "/" not in rest:
        return name
    raise ValueError(f"there is no folder and no published model {name!r}; "
                     f"{closest(name.removeprefix(OWNER + '/'), PUBLISHED)}")  # fmt: skip


def find(name: str | Path, revision: str | None = None) -> Path:
    """Local folder of a path, a published name or a hub id, downloaded if need be.

    The cache of huggingface_hub is used, and HF_HUB_OFFLINE is honoured.

    Raises:
      ValueError: no such folder or model, no network and nothing in the cache, or the 'hub'
        extra is missing.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file; give the folder that holds {CONFIG_FILE}")
        return folder
    try:
        return _download(repository(str(name)), revision)
    except ValueError as e:
        # A path is most often a slip, but 'owner/name' may be meant for the hub.
        told = no_folder(folder) if len(folder.parts) > 1 else ""
        local = len(folder.parts) == 2 and not folder.is_absolute() and folder.parent.is_dir()
        if "did you mean" in told or local:
            end = "" if told.endswith("?") else "."
            raise ValueError(f"{told}{end} And as a name of the hub: {e}") from None
        raise


def _download(repo: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ValueError(
            f"getting {repo} from the hub needs the 'hub' extra: pip install 'olmoearth-jax[hub]'"
        ) from None
    wanted = [CONFIG_FILE, SAFETENSORS_FILE, TORCH_FILE]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted)
        )
    except errors.RepositoryNotFoundError:
        raise ValueError(f"the hub has no repository {repo!r} that you may read") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as e:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise ValueError(
            f"{repo} is not in the local cache and {why}; download it on a machine with a "
            f"network, or give a folder with {CONFIG_FILE} and {TORCH_FILE} ({type(e).__name__})"
        ) from None
    missing = not any((folder / f).is_file() for f in (SAFETENSORS_FILE, TORCH_FILE))
    if missing or not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"the copy of {repo} in the cache ({folder}) is not complete")
    return folder
