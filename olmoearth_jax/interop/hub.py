"""Finds weights by name: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from olmoearth_jax.files import no_folder
from olmoearth_jax.interop.weights import CONFIG_FILE, SAFETENSORS_FILE, TORCH_FILE
from olmoearth_jax.modalities import closest
from olmoearth_jax.model.versions import PUBLISHED

OWNER = "allenai"
ENCODED = ("sentinel2_l2a", "sentinel1", "landsat")
"""Modalities that the encoders of all published models were trained on (model_v1_3.md 5.1)."""


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
        if "did you mean" in told:
            raise ValueError(f"{told} And as a name of the hub: {e}") from None
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
