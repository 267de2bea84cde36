"""Times kNN and the linear probe, beside scikit-learn where it is installed.

    python -m tools.bench.evals --rows=20000 --width=768
    python -m tools.bench.evals --rows=100000 --skip_sklearn

Prints one JSON line with the settings, the device and the figures.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import jax
import numpy as np

from olmoearth_jax.evals import knn, linear_probe

CLASSES = 10


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bench_knn(rows: int, width: int, k: int, reference: bool) -> dict[str, float]:
    """Seconds for the k nearest of `rows` rows for each of as many queries."""
    rng = np.random.default_rng(0)
    train, query = (rng.standard_normal((rows, width), dtype=np.float32) for _ in range(2))
    knn.neighbours(train, query[: knn.QUERY_BLOCK], k)  # compiles
    out = {"knn_s": _timed(lambda: knn.neighbours(train, query, k))}
    out["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if reference:
        from sklearn.neighbors import NearestNeighbors

        model = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(train)
        out["knn_sklearn_s"] = _timed(lambda: model.kneighbors(query))
        out["knn_ratio"] = out["knn_s"] / out["knn_sklearn_s"]
    return out


def bench_probe(rows: int, width: int, epochs: int, reference: bool) -> dict[str, float]:
    """Seconds for a linear classification probe, compilation included."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, width), dtype=np.float32)
    y = (x @ rng.standard_normal((width, CLASSES))).argmax(1)
    settings = linear_probe.ProbeSettings("classification", CLASSES, 0.01, epochs=epochs)
    split = (x[:1000], y[:1000])
    out = {"probe_s": _timed(lambda: linear_probe.train_probe(settings, (x, y), split))}
    if reference:
        from sklearn.linear_model import SGDClassifier

        model = SGDClassifier(loss="log_loss", max_iter=epochs, tol=-np.inf, n_jobs=2)
        out["probe_sklearn_sgd_s"] = _timed(lambda: model.fit(x, y))
        out["probe_ratio"] = out["probe_s"] / out["probe_sklearn_sgd_s"]
    return out


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--probe_rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--skip_sklearn", action="store_true")
    args = parser.parse_args(argv)
    figures = bench_knn(args.rows, args.width, args.k, not args.skip_sklearn)
    figures |= bench_probe(args.probe_rows, args.width, args.epochs, not args.skip_sklearn)
    device = jax.devices()[0].device_kind
    print(json.dumps({**vars(args), "device": device, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
