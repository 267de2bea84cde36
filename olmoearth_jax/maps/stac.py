"""Rasters of STAC items: an ItemCollection, a collection or catalogue with links to items, a folder
of items, or a stac-geoparquet file. Only the files that are named are read; nothing is searched.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax import band_names, modalities
from olmoearth_jax.data.raster_list import Raster
from olmoearth_jax.data.remote import AnyPath, location
from olmoearth_jax.files import check_file
from olmoearth_jax.modalities import closest

KINDS = ("FeatureCollection", "Feature", "Collection", "Catalog")
"""Types of JSON objects that lead to items."""
IGNORE = "ignore"
_SENSORS = {"sentinel-2": "sentinel2_l2a", "sentinel-1": "sentinel1", "landsat": "landsat"}
"""What constellations are called -> modality."""
_PICTURES = {"visual", "thumbnail", "overview", "rendered_preview", "preview", "tilejson"}
_SHIFTED = 4.0
"""Processing baseline of Sentinel-2 from which stored values are 1000 too large."""
_SHIFT = -1000
"""What takes that away."""
_DEEPEST = 20
_BANDS = ("bands", "raster:bands", "eo:bands")
"""Where an asset describes its bands, by version of STAC."""
_LEVELS = ("processing:level", "landsat:correction", "product:type", "s2:product_type")
"""Properties that say how far the values were processed."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is said of items, beside what they say.

    Attributes:
      assets: 'NAME:MODALITY/BAND', 'NAME:MODALITY' for an asset of several bands, or
        'NAME:ignore'; by default names of bands decide.
      s2_offset: 0 or -1000, what is added to stored values of Sentinel-2, in place of what the
        files' own tags say; by default the baseline decides.

    Raises:
      ValueError: another s2_offset.
    """

    assets: Sequence[str] = ()
    s2_offset: int | None = None

    def __post_init__(self) -> None:
        if self.s2_offset not in (None, 0, _SHIFT):
            raise ValueError(
                f"--s2_offset is {_SHIFT} (processing baseline 04.00 and later) or 0 (earlier, or "
                f"corrected), not {self.s2_offset}"
            )

    def rules(self) -> dict[str, tuple[str, str]]:
        """Asset -> (modality or 'ignore', band or '').

        Raises:
          ValueError: a text of another form, an unknown modality or band.
        """
        out = {}
        for text in self.assets:
            found = re.fullmatch(r"([^:]+):([\w-]+)(?:/(\w+))?", text.strip())
            if found is None:
                raise ValueError(
                    f"--assets: {text!r} is not of the form NAME:MODALITY/BAND or NAME:ignore"
                )
            name, modality, band = found[1], found[2], found[3] or ""
            if modality != IGNORE and modality not in modalities.names():
                near = closest(modality, (*modalities.names(), IGNORE))
                raise ValueError(f"--assets: unknown modality {modality!r}; {near}")
            if band and band_names.canonical(band, modality) is None:
                known = ", ".join(modalities.get(modality).bands)
                raise ValueError(f"--assets: {modality} has no band {band!r}; it has {known}")
            out[name] = modality, band
        return out


def read(source: AnyPath, o: Options, held: Any = None) -> tuple[list[Raster], list[str]]:
    """The rasters of items, and notes on what was left out.

    Args:
      source: where they lie.
      o: see there.
      held: the object of its JSON, if it was read before.

    Raises:
      ValueError: it cannot be read, or an item does not say what is needed.
    """
    rules, rasters = o.rules(), []
    ignored: dict[str, int] = {}
    seen: set[str] = set()
    count = 0
    for item, base in _items(source, held):
        count += 1
        _check(item)
        assets = {k: a for k, a in (item.get("assets") or {}).items() if a and a.get("href")}
        seen.update(assets)
        for name, asset in assets.items():
            raster = _raster(item, base, name, asset, rules, o.s2_offset)
            if raster is None:
                ignored[name] = ignored.get(name, 0) + 1
            else:
                rasters.append(raster)
    lacking = [name for name in rules if name not in seen]
    if lacking:
        shown = ", ".join(sorted(seen)) or "none"
        raise ValueError(f"--assets: no item of {source} has {lacking[0]!r}; they have: {shown}")
    if not rasters:
        shown = f" ({', '.join(sorted(ignored))})" if ignored else ""
        raise ValueError(
            f"none of the assets{shown} of the {count} items of {source} is a GeoTIFF of known "
            "bands: say what they are with --assets=NAME:MODALITY/BAND,..."
        )
    notes = [f"{len(rasters)} rasters of {count} STAC items"]
    if ignored:
        shown = ", ".join(f"{name} {n}" for name, n in sorted(ignored.items()))
        notes.append(f"assets that are not used: {shown}")
    return rasters, notes


def _check(item: Mapping[str, Any]) -> None:
    """Raises ValueError if an item is not made as STAC says."""
    where = f"the STAC item {item.get('id')}"
    for name in ("assets", "properties"):
        if not isinstance(item.get(name) or {}, Mapping):
            raise ValueError(f"{where} is damaged: its {name!r} is no object")
    for name, asset in (item.get("assets") or {}).items():
        if not isinstance(asset or {}, Mapping):
            raise ValueError(f"{where} is damaged: its asset {name!r} is no object")
        for key in (*_BANDS, "roles"):
            held = (asset or {}).get(key) or []
            kinds = str if key == "roles" else Mapping
            if not isinstance(held, list) or not all(not b or isinstance(b, kinds) for b in held):
                raise ValueError(f"{where} is damaged: {key!r} of its asset {name!r}")


def _items(source: AnyPath, held: Any) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(item, where relative paths of it start) of a file or folder."""
    if isinstance(source, Path) and source.is_dir():
        # A collection may lie beside the items that it links to: each file counts once.
        seen: set[str] = set()
        for path in sorted(source.glob("*.json")):
            yield from _below(path, load(path), 0, seen)
    elif source.name.lower().endswith((".parquet", ".geoparquet")):
        yield from _rows(source)
    else:
        yield from _below(source, load(source) if held is None else held, 0, set())


