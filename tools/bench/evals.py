"""Times kNN and the linear probe, beside scikit-learn and PyTorch where they are installed.

    python -m tools.bench.evals --rows=20000 --width=768
    python -m tools.bench.evals --rows=100000 --skip_reference

PyTorch runs the same probe: batch norm, one linear layer, AdamW, the same batches and rates. Runs
are interleaved and the smallest CPU time of each counts, so that other work on the machine matters
little. Prints one JSON line with the settings, the device and the figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from olmoearth_jax.configlib.tasks import DatasetInfo, EvalTaskConfig
from olmoearth_jax.evals import knn, linear_probe

CLASSES = 10
LR = 0.01


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Smallest seconds on the clock and of the CPU of each run, made in turns."""
    out: dict[str, float] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            clock, cpu = time.perf_counter(), time.process_time()
            run()
            spent = {"s": time.perf_counter() - clock, "cpu_s": time.process_time() - cpu}
            for unit, value in spent.items():
                key = f"{name}_{unit}"
                out[key] = min(out.get(key, np.inf), value)
    for name in list(runs)[1:]:
        for unit in ("s", "cpu_s"):
            first = next(iter(runs))
            out[f"{first}_to_{name}_{unit}"] = out[f"{first}_{unit}"] / out[f"{name}_{unit}"]
    return out


def bench_knn(rows: int, width: int, k: int, reference: bool, repeats: int) -> dict[str, float]:
    """The k nearest of `rows` rows for each of as many queries."""
    rng = np.random.default_rng(0)
    train, query = (rng.standard_normal((rows, width), dtype=np.float32) for _ in range(2))
    knn.neighbours(train, query[: knn.QUERY_BLOCK], k)  # compiles
    runs: dict[str, Callable[[], object]] = {"knn": lambda: knn.neighbours(train, query, k)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = interleaved(runs, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out |= {"knn_before_rss_gb": before / 2**20, "knn_peak_rss_gb": peak / 2**20}
    if reference and importlib.util.find_spec("sklearn"):
        from sklearn.neighbors import NearestNeighbors

        model = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(train)
        runs["knn_sklearn"] = lambda: model.kneighbors(query)
        out |= interleaved(runs, repeats)
    return out


def torch_probe(x: np.ndarray, y: np.ndarray, epochs: int, size: int) -> Callable[[], object]:
    """The same probe in PyTorch, as a function that trains it."""
    import torch  # pyright: ignore[reportMissingImports]

    data, labels = torch.from_numpy(x), torch.from_numpy(y)
    batches = -(-len(x) // size)

    def train() -> object:
        torch.manual_seed(0)
        width = x.shape[1]
        layers = torch.nn.BatchNorm1d(width), torch.nn.Linear(width, CLASSES)
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01)
        for epoch in range(epochs):
            order = torch.randperm(len(x))
            for batch in range(batches):
                position = epoch + batch / batches
                lr = float(linear_probe.learning_rate(LR, epochs, position))
                optimizer.param_groups[0]["lr"] = lr
                rows = order[batch * size : (batch + 1) * size]
                with torch.autocast("cpu", torch.bfloat16):
                    loss = torch.nn.functional.cross_entropy(model(data[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model

    return train


def bench_probe(
    rows: int, width: int, epochs: int, reference: bool, repeats: int
) -> dict[str, float]:
    """A linear classification probe, compilation included in the first of the runs."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, width), dtype=np.float32)
    y = (x @ rng.standard_normal((width, CLASSES))).argmax(1)
    task = EvalTaskConfig(probe_lr=LR, epochs=epochs)
    info = DatasetInfo("bench", "classification", CLASSES, ())
    splits = {"train": (x, y), "valid": (x[:1000], y[:1000])}
    runs: dict[str, Callable[[], object]] = {
        "probe": lambda: linear_probe.train_probe(task, info, splits)
    }
    if reference and importlib.util.find_spec("torch"):
        runs["probe_torch"] = torch_probe(x, y, epochs, task.probe_batch_size)
    if reference and importlib.util.find_spec("sklearn"):
        from sklearn.linear_model import SGDClassifier

        options: dict[str, Any] = {"max_iter": epochs, "tol": None, "n_jobs": 2}
        model = SGDClassifier(loss="log_loss", **options)
        runs["probe_sklearn_sgd"] = lambda: model.fit(x, y)
    return interleaved(runs, repeats)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--probe_rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--skip_reference", action="store_true")
    parser.add_argument("--only", choices=["knn", "probe"])
    args = parser.parse_args(argv)
    figures, reference = {}, not args.skip_reference
    if args.only != "probe":
        figures |= bench_knn(args.rows, args.width, args.k, reference, args.repeats)
    if args.only != "knn":
        figures |= bench_probe(args.probe_rows, args.width, args.epochs, reference, args.repeats)
    device = jax.devices()[0].device_kind
    figures = {k: round(v, 4) for k, v in figures.items()}
    print(json.dumps({**vars(args), "device": device, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
