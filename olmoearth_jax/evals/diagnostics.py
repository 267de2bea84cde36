"""Label-free diagnostics of embeddings: rank, spread and similarity (spec/evals.md section 9)."""

from __future__ import annotations

import numpy as np

from olmoearth_jax.evals.layers import rng

RANK_ROWS = 4096
PAIR_ROWS = 2048
INTRA_SAMPLES = 256


def _subset(x: np.ndarray, rows: int, seed: int) -> np.ndarray:
    return x if len(x) <= rows else x[rng(seed, 2, rows).permutation(len(x))[:rows]]


def _std(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.std(x, axis=axis, ddof=1)


def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the singular values of x [N, D] (not centred); 0 if all are 0."""
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    # Round-off of null directions is no singular value: the float32 data carry no more digits.
    values = values[values > values.max(initial=0) * max(x.shape) * 1e-16]
    if not len(values):
        return 0.0
    p = values / values.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def _pairs(z: np.ndarray) -> np.ndarray:
    """Cosine similarities of all pairs i < j of the rows of z."""
    norm = np.linalg.norm(z, axis=-1, keepdims=True)
    z = z / np.maximum(norm, 1e-12)
    return (z @ z.T)[np.triu_indices(len(z), 1)]


def flat_diagnostics(x: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Metrics of embeddings [N, D]; empty for fewer than two.

    Raises:
      ValueError: not two-dimensional.
    """
    if x.ndim != 2:
        raise ValueError(f"diagnostics of flat embeddings need [N, D], got shape {x.shape}")
    if len(x) < 2:
        return {}
    x = x.astype(np.float64)
    norms = np.linalg.norm(x, axis=1)
    out = {
        "effective_rank": effective_rank(_subset(x, RANK_ROWS, seed)),
        "embedding_dim": float(x.shape[1]),
        "num_samples": float(len(x)),
        "norm_mean": float(norms.mean()),
        "norm_std": float(_std(norms)),
        "norm_min": float(norms.min()),
        "norm_max": float(norms.max()),
    }
    if len(x) >= 4:
        cosine = _pairs(_subset(x, PAIR_ROWS, seed))
        out |= {
            # Unit rows: the squared distance is 2 - 2 cos.
            "uniformity": float(np.log(np.mean(np.exp(-2 * (2 - 2 * cosine))))),
            "cosine_sim_mean": float(cosine.mean()),
            "cosine_sim_std": float(_std(cosine)),
            "cosine_sim_min": float(cosine.min()),
            "cosine_sim_max": float(cosine.max()),
        }
    return out


def spatial_diagnostics(x: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Metrics of embeddings [N, ..., D]: over all patches, of the means, and within samples."""
    patches = x.reshape(len(x), -1, x.shape[-1]).astype(np.float64)
    everything = _subset(patches.reshape(-1, x.shape[-1]), RANK_ROWS, seed)
    out = {f"global_{k}": v for k, v in flat_diagnostics(everything, seed).items()}
    out |= {f"inter_{k}": v for k, v in flat_diagnostics(patches.mean(1), seed).items()}
    if patches.shape[1] < 2:
        return out
    chosen = _subset(patches, INTRA_SAMPLES, seed)
    cosines = [_pairs(sample) for sample in chosen]
    spreads = [float(_std(c)) if len(c) > 1 else 0.0 for c in cosines]
    norms = np.linalg.norm(chosen, axis=-1)
    return out | {
        "intra_cosine_sim_mean": float(np.mean([c.mean() for c in cosines])),
        "intra_cosine_sim_std": float(np.mean(spreads)),
        "intra_norm_std": float(np.mean(_std(norms, axis=1))),
        "intra_num_patches": float(patches.shape[1]),
        "intra_num_images_sampled": float(len(chosen)),
    }


def diagnostics(x: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Flat metrics for [N, D], spatial ones for more axes."""
    return flat_diagnostics(x, seed) if x.ndim == 2 else spatial_diagnostics(x, seed)