def load(source: AnyPath) -> Any:
    """The JSON of a file or URL.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        if isinstance(source, Path):
            check_file(source)
        return json.loads(source.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{source} cannot be read as JSON: {e}") from None


def _below(
    source: AnyPath, held: Any, depth: int, seen: set[str]
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """As `_items`, of an object and of what it links to; `seen` has the files of items before."""
    base, kind = str(source.parent), held.get("type") if isinstance(held, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{source} is no STAC item, collection or catalogue")
    if kind == "Feature":
        name = str(source.resolve() if isinstance(source, Path) else source)
        if name not in seen:
            seen.add(name)
            yield held, base
        return
    for name in ("features", "links"):
        if not isinstance(held.get(name) or [], list):
            raise ValueError(f"{source} is damaged: its {name!r} is no list")
    if kind == "FeatureCollection":
        for number, item in enumerate(held.get("features") or [], 1):
            if not isinstance(item, dict) or "assets" not in item:
                raise ValueError(f"{source}: feature {number} is no STAC item: it has no assets")
            yield item, base
        return
    if depth > _DEEPEST:
        raise ValueError(f"the links of {source} go round in circles")
    for link in held.get("links") or []:
        if isinstance(link, Mapping) and link.get("rel") in ("item", "child"):
            if not link.get("href"):
                raise ValueError(f"{source} is damaged: one of its links has no href")
            path = location(_joined(base, str(link["href"])))
            yield from _below(path, load(path), depth + 1, seen)


def _rows(source: AnyPath) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The items of a stac-geoparquet file, whose properties are columns."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "reading Parquet needs the 'geo' extra: pip install 'olmoearth-jax[geo]'"
        ) from None
    try:
        with source.open("rb") as file:
            rows = pyarrow.parquet.read_table(file).drop_columns(["geometry"]).to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as e:
        raise ValueError(f"{source} cannot be read as stac-geoparquet: {e}") from None
    for row in rows:
        if "assets" not in row:
            raise ValueError(f"{source} is no stac-geoparquet: it has no column 'assets'")
        yield {**row, "properties": row}, str(source.parent)


def _joined(base: str, href: str) -> str:
    """Where a link leads."""
    if re.match(r"[a-z][a-z0-9+.-]*://|/", href):
        return href
    protocol, mark, rest = base.rpartition("://")
    return f"{protocol}{mark}{posixpath.normpath(posixpath.join(rest, href))}"


def _raster(
    item: Mapping[str, Any], base: str, name: str, asset: Mapping[str, Any],
    rules: Mapping[str, tuple[str, str]], s2_offset: int | None,
) -> Raster | None:  # fmt: skip
    """An asset as a raster; None if it is not used."""
    where = f"the STAC item {item.get('id')}"
    modality, bands = _meaning(where, item, name, asset, rules)
    if not modality:
        return None
    properties = item.get("properties") or {}
    date = properties.get("datetime") or properties.get("start_datetime")
    if not date and modalities.get(modality).multitemporal:
        raise ValueError(f"{where} has no datetime")
    offset = None
    if modality == "sentinel2_l2a":
        # 0 of the flag holds against tags of the file, too; where nothing is to do, they count.
        offset = _offset(where, properties) or None if s2_offset is None else s2_offset
    told = _described(asset)
    fills = {str(b["nodata"]) for b in told if b.get("nodata") is not None}
    try:
        fill = float(fills.pop()) if len(fills) == 1 else None
    except ValueError as e:
        raise ValueError(f"{where}: nodata of its asset {name!r} is no number: {e}") from None
    day = date.isoformat() if isinstance(date, datetime.date) else str(date or "")
    return Raster(
        _joined(base, str(asset["href"])), day[:10], modality, bands,
        offset=None if offset is None else float(offset), nodata=fill,
    )  # fmt: skip


def _described(asset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What an asset says of its bands, in any version of STAC.

    What holds for all of them may stand beside the list, and then one band needs no list.
    """
    lists = [asset.get(key) or [] for key in _BANDS]
    shared = {k: asset[k] for k in ("nodata", "eo:common_name") if asset.get(k) is not None}
    most = max(map(len, lists)) or int("eo:common_name" in shared)
    out: list[dict[str, Any]] = [dict(shared) for _ in range(most)]
    for bands in lists:
        for held, band in zip(out, bands, strict=False):
            held.update({k: v for k, v in (band or {}).items() if v is not None})
    return out


