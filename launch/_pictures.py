"""Drawing of samples, maps and token masks for `launch.visualize`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.images import RGB, stretched
from olmoearth_jax.masks import CODES
from olmoearth_jax.modalities import MISSING, Tokenization

_WORLDCOVER = {
    10: ("trees", "#006400"),
    20: ("shrubs", "#ffbb22"),
    30: ("grass", "#ffff4c"),
    40: ("crops", "#f096ff"),
    50: ("built-up", "#fa0000"),
    60: ("bare", "#b4b4b4"),
    70: ("snow and ice", "#f0f0f0"),
    80: ("water", "#0064c8"),
    90: ("wetland", "#0096a0"),
    95: ("mangroves", "#00cf75"),
    100: ("moss and lichen", "#fae6a0"),
}
_MASKS = {code: (about.words, about.colour) for code, about in enumerate(CODES)}
_GREY = 0.93
_ABSENT = "#f2f2f2"


@dataclasses.dataclass(frozen=True)
class Picture:
    """What the sheet of one sample shows.

    Attributes:
      title: its first line.
      arrays: raw values of the whole tile per modality, MISSING where there are none.
      dates: one text per timestep.
      crop: (row, column, side) in 10 m pixels and (first, last) timestep, or None.
      masks: per view, the token masks of the crop by modality.
    """

    title: str
    arrays: Mapping[str, np.ndarray]
    dates: Sequence[str]
    crop: tuple[int, int, int, int, int] | None
    masks: Mapping[str, Mapping[str, np.ndarray]]


def sheet(picture: Picture, tokenization: Tokenization) -> Any:
    """A figure with the series, the maps, what is available, and the masks of each view."""
    from matplotlib.figure import Figure

    series = [n for n in picture.arrays if registry.get(n).kind == "space_time"]
    maps = [n for n in picture.arrays if registry.get(n).kind == "space_only"]
    columns = len(picture.dates)
    map_rows = -(-len(maps) // 4)
    heights = [1.0] * len(series) + [2.6] * map_rows + [1.6] + [4.0] * bool(picture.masks)
    figure = Figure(figsize=(1.35 * columns + 1, 1.45 * sum(heights)), layout="constrained")
    figure.suptitle(picture.title)
    outer = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for row, name in enumerate(series):
        _series(figure, outer[row], name, picture)
    for row in range(map_rows):
        inner = outer[len(series) + row].subgridspec(1, 4)
        for column, name in enumerate(maps[4 * row : 4 * row + 4]):
            axes = figure.add_subplot(inner[column])
            _map(axes, name, picture.arrays[name][:, :, 0])
            if picture.crop is not None:
                _rectangle(axes, picture.crop, registry.get(name).image_factor)
    _availability(figure.add_subplot(outer[len(series) + map_rows]), picture)
    if picture.masks:
        inner = outer[len(heights) - 1].subgridspec(1, len(picture.masks))
        for column, (view, masks) in enumerate(picture.masks.items()):
            _masks(figure.add_subplot(inner[column]), view, masks, tokenization)
    return figure


def sample_map(latlon: np.ndarray, title: str) -> Any:
    """A figure of where samples lie.

    Args:
      latlon: [samples, 2] degrees.
      title: its first line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.add_subplot()
    counts, _, _ = np.histogram2d(
        latlon[:, 0], latlon[:, 1], bins=(90, 180), range=((-90, 90), (-180, 180))
    )
    shown = np.ma.masked_equal(counts, 0)
    image = axes.imshow(shown, origin="lower", extent=(-180, 180, -90, 90), cmap="viridis")
    axes.scatter(latlon[:, 1], latlon[:, 0], s=2, c="black", alpha=0.4, linewidths=0)
    axes.set(xlabel="longitude", ylabel="latitude", title=title)
    axes.set_xticks(range(-180, 181, 30))
    axes.set_yticks(range(-90, 91, 30))
    axes.grid(alpha=0.3)
    figure.colorbar(image, ax=axes, label="samples per 2 x 2 degrees", shrink=0.8)
    return figure


