"""The v1.2 model and its loss on one page, in plain JAX; a test holds it to the real one.

The package computes this on packed streams; here it is one dense batch, masks as attention masks.

    images      {modality: float32 [B, H f, W f, T, C]}  normalised; T = 1 for maps; f: `finer`
    masks       {modality: int [B, h, w, T]}             0 seen, 1 hidden, 2 predicted, 3 missing
    timestamps  int [B, T, 3]                            day 1..31, month 0..11, year
    params      nested dict with the names of our checkpoints; lists have keys '0', '1', ...

A modality's bands make one token per patch and time. Left out: dropout of paths and bands, several
band sets (v1), modalities without a pixel grid, the location grid (v1.3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SEEN, PREDICTED, MISSING = 0, 2, 3
DAYS_BEFORE_MONTH = jnp.array([0.0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334])


class Model(NamedTuple):
    """The few figures that shapes of parameters do not tell."""

    heads: int = 8
    decoder_heads: int = 8
    base_patch: int = 8  # side to which patches are resized
    in_time: tuple[str, ...] = ("sentinel2_l2a", "sentinel1", "landsat")
    finer: tuple[tuple[str, int], ...] = ()  # modalities with f x f pixels to a pixel of 10 m
    days_per_unit: float = 30.0


def linear(p: Any, x: Array) -> Array:
    return jnp.dot(x, p["kernel"], precision=jax.lax.Precision.HIGHEST) + p["bias"]


def layer_norm(p: Any, x: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def layers(p: Any) -> list:
    """The members '0', '1', ... of a list in order."""
    return [p[str(i)] for i in range(len(p))]


def bicubic(size: int, new: int) -> np.ndarray:
    """[new, size]: antialiased bicubic resize (Keys, a = -0.5) of one axis."""
    step = size / new
    stretch = max(step, 1.0)
    matrix = np.zeros((new, size))
    for i in range(new):
        centre = step * (i + 0.5)
        first, last = (int(centre + side * stretch + 0.5) for side in (-2, 2))
        taps = np.arange(max(first, 0), min(last, size))
        d = np.abs(taps - centre + 0.5) / stretch
        near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
        weight = np.where(d < 1, near, np.where(d < 2, far, 0))
        matrix[i, taps] = weight / weight.sum()
    return matrix.astype(np.float32)


def embed_patches(p: Any, images: Array, patch: int, base: int) -> Array:
    """[B, H, W, T, C] -> [B, h, w, T, D]: resize, a small layer per pixel, one map per patch."""
    batch, height, width, steps, bands = images.shape
    rows, cols = height // patch, width // patch
    down, across = bicubic(height, rows * base), bicubic(width, cols * base)
    if patch != base:
        high = jax.lax.Precision.HIGHEST
        images = jnp.einsum("yh,xw,bhwtc->byxtc", down, across, images, precision=high)
    x = images.reshape(batch, rows, base, cols, base, steps, bands).transpose(0, 1, 3, 5, 2, 4, 6)
    for layer in layers(p["pixel_proj"]):
        x = jax.nn.relu(linear(layer, x))
    return linear(p["proj"], x.reshape(*x.shape[:4], -1))


class Place(NamedTuple):
    """Where and when each token [B, N] is, and what: the index of its modality."""

    position: Array  # float32 [B, N, 3]: time in 30 days, row and column in 10 m
    month: Array  # int [B, N]
    modality: np.ndarray  # int [N]
    in_time: np.ndarray  # bool [N]


def places(m: Model, names: list, shapes: dict, timestamps: Array, patch: int) -> Place:
    """Coordinates of all tokens, modality after modality, in row-major order of (h, w, T)."""
    day, month, year = (timestamps[..., i] for i in range(3))
    days = 365.25 * (year - 2000).astype(jnp.float32) + DAYS_BEFORE_MONTH[month] + (day - 1)
    index = [np.stack(np.indices(shapes[n]).reshape(3, -1), -1) for n in names]  # row, column, step
    row, col, step = np.concatenate(index).T
    which = np.repeat(np.arange(len(names)), [len(i) for i in index])
    in_time = np.array([n in m.in_time for n in names])[which]
    shape = (len(timestamps), len(row))
    space = [jnp.broadcast_to(jnp.asarray(x * patch, jnp.float32), shape) for x in (row, col)]
    # A map has no date of its own: it takes the first one.
    position = jnp.stack([days[:, step] / m.days_per_unit, *space], axis=-1)
    return Place(position, month[:, step], which, in_time)


def encodings(p: Any, names: list[str], place: Place, width: int) -> Array:
    """Added to the tokens [B, N, D]: a learned quarter per modality, zeros, the month, zeros.

    Place and time act by rotation of queries and keys, so two quarters are empty.
    """
    quarter = width // 4
    channel = jnp.concatenate([p["channel"][n] for n in names])[place.modality]
    angle = 2 * np.pi * place.month[..., None] / 12
    ones = jnp.ones(quarter // 2)
    month = jnp.concatenate([jnp.sin(angle) * ones, jnp.cos(angle) * ones], -1)
    month = jnp.where(place.in_time[:, None], month, 0.0)
    channel = jnp.broadcast_to(channel, month.shape)
    none = jnp.zeros_like(month)
    return jnp.concatenate([channel, none, month, none], -1)


def rotate(x: Array, frequencies: Array, position: Array) -> Array:
    """Turns feature pairs of x [B, N, heads, d] by learned mixtures of (time, row, column)."""
    terms = [position[..., axis, None, None] * frequencies[axis] for axis in range(3)]
    angle = terms[0] + terms[1] + terms[2]
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def attention(p: Any, x: Array, context: Array, heads: int, at: Array, seen: Array) -> Array:
    """Queries from x, keys and values from the seen tokens of the context; `at`: their places."""
    high = jax.lax.Precision.HIGHEST

    def split(y: Array) -> Array:
        return y.reshape(*y.shape[:-1], heads, -1)

    q = rotate(split(linear(p["query"], x)), p["rope_freqs"], at)
    k = rotate(split(linear(p["key"], context)), p["rope_freqs"], at)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=high) * q.shape[-1] ** -0.5
    # A finite floor: a sample without any seen token stays free of NaN, and its row is dropped.
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1)
    weights = jnp.where(seen[:, None, None], weights, 0.0)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, split(linear(p["value"], context)), precision=high)
    return linear(p["out"], y.reshape(*y.shape[:2], -1))


def block(p: Any, x: Array, heads: int, at: Array, seen: Array, context: Any = None) -> Array:
    """Pre-norm block; a context makes it cross-attention, whose context is used as it is."""
    y = layer_norm(p["norm1"], x)
    x = x + attention(p["attention"], y, y if context is None else context, heads, at, seen)
    hidden = linear(p["mlp"]["fc1"], layer_norm(p["norm2"], x))
    return x + linear(p["mlp"]["fc2"], jax.nn.gelu(hidden, approximate=False))


def join(x: dict[str, Array], names: list[str]) -> Array:
    """{modality: [B, h, w, T, ...]} -> [B, N, ...]."""
    return jnp.concatenate([x[n].reshape(len(x[n]), -1, *x[n].shape[4:]) for n in names], axis=1)


def patches_of(m: Model, p: Any, images: dict, patch: int) -> dict:
    """Patch embeddings of every modality, and what the frozen target is made of."""
    out, table = {}, p["patch_embeddings"]["per_modality"]
    for n, x in images.items():
        f = dict(m.finer).get(n, 1)
        out[n] = embed_patches(table[n]["0"], x, patch * f, m.base_patch * f)
    return out


def encode(m: Model, p: Any, images: dict, masks: dict, timestamps: Array, patch: int):
    """(tokens [B, N, D], zero where not seen; pooled projection [B, D]; places)."""
    names = list(images)
    x = join(patches_of(m, p, images, patch), names)
    seen = join(masks, names) == SEEN
    place = places(m, names, {n: masks[n].shape[1:] for n in names}, timestamps, patch)
    x = x + encodings(p["encodings"], names, place, x.shape[-1])
    for layer in layers(p["blocks"]):
        x = block(layer, x, m.heads, place.position, seen)
    x = jnp.where(seen[..., None], layer_norm(p["norm"], x), 0.0)
    mean = x.sum(1) / jnp.maximum(seen.sum(1), 1)[:, None]
    return x, linear(p["project_and_aggregate"]["layers"]["0"], mean), place


def predict(m: Model, p: Any, names: list, x: Array, masks: dict, place: Place) -> Array:
    """Predictions [B, N, D] at every place; only those with mask 2 mean something."""
    seen = join(masks, names) == SEEN
    extra = encodings(p["encodings"], names, place, p["mask_token"].shape[-1])
    context = linear(p["embed"], layer_norm(p["input_norm"], x)) + extra
    y = p["mask_token"] + extra
    for layer in layers(p["blocks"]):
        y = block(layer, y, m.decoder_heads, place.position, seen, context)
    return linear(p["output_proj"], layer_norm(p["norm"], y))


def unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def dots(a: Array, b: Array) -> Array:
    return jnp.einsum("...id,...jd->...ij", a, b, precision=jax.lax.Precision.HIGHEST)


def token_loss(pred: Array, target: Array, valid: Array, tau: float, drop_equal: bool) -> Array:
    """Each predicted token of a modality must pick its own target among those of its sample.

    With `drop_equal` (maps, where whole areas look alike) targets with a cosine above 0.999 to the
    own one are no negatives, and a sample in which some token equals all others says nothing.
    """
    pred, target = unit(pred), unit(target)
    keep = jnp.broadcast_to(valid[:, None, :], (*valid.shape, valid.shape[1]))
    counts = valid.any(1)
    if drop_equal:
        equal = dots(target, target) > 0.999
        alike = (equal | ~keep).all(-1) & valid
        counts = counts & ~(alike.any(1) & (valid.sum(1) > 1))
        keep = keep & (~equal | jnp.eye(equal.shape[-1], dtype=bool))
    scores = dots(pred, target) / tau
    own = jnp.diagonal(scores, axis1=1, axis2=2)
    losses = 2 * tau * (jax.nn.logsumexp(jnp.where(keep, scores, -1e30), axis=-1) - own)
    value = jnp.where(valid, losses, 0.0).sum(1) / jnp.maximum(valid.sum(1), 1)
    return jnp.where(counts, value, 0.0).sum() / jnp.maximum(counts.sum(), 1)


def loss(
    m: Model, params: Any, target: Any, images: dict, views: tuple, timestamps: Array, patch: int,
    maps: tuple[str, ...], tau: float = 0.1, contrastive_weight: float = 0.05,
) -> Array:  # fmt: skip
    """The training loss of one group: two masked views (each like masks) of the same samples.

    `target` holds the frozen patch embeddings of the start: their output is predicted, no pixels.
    `maps` are predicted only, never seen.
    """
    names = list(images)
    goals = jax.lax.stop_gradient(patches_of(m, target, images, patch))
    total, pooled = jnp.zeros(()), []
    for masks in views:
        x, vector, place = encode(m, params["encoder"], images, masks, timestamps, patch)
        found = predict(m, params["decoder"], names, x, masks, place)
        pooled.append(unit(vector))
        start = 0
        for n in names:
            valid = masks[n].reshape(len(x), -1) == PREDICTED
            goal, stop = goals[n].reshape(*valid.shape, -1), start + valid.shape[1]
            total += token_loss(found[:, start:stop], goal, valid, tau, n in maps) / len(views)
            start = stop
    scores = dots(*pooled) / tau
    contrastive = (jax.nn.logsumexp(scores, axis=-1) - jnp.diagonal(scores)).mean()
    return total + contrastive_weight * contrastive
