"""Attributes of embedding stores, as the Zarr conventions want them."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from typing import Any

from olmoearth_jax.inference.quantize import Rule
from olmoearth_jax.maps.lattice import Grid
from olmoearth_jax.maps.plan import Period
from olmoearth_jax.maps.store_form import is_number

STORE_VERSION = 1
_RAW = "https://raw.githubusercontent.com"
_PAGE = "https://github.com"
POWER_PAGE = f"{_PAGE}/allenai/rslearn_projects/blob/master/rslp/large_scale_embeddings/README.md"
SOURCES = {
    "sentinel2_l2a": "https://sentinel.esa.int/web/sentinel/missions/sentinel-2",
    "sentinel1": "https://sentinel.esa.int/web/sentinel/missions/sentinel-1",
    "landsat": "https://www.usgs.gov/landsat-missions",
}


def _convention(repository: str, tag: str, uuid: str, name: str, text: str) -> dict[str, str]:
    return {
        "schema_url": f"{_RAW}/{repository}/refs/tags/{tag}/schema.json",
        "spec_url": f"{_PAGE}/{repository}/blob/{tag}/README.md",
        "uuid": uuid,
        "name": name,
        "description": text,
    }


GEOEMB = _convention(
    "geo-embeddings/embeddings-zarr-convention", "v1", "61c12cc5-0e28-4056-999a-480cf3fb7e4c",
    "geoemb:", "Geoembeddings convention for geospatial embedding arrays with model provenance",
)  # fmt: skip
SPATIAL = _convention(
    "zarr-conventions/spatial", "v0.1", "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "spatial:",
    "Spatial coordinate information",
)  # fmt: skip
PROJ = _convention(
    "zarr-conventions/proj", "v0.1", "f17cb550-5864-4468-aeb7-f3180cfb622f", "proj:",
    "Coordinate reference system information for geospatial data",
)  # fmt: skip
MULTISCALES = _convention(
    "zarr-conventions/multiscales", "v1", "d35379db-88df-4056-af3a-620245f8e347", "multiscales",
    "Multiscale layout of zarr datasets",
)  # fmt: skip


def quantization_of(rule: Rule) -> dict[str, Any] | None:
    """The member `geoemb:quantization`; None for floats."""
    if rule.dtype != "int8":
        return None
    out: dict[str, Any] = {
        "method": rule.method, "original_dtype": "float32", "quantized_dtype": "int8",
    }  # fmt: skip
    if rule.method == "signed_power":
        out["link"] = POWER_PAGE
    elif rule.method == "per_pixel_scale":
        out["scale"] = {"type": "array", "array_name": "scales", "nodata": "+inf"}
    else:
        out["scale"] = {"type": "scalar", "scale": rule.scale, "offset": rule.offset}
    return out


def rule_of(attrs: Any) -> Rule:
    """The rule that the attributes of a store or group name.

    Raises:
      ValueError: they name none that is known.
    """
    dtype, held = str(attrs.get("geoemb:data_type")), attrs.get("geoemb:quantization")
    normalize = str(attrs.get("olmoearth:normalize", "none"))
    if held is None and dtype in ("float16", "float32"):
        return Rule(dtype, "", normalize)
    method = held.get("method") if isinstance(held, dict) else None
    scale = held.get("scale") if isinstance(held, dict) else None
    scale = scale if isinstance(scale, dict) else {}
    if dtype != "int8" or method not in ("signed_power", "per_pixel_scale", "linear"):
        raise ValueError(f"this store's values are of an unknown form ({dtype}, {method})")
    if method != "linear":
        return Rule(dtype, method, normalize)
    numbers = [scale.get("scale"), scale.get("offset", 0.0)]
    if not all(map(is_number, numbers)) or not numbers[0]:
        raise ValueError(f"this store's linear values have no scale and offset: {scale}")
    return Rule(dtype, method, normalize, *map(float, numbers))


def scales_of(attrs: Any) -> str:
    """Name of the array that holds the scales of per_pixel_scale."""
    held = attrs.get("geoemb:quantization")
    scale = held.get("scale") if isinstance(held, dict) else None
    return str(scale.get("array_name", "scales")) if isinstance(scale, dict) else "scales"


def root_attributes(
    rule: Rule,
    dimensions: int,
    token: float,
    model: str,
    modalities: Sequence[str],
    software: str,
    widths: Sequence[int] = (),
    provenance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Attributes of the root group.

    Args:
      rule: of the values.
      dimensions: D.
      token: side of an embedding in metres.
      model: URL or urn of the model.
      modalities: what it saw.
      software: name and version.
      widths: Matryoshka widths, descending.
      provenance: further members, named without `olmoearth:`.
    """
    out: dict[str, Any] = {
        "zarr_conventions": [GEOEMB], "geoemb:type": "pixel", "geoemb:dimensions": dimensions,
        "geoemb:model": model,
        "geoemb:source_data": [SOURCES[n] for n in modalities if n in SOURCES],
        "geoemb:data_type": rule.dtype, "geoemb:gsd": token, "geoemb:spatial_layout": "utm_zones",
    }  # fmt: skip
    quantization = quantization_of(rule)
    if quantization is not None:
        out["geoemb:quantization"] = quantization
    out["geoemb:build_version"] = software
    if widths:
        out["geoemb:matryoshka_dims"] = list(widths)
    out["olmoearth:store_version"] = STORE_VERSION
    return out | {f"olmoearth:{key}": value for key, value in (provenance or {}).items()}


def zone_attributes(root: dict[str, Any], grid: Grid, periods: Sequence[Period]) -> dict[str, Any]:
    """Attributes of the group of a zone."""
    return {
        **root, "zarr_conventions": [GEOEMB, SPATIAL, PROJ], "proj:code": grid.crs,
        "spatial:dimensions": ["y", "x"], "spatial:transform": grid.transform,
        "spatial:shape": list(grid.shape), "spatial:bbox": grid.bbox,
        "spatial:registration": "pixel", "olmoearth:periods": [p.days for p in periods],
    }  # fmt: skip


def array_attributes(grid: Grid) -> dict[str, Any]:
    """Attributes of an array on the grid of a zone."""
    return {
        "zarr_conventions": [SPATIAL, PROJ], "proj:code": grid.crs,
        "spatial:dimensions": ["y", "x"], "spatial:transform": grid.transform,
        "spatial:shape": list(grid.shape), "grid_mapping": "spatial_ref",
    }  # fmt: skip


def _wkt(crs: str) -> str:
    from olmoearth_jax.data.crs import library

    return library().crs.CRS.from_user_input(crs).to_wkt(version="WKT2_2019")


def crs_attributes(grid: Grid) -> dict[str, str]:
    """Attributes of `spatial_ref`, for readers of the CF conventions."""
    a, b, c, d, e, f = grid.transform
    # In a thread of its own: GDAL keeps what it knows of a CRS per thread, and a GeoTIFF that was
    # opened there before leaves another text behind. Archives must not depend on that.
    with concurrent.futures.ThreadPoolExecutor(1) as fresh:
        wkt = fresh.submit(_wkt, grid.crs).result()
    return {"crs_wkt": wkt, "GeoTransform": " ".join(map(str, (c, a, b, f, d, e)))}
