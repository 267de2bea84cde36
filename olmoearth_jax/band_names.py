"""What products and services call a band, and what it is called here.

The table is `band_aliases.json`; case, spaces, dashes and underscores do not count. One name may
fit several sensors: then only the modality decides, and nothing is guessed from letters.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from olmoearth_jax import modalities

_TABLE = Path(__file__).with_name("band_aliases.json")


def _plain(name: str) -> str:
    """A name without what does not count: 'Red_Edge 1' becomes 'rededge1'."""
    return re.sub(r"[\s_\-]+", "", str(name)).lower()


@functools.cache
def _aliases() -> dict[str, dict[str, list[str]]]:
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return {name: bands for name, bands in table.items() if name not in ("about", "models")}


def _names(modality: str) -> dict[str, str]:
    """{plain name: canonical band} of a modality; its own names go before those of others."""
    return _names_of(modalities.get(modality))


@functools.lru_cache(maxsize=256)
def _names_of(known: modalities.Modality) -> dict[str, str]:
    out = {}
    for band, others in _aliases().get(known.name, {}).items():
        if band != "none":
            out.update({_plain(other): band for other in others})
    return out | {_plain(band): band for band in known.bands}


def canonical(name: str, modality: str) -> str | None:
    """The band of a modality that a name means, or None if it means none.

    Raises:
      ValueError: unknown modality.
    """
    return _names(modality).get(_plain(name))


def identify(names: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The modalities that have all of these bands.

    Args:
      names: of bands, as a file or a person writes them.

    Returns:
      (modality, its bands in the given order) for each that fits, in the registry's order. Two or
      more: the names do not decide. Names that mean the same band twice fit nothing.
    """
    out = []
    for modality in modalities.names():
        known = _names(modality)
        bands = [known.get(_plain(name)) for name in names]
        found = tuple(band for band in bands if band is not None)
        if found and len(found) == len(names) == len(set(found)):
            out.append((modality, found))
    return out


def propose(name: str, modality: str | None = None) -> str:
    """What to say of a name that is no band: "did you mean ...?", or that no model takes it.

    Without a modality, only a name that fits a single sensor is proposed. An empty text where the
    table knows nothing: no proposal is better than a wrong one.
    """
    if modality is not None:
        band = canonical(name, modality)
        if band is not None:
            return f"did you mean {band!r}?"
        if _plain(name) in map(_plain, _aliases().get(modality, {}).get("none", ())):
            return f"the models take no band {name} of {modality}"
        return ""
    fits = {(m, b) for m in _aliases() if (b := canonical(name, m)) is not None}
    if len(fits) == 1:
        (found, band) = fits.pop()
        return f"did you mean {band!r} of {found}?"
    return ""


def only_counted(names: Sequence[str]) -> bool:
    """Whether descriptions number the bands of the file: 'Band 1', 'Band 2', ..."""
    ends = [str(k) for k in range(1, len(names) + 1)]
    heads = {n.removesuffix(e).rstrip(" _-").lower() for n, e in zip(names, ends, strict=True)}
    counted = all(n.endswith(e) for n, e in zip(names, ends, strict=True))
    return counted and heads in ({"band"}, {"layer"}, {""}, {"b"})