def _meaning(
    where: str, item: Mapping[str, Any], name: str, asset: Mapping[str, Any],
    rules: Mapping[str, tuple[str, str]],
) -> tuple[str, list[str]]:  # fmt: skip
    """(modality, bands) of an asset; ('', []) if it is not used."""
    if name in rules:
        modality, band = rules[name]
        if modality == IGNORE:
            return "", []
        return modality, [band] if band else _bands_of(asset, modality)
    kind, href = str(asset.get("type") or ""), str(asset["href"]).partition("?")[0]
    if not ("tiff" in kind or (not kind and href.lower().endswith((".tif", ".tiff")))):
        return "", []
    if ({name.lower()} | {str(r).lower() for r in asset.get("roles") or ()}) & _PICTURES:
        return "", []
    sensor = _sensor_of(where, item)
    if sensor:
        band = band_names.canonical(name, sensor)
        bands = [band] if band else _bands_of(asset, sensor)
        return (sensor, bands) if bands else ("", [])
    names = [str(b.get("name") or "") for b in _described(asset)]
    fits = band_names.identify([name]) or (band_names.identify(names) if all(names) else [])
    if len(fits) > 1:
        shown = " or ".join(m for m, _ in fits)
        raise ValueError(
            f"the asset {name!r} of {where} may be {shown}: say so with "
            f"--assets={name}:{fits[0][0]}/{fits[0][1][0]} or --assets={name}:ignore"
        )
    return (fits[0][0], list(fits[0][1])) if fits else ("", [])


def _bands_of(asset: Mapping[str, Any], modality: str) -> list[str]:
    """The bands that an asset says it has; none if one of them is unknown."""
    out = []
    for band in _described(asset):
        names = [band.get("name"), band.get("common_name"), band.get("eo:common_name")]
        found = [band_names.canonical(str(n), modality) for n in names if n]
        out.append(next((b for b in found if b), None))
    return [] if None in out else list(map(str, out))


def _sensor_of(where: str, item: Mapping[str, Any]) -> str:
    """The modality that an item's sensor is, or ''."""
    properties = item.get("properties") or {}
    keys = ("constellation", "platform", "mission")
    words = [str(item.get("collection") or ""), *(str(properties.get(k) or "") for k in keys)]
    text = " ".join(words).lower().replace("_", "-")
    if words[0].lower().replace("-", "_") in modalities.names():
        return words[0].lower().replace("-", "_")
    for word, modality in _SENSORS.items():
        if word in text:
            _check_product(where, modality, words[0], properties)
            return modality
    return ""


def _check_product(where: str, modality: str, collection: str, properties: Mapping[str, Any]):
    """Raises ValueError for products of a sensor that no model was trained on.

    Their bands have the names and the range of those that were, so nothing else would tell.
    """
    collection = collection.lower().replace("_", "-")
    level = " ".join([collection, *(str(properties.get(k) or "").lower() for k in _LEVELS)])
    if re.match(r"hls", collection):
        raise ValueError(f"{where} is of HLS (harmonised values), which no model was trained on")
    if modality == "sentinel2_l2a" and re.search(r"l1c|level-1c|msi1c", level):
        raise ValueError(f"{where} is Sentinel-2 L1C; the models were trained on L2A")
    if modality == "landsat":
        if re.search(r"l2|level-2", level):
            raise ValueError(f"{where} is Landsat level 2; the models were trained on level 1")
        older = re.search(r"landsat-?0?([1-7])\b", str(properties.get("platform")).lower())
        if older:
            raise ValueError(
                f"{where} is of Landsat {older[1]}; the models were trained on Landsat 8 and 9, "
                "whose bands are others"
            )


def _offset(where: str, properties: Mapping[str, Any]) -> int:
    """What must be added to stored values of Sentinel-2 before they are divided by 10,000."""
    if properties.get("earthsearch:boa_offset_applied") is True:
        return 0
    text = properties.get("s2:processing_baseline") or properties.get("processing:version")
    try:
        baseline = float(str(text))
        if not math.isfinite(baseline):
            raise ValueError(text)
        return _SHIFT if baseline >= _SHIFTED else 0
    except ValueError:
        raise ValueError(
            f"{where} does not say the processing baseline of its Sentinel-2 values: give "
            "--s2_offset=-1000 (04.00 and later) or --s2_offset=0 (earlier, or corrected)"
        ) from None


def leads_to_items(held: Any) -> bool:
    """Whether the object of a JSON file is of STAC, and no list of rasters."""
    return isinstance(held, dict) and held.get("type") in KINDS