def _series(figure: Any, place: Any, name: str, picture: Picture) -> None:
    values = picture.arrays[name]
    image = stretched(name, values, _GREY)
    inner = place.subgridspec(1, len(picture.dates), wspace=0.03)
    for step, date in enumerate(picture.dates):
        axes = figure.add_subplot(inner[step])
        axes.imshow(image[:, :, step], interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(date, fontsize=7)
        if step == 0:
            axes.set_ylabel(name, fontsize=8)
        if picture.crop is not None and picture.crop[3] <= step < picture.crop[4]:
            _rectangle(axes, picture.crop, registry.get(name).image_factor)


def _rectangle(axes: Any, crop: tuple[int, int, int, int, int], factor: int) -> None:
    from matplotlib.patches import Rectangle

    row, col, side = (v * factor for v in crop[:3])
    axes.add_patch(
        Rectangle((col - 0.5, row - 0.5), side, side, fill=False, edgecolor="red", linewidth=1)
    )


def _map(axes: Any, name: str, values: np.ndarray) -> None:
    axes.set_title(name, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    if (values == MISSING).all():
        axes.set_facecolor(_ABSENT)
        axes.text(0.5, 0.5, "absent", transform=axes.transAxes, ha="center")
        return
    if name in RGB or name == "gse":
        axes.imshow(stretched(name, values, _GREY), interpolation="nearest")
    elif values.shape[-1] > 1:
        _classes(axes, *_layers(name, values))
    elif name == "worldcover":
        known = {c: (f"{c} {text}", colour) for c, (text, colour) in _WORLDCOVER.items()}
        _classes(axes, values[..., 0], known)
    elif name in ("cdl", "eurocrops"):
        _classes(axes, values[..., 0], {})
    else:
        shown = np.ma.masked_equal(values[..., 0], MISSING)
        axes.figure.colorbar(axes.imshow(shown, cmap="terrain"), ax=axes, shrink=0.8)


def _layers(name: str, values: np.ndarray) -> tuple[np.ndarray, dict[int, tuple[str, str]]]:
    """Stacked 0/1 layers as one map of the last layer that is set (0: none)."""
    bands = registry.get(name).bands
    order = np.arange(1, len(bands) + 1)
    top = np.where((values > 0) & (values != MISSING), order, 0).max(axis=-1)
    known = {int(i): (bands[i - 1], "") for i in np.unique(top) if i}
    return top, {0: ("none", _ABSENT), **known}


def _classes(axes: Any, codes: np.ndarray, known: Mapping[int, tuple[str, str]]) -> None:
    """A map of codes with a legend of those that occur."""
    import matplotlib
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    palette = matplotlib.colormaps["tab20"]
    image, legend = np.ones((*codes.shape, 3)), []
    for i, code in enumerate(int(c) for c in np.unique(codes)):
        text, colour = known.get(code, (f"code {code}", ""))
        rgb = to_rgb(colour) if colour else palette(i % 20)[:3]
        image[codes == code] = rgb
        legend.append(Patch(color=rgb, label="missing" if code == MISSING else text))
    axes.imshow(image, interpolation="nearest")
    axes.legend(
        handles=legend[:14], fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False
    )


def _availability(axes: Any, picture: Picture) -> None:
    """Which modality has data at which timestep; maps fill their row."""
    names = list(picture.arrays)
    grid = np.zeros((len(names), len(picture.dates)))
    for i, name in enumerate(names):
        values = picture.arrays[name]
        if registry.get(name).multitemporal:
            rest = tuple(a for a in range(values.ndim) if a != values.ndim - 2)
            grid[i] = (values != MISSING).any(axis=rest)
        else:
            grid[i] = (values != MISSING).any()
    axes.imshow(grid, aspect="auto", cmap="Greens", vmin=0, vmax=1.4, interpolation="nearest")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks(range(len(picture.dates)), picture.dates, fontsize=7)
    axes.set_xticks(np.arange(0.5, len(picture.dates)), minor=True)
    axes.set_yticks(np.arange(0.5, len(names)), minor=True)
    axes.grid(which="minor", color="white")
    axes.set_title("available", fontsize=9)


def _masks(
    axes: Any, view: str, masks: Mapping[str, np.ndarray], tokenization: Tokenization
) -> None:
    """All tokens of a view: one block of patches per band set (row) and timestep (column)."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    grid = next((m.shape[0] for m in masks.values() if m.ndim == 4), 1)
    steps = max((m.shape[-2] for m in masks.values() if m.ndim > 1), default=1)
    rows, labels = [], []
    for name, mask in masks.items():
        for i in range(tokenization.num_band_sets(name)):
            rows.append(_blocks(mask[..., i], grid, steps))
            labels.append(name if i == 0 else "")
    image = np.ma.masked_less(np.concatenate(rows), 0)
    palette = ListedColormap([colour for _, colour in _MASKS.values()])
    axes.imshow(image, cmap=palette, vmin=-0.5, vmax=3.5, aspect="auto", interpolation="nearest")
    axes.set_yticks([grid * (i + 0.5) - 0.5 for i in range(len(rows))], labels, fontsize=6)
    axes.set_xticks([grid * (t + 0.5) - 0.5 for t in range(steps)], range(1, steps + 1), fontsize=7)
    for i in range(1, len(rows)):
        axes.axhline(grid * i - 0.5, color="black", linewidth=0.4)
    for t in range(1, steps):
        axes.axvline(grid * t - 0.5, color="black", linewidth=0.4)
    axes.set_title(f"tokens of {view}: {grid} x {grid} patches, {steps} timesteps", fontsize=9)
    handles = [Patch(color=colour, label=text) for text, colour in _MASKS.values()]
    axes.legend(handles=handles, fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0))


def _blocks(mask: np.ndarray, grid: int, steps: int) -> np.ndarray:
    """Tokens [h, w, T], [T] or [] as one row of `steps` blocks of grid x grid; -1 is nothing."""
    out = np.full((grid, steps, grid), -1)
    if mask.ndim == 3:
        out[:, : mask.shape[2]] = mask.transpose(0, 2, 1)
    else:
        values = np.atleast_1d(mask)
        out[:, : len(values)] = values[None, :, None]
    return out.reshape(grid, steps * grid)
