"""Goldens of downstream evaluation that need no data files; those that do are in `evals_data`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from olmoearth_jax.configlib import schema
from olmoearth_jax.configlib.tasks import METHODS, DatasetInfo, EvalTaskConfig, RunOptions
from olmoearth_jax.evals import (
    embeddings,
    finetune,
    knn,
    linear_probe,
    probe_heads,
    runner,
    scoring,
)
from olmoearth_jax.evals.datasets import bands
from olmoearth_jax.evals.models import EncoderModel
from olmoearth_jax.evals.samples import MASK, EvalSample
from olmoearth_jax.inference import quantize
from olmoearth_jax.interop import torch_keys
from olmoearth_jax.model import config as model_config
from olmoearth_jax.model import pooling
from olmoearth_jax.model.pooling import Pooling

from ..convert_evals import fit_buckets
from . import evals_data
from .common import Case, Checks, Result, load_json, load_npz, skipped

Arrays = Mapping[str, np.ndarray]


def cases(folder: Path) -> Iterator[Case]:
    """All cases of an evaluation golden folder.

    Raises:
      ValueError: malformed folder.
    """
    for name, record in load_json(folder / "manifest.json")["cases"].items():
        check = next((f for prefix, f in CHECKS.items() if name.startswith(prefix)), None)
        if check is not None:
            yield Case(name, _bind(check, name, folder / record["file"]))
        elif (on_data := evals_data.check_of(name)) is not None:
            yield Case(name, _bind(on_data, name, folder / record["file"]))
        else:
            yield skipped(name, "no check is written for this case")


def _bind(check: Callable, name: str, path: Path) -> Callable[[], Result]:
    return lambda: check(name, load_npz(path)) if check in _PLAIN else check(name, path)


def _json(z: Arrays, key: str) -> Any:
    return json.loads(str(z[key]))


def _same_metrics(checks: Checks, what: str, got: scoring.EvalResult, want: Mapping) -> None:
    checks.equal(f"{what} metric names", set(got.metrics), set(want["metrics"]))
    checks.equal(f"{what} primary key", got.primary_key, want["primary_key"])
    checks.array(f"{what} primary", got.primary, want["primary"])
    for key, value in want["metrics"].items():
        value = np.nan if value is None else value
        checks.array(f"{what} {key}", got.metrics.get(key, np.nan), value)


def _knn(name: str, z: Arrays) -> Result:
    checks = Checks(atol=1e-5)
    multilabel = "multilabel" in name
    ks = sorted(int(k.rsplit("_k", 1)[1]) for k in z if k.startswith("test_scores_k"))
    train, test = (z["train_x"], z["train_y"]), (z["test_x"], z["test_y"])
    skip = name.endswith("skip")
    for number, k in enumerate(ks):
        classes = z[f"test_scores_k{k}"].shape[1]
        scores, guess = knn.knn_scores(train, z["test_x"], classes, k, skip)
        checks.array(f"scores k={k}", scores, z[f"test_scores_k{k}"])
        checks.array(f"predictions k={k}", guess, z[f"test_pred_k{k}"], 0, 0)
        primary = "macro_f1" if multilabel and number == 0 else None
        task = EvalTaskConfig(primary_metric=primary)
        info = DatasetInfo("knn", "classification", classes, (), multilabel)
        count, seed = (30, 7) if multilabel else (50, 42)
        options = RunOptions(n_bootstrap=count, bootstrap_seed=seed, k=k, skip_nearest=skip)
        result, resampled = knn.run_knn(task, info, train, test, options)
        _same_metrics(checks, f"test k={k}", result, _json(z, f"test_result_json_k{k}"))
        valid, _ = knn.run_knn(task, info, train, (z["val_x"], z["val_y"]), options)
        want = _json(z, f"val_result_json_k{k}")
        # One validation row is the zero vector: its neighbours are tied, so it may differ.
        slack = 1 / len(z["val_y"]) + 1e-9
        checks.array(f"validation k={k}", valid.primary, want["primary"], 0, slack)
    for key, value in _json(z, f"bootstrap_json_k{ks[-1]}").items():
        checks.array(f"bootstrap {key}", resampled[key], value, 0, 1e-6)
    return checks.result()


def _segmentation(name: str, z: Arrays) -> Result:
    checks, want = Checks(rtol=1e-5, atol=1e-9), _json(z, "result_json")
    classes = z["scores"].shape[1]
    confusion = scoring.confusion_matrix(z["predictions"], z["labels"], classes)
    checks.array("confusion", confusion, z["confusion"], 0, 0)
    values = scoring.segmentation_metrics(z["predictions"], z["labels"], classes, z["scores"])
    _same_metrics(checks, "result", _result(values, "segmentation", want), want)
    return checks.result()


def _result(values: dict[str, float], task: str, want: Mapping) -> scoring.EvalResult:
    class_id = (
        int(want["primary_key"].rsplit("_", 1)[1]) if "class" in want["primary_key"] else None
    )
    return scoring.make_result(values, task, want["primary_metric"], class_id)


def _classification(name: str, z: Arrays) -> Result:
    checks, want = Checks(rtol=1e-6, atol=1e-9), _json(z, "result_json")
    multilabel = "multilabel" in name
    function = scoring.multilabel_metrics if multilabel else scoring.classification_metrics
    values = function(z["predictions"], z["labels"], z["scores"])
    task = "multilabel" if multilabel else "classification"
    _same_metrics(checks, "result", _result(values, task, want), want)
    return checks.result()


def _regression(name: str, z: Arrays) -> Result:
    checks = Checks(rtol=1e-5)
    values = scoring.regression_metrics(z["predictions"], z["labels"])
    for key, primary in (("result_json", None), ("result_rmse_json", "rmse")):
        got = scoring.make_result(values, "regression", primary)
        _same_metrics(checks, key, got, _json(z, key))
    return checks.result()


def _diagnostics(name: str, z: Arrays) -> Result:
    checks, want = Checks(rtol=1e-4, atol=1e-5), _json(z, "result_json")
    flat = name.startswith("diagnostics_flat")
    function = embeddings.flat_diagnostics if flat else embeddings.spatial_diagnostics
    got = function(z["embeddings"])
    checks.equal("names", set(got), set(want))
    for key, value in want.items():
        checks.array(key, got.get(key, np.nan), value)
    return checks.result()


def _int8(name: str, z: Arrays) -> Result:
    checks = Checks(rtol=1e-6)
    for part in ("", "spatial_"):
        x = z["spatial" if part else "embeddings"]
        got = quantize.quantize_int8(x).astype(int)
        checks.array(f"{part}quantized", got, z[f"{part}quantized"].astype(int), 0, 1)
        back = quantize.dequantize_int8(z[f"{part}quantized"])
        checks.array(f"{part}dequantized", back, z[f"{part}dequantized"])
    return checks.result()


def _percentile(name: str, z: Arrays) -> Result:
    checks = Checks(rtol=1e-6, atol=1e-9)
    for bits in quantize.BITS:
        fitted = fit_buckets(z["fit_embeddings"], bits)
        checks.array(f"{bits} bit quantiles", fitted.quantiles, z[f"quantiles_{bits}bit"])
        checks.array(f"{bits} bit midpoints", fitted.midpoints, z[f"midpoints_{bits}bit"])
        table = quantize.Buckets(z[f"quantiles_{bits}bit"], z[f"midpoints_{bits}bit"])
        for x, key in (("embeddings", "quantized"), ("spatial", "spatial_quantized")):
            checks.array(f"{key} {bits} bit", table.quantize(z[x]), z[f"{key}_{bits}bit"], 0, 0)
        back = table.dequantize(z[f"quantized_{bits}bit"])
        checks.array(f"{bits} bit dequantized", back, z[f"dequantized_{bits}bit"], 0, 0)
    return checks.result()


def _pca(name: str, z: Arrays) -> Result:
    checks = Checks()
    dim = z["train_out"].shape[-1]
    pca = embeddings.fit_pca(z["train"], dim)
    checks.array("variance", pca.variance_retained, z["variance_retained"], 1e-4, 0)
    # The sign of a component is arbitrary: one factor per component for all splits.
    want = z["train_out"].reshape(-1, dim)
    sign = np.sign((pca(z["train"]).reshape(-1, dim) * want).sum(0))
    for split in ("train", "val", "test"):
        scale = want.std(0)
        got = pca(z[split]) * sign / scale
        checks.array(split, got, z[f"{split}_out"] / scale, 0, 1e-3)
    return checks.result("1e-3 std, up to sign")


def _normalize(name: str, z: Arrays) -> Result:
    checks = Checks(rtol=1e-6, atol=1e-9)
    if name == "normalize_impute":
        given = _json(z, "input_json")
        pairs = [tuple(p) for p in given["imputes"]]
        got = bands.impute_stats(given["band_info"], pairs, given["all_bands"])
        checks.equal("statistics", got, _json(z, "output_json"))
        return checks.result()
    stats = bands.Statistics(z["means"], z["stds"], z["mins"], z["maxs"])
    for method in METHODS:
        got = bands.normalize(z["image"], stats, method)
        want = z[f"out_{method}"]
        checks.equal(f"{method} dtype", got.dtype, want.dtype)
        checks.array(method, got, want, atol=1.01 / 255 if method.endswith("_int") else None)
    return checks.result()


def probe_params(z: Arrays, prefix: str) -> tuple[dict, dict]:
    """Parameters and statistics of a recorded probe in our layout."""
    given = {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}
    params, stats = {}, {}
    for key in ("linear", "conv"):
        if f"{key}.weight" in given:
            kernel = given[f"{key}.weight"]
            kernel = kernel.reshape(len(kernel), -1).T.copy()
            params["linear"] = {"kernel": kernel, "bias": given[f"{key}.bias"]}
    if "batchnorm.weight" in given:
        params["norm"] = {"scale": given["batchnorm.weight"], "bias": given["batchnorm.bias"]}
        stats = {"mean": given["batchnorm.running_mean"], "var": given["batchnorm.running_var"]}
    return params, stats


def _probe(name: str, z: Arrays) -> Result:
    checks, s = Checks(atol=0.02), _json(z, "settings_json")
    bf16 = name.endswith("bf16")
    task = EvalTaskConfig(
        probe_lr=s["lr"],
        epochs=s["epochs"],
        linear_probe_eval_interval=s["eval_interval"],
        probe_batch_size=s["batch_size"],
        probe_type=s["probe_type"],
        use_dice_loss=s["use_dice_loss"],
        select_best_by_primary_metric=s["select_best_by_primary_metric"],
        primary_metric=s["primary_metric"],
        primary_metric_class=s["primary_metric_class"],
    )
    info = DatasetInfo("probe", s["task_type"], s["num_classes"], (), False, s["height_width"])
    options = RunOptions(n_bootstrap=s["n_bootstrap"], bootstrap_seed=s["bootstrap_seed"])
    names = {"train": "train", "valid": "val", "test": "test"}
    splits = {k: (z[f"{v}_x"], z[f"{v}_y"]) for k, v in names.items()}
    start = probe_params(z, "init.")
    extra = linear_probe.ProbeExtras(bf16=bf16, order=z["order"], start=start)
    out = linear_probe.train_probe(task, info, splits, options, extra)
    checks.array("first losses", out.losses[:20], z["loss"][:20], 3e-2 if bf16 else 1e-4, 0)
    checks.array("losses", out.losses, z["loss"], 3e-2 if bf16 else 2e-3, 0)
    checks.array("learning rates", out.lrs, z["lr"], 1e-6, 1e-15)
    # Regression scores are in the unit of the target, so their tolerance is relative.
    relative = 1e-3 if "regression" in s["task_type"] else 0.0
    checks.rtol = relative
    for got, want in zip(out.history, _json(z, "val_results_json"), strict=True):
        _same_metrics(checks, "validation", got, want)
    _same_metrics(checks, "reported validation", out.valid, _json(z, "final_val_json"))
    assert out.test is not None
    _same_metrics(checks, "test", out.test, _json(z, "test_json"))
    for key, value in _json(z, "bootstrap_json").items():
        checks.array(f"bootstrap {key}", out.bootstrap[key], value, 0, 0.05)
    if not bf16:
        best = probe_params(z, "best.")
        for group, values in best[0].items():
            for key, value in values.items():
                checks.array(f"best {group}.{key}", out.params[group][key], value, 1e-2, 1e-3)
    return checks.result("loss 3e-2" if bf16 else "loss 1e-4 then 2e-3; metrics 0.02")


def _attention(name: str, z: Arrays) -> Result:
    checks = Checks(atol=1e-4)
    params = {
        "query": z["param.query_token"].reshape(-1),
        "kv": {"kernel": z["param.kv.weight"].T, "bias": z["param.kv.bias"]},
        "linear": {"kernel": z["param.linear.weight"].T, "bias": z["param.linear.bias"]},
    }
    out, attention = probe_heads.attention_pool(params, jnp.asarray(z["x"]), bf16=False)
    classes = z["logits"].shape[1]
    side = z["logits"].shape[2] // z["x"].shape[1]
    pixels = probe_heads.unfold_patches(out, classes, side)
    checks.array("logits", jnp.moveaxis(pixels, -1, 1), z["logits"])
    checks.array("attention", attention, z["attn_weights"])
    return checks.result()


def _losses(name: str, z: Arrays) -> Result:
    checks = Checks(rtol=1e-5)
    logits, targets = jnp.moveaxis(jnp.asarray(z["logits"]), 1, -1), jnp.asarray(z["targets"])
    checks.array("dice_ce", probe_heads.dice_cross_entropy(logits, targets), z["dice_ce"])
    checks.array("ce", probe_heads.cross_entropy(logits, targets), z["ce"])
    margin = probe_heads.multilabel_soft_margin(
        *(jnp.asarray(z[k]) for k in ("ml_logits", "ml_targets"))
    )
    checks.array("ml_soft_margin", margin, z["ml_soft_margin"])
    return checks.result()


def _lr(name: str, z: Arrays) -> Result:
    checks = Checks(rtol=1e-6, atol=1e-15)
    for key, (epochs, batches, lr) in {
        "a": (50, 4, 0.1), "b": (9, 3, 0.01), "c": (20, 5, 1e-4),
    }.items():  # fmt: skip
        position = np.arange(epochs * batches) / batches
        checks.array(key, linear_probe.learning_rate(lr, epochs, position), z[key])
    return checks.result()


def _heads(name: str, z: Arrays) -> Result:
    checks = Checks(atol=1e-4)
    pixels = probe_heads.unfold_patches(jnp.asarray(z["patch_logits"]), 4, 4)
    checks.array("pixel_logits", jnp.moveaxis(pixels, -1, 1), z["pixel_logits"])
    resized = probe_heads.resize_bilinear(pixels, 10, 10)
    checks.array("resized", jnp.moveaxis(resized, -1, 1), z["pixel_logits_resized"])
    value = probe_heads.resize_bilinear(jnp.asarray(z["reg_patch"]), 12, 12)[..., 0]
    checks.array("reg_pixel", value, z["reg_pixel"])
    params = {
        f"conv{i}": {
            "kernel": z[f"unet.decoder.{n}.weight"].transpose(2, 3, 1, 0),
            "bias": z[f"unet.decoder.{n}.bias"],
        }
        for i, n in enumerate((0, 3, 6, 8))
    }
    head = probe_heads.make_head("unet", "segmentation", 3, z["unet_x"].shape[-1], 4)
    out = probe_heads.forward(head, params, {}, jnp.asarray(z["unet_x"]))[0]
    out = probe_heads.at_labels(head, out, (12, 12))
    checks.array("unet_out", jnp.moveaxis(out, -1, 1), z["unet_out"])
    return checks.result()


def _ft_schedule(name: str, z: Arrays) -> Result:
    checks = Checks(rtol=1e-9)
    for key in "abc":
        meta = json.loads(str(z[f"meta_{key}"]))
        schedule = finetune.Schedule(meta["lr"], meta["epochs"], meta["mode"] == "max")
        lrs, frozen = [], []
        for epoch, value in enumerate(z[f"val_metric_{key}"]):
            lr, still = schedule.start_epoch(epoch)
            lrs.append(lr)
            frozen.append(still)
            schedule.finish_epoch(float(value))
        checks.array(f"lr_{key}", lrs, z[f"lr_{key}"])
        checks.array(f"frozen_{key}", frozen, z[f"frozen_{key}"], 0, 0)
    return checks.result()


def _pooling(name: str, z: Arrays) -> Result:
    checks, names = Checks(atol=1e-5), {"s2": "sentinel2_l2a", "s1": "sentinel1"}
    for part in ("partial", "full"):
        tokens = {n: z[f"{part}_{m}"] for m, n in names.items()}
        masks = {n: z[f"{part}_{m}_mask"] for m, n in names.items()}
        for kind in ("mean", "max"):
            got = pooling.pool_instance(tokens, masks, kind)
            checks.array(f"{part} instance {kind}", got, z[f"{part}_instance_{kind}"])
            got = pooling.pool_spatial(tokens, masks, kind)
            checks.array(f"{part} spatial {kind}", got, z[f"{part}_spatial_{kind}"])
        if part == "full":
            checks.array("concat", pooling.pool_spatial_concat(tokens, masks), z["full_concat"])
            spatial = pooling.pool_spatial(tokens, masks, "mean")
            checks.array("centre", pooling.centre_token(spatial), z["full_center_token"])
    return checks.result()


_KEY_CASES = {
    "cls": ("m-eurosat", 0.7, "accuracy", "accuracy", {"accuracy": 0.7}),
    "seg": ("wildfire", 0.2, "class_f1", "f1_class_1", {"f1_class_1": 0.2}),
}


def _log_keys(name: str, z: Arrays) -> Result:
    checks = Checks()
    for kind, (task, value, primary, key, extra) in _KEY_CASES.items():
        for split in ("eval", "test"):
            want = _json(z, f"{kind}_{split}_json")
            others = {k.split("/")[-1]: v for k, v in want.items() if k.startswith("eval_other")}
            result = scoring.EvalResult(value, primary, key, {**others, **extra})
            checks.equal(f"{kind} {split}", runner.log_keys(task, result, split == "test"), want)
    return checks.result()


def encoder_of(z: Arrays) -> EncoderModel:
    """The recorded tiny encoder."""
    encoder = schema.convert(model_config.EncoderConfig, _json(z, "encoder_json"))
    config = model_config.ModelConfig(kind="mae", encoder_config=encoder, decoder_config=None)
    weights = {
        "encoder." + k.removeprefix("param/"): v for k, v in z.items() if k.startswith("param/")
    }
    entries = [e for e in torch_keys.model_entries(config) if e.path[0] == "encoder"]
    return EncoderModel(config, torch_keys.read_entries(entries, weights), jnp.float32)


_POOLS = {
    "cls_mean_p4": (Pooling("mean"), 4),
    "cls_max_p4": (Pooling("max"), 4),
    "seg_mean_p4": (Pooling("mean", "spatial"), 4),
    "seg_mean_p8": (Pooling("mean", "spatial"), 8),
    "cls_center_p4": (Pooling("mean", "centre"), 4),
}


def _end_to_end(name: str, z: Arrays) -> Result:
    checks = Checks()
    exact = encoder_of(z)
    rounded = EncoderModel(exact.config, {"encoder": exact.params}, jnp.bfloat16)
    for part in ("full", "ragged"):
        batch: EvalSample = {k.split("/")[1]: v for k, v in z.items() if k.startswith(part + "/")}
        batch = {k: v for k, v in batch.items() if not k.startswith("out_")}
        batch |= {k: v.astype(np.int8) for k, v in batch.items() if k.endswith(MASK)}
        # In the ragged batch the reference lets the shorter sample attend to its own padding (a
        # documented difference), so only the longer one can be compared there.
        rows = slice(None) if part == "full" else slice(0, 1)
        for key, (pool, patch_size) in _POOLS.items():
            for model, precision, atol in ((exact, "fp32", 2e-4), (rounded, "bf16", 3e-2)):
                want = z.get(f"{part}/out_{key}_{precision}")
                if want is not None:
                    got = model.embed(batch, patch_size, pool)
                    checks.array(f"{part} {key} {precision}", got[rows], want[rows], 0, atol)
    return checks.result("fp32 2e-4, bf16 3e-2")


CHECKS: dict[str, Callable[[str, Arrays], Result]] = {
    "knn_": _knn,
    "metrics_seg_": _segmentation,
    "metrics_cls_": _classification,
    "metrics_multilabel_": _classification,
    "metrics_regression_": _regression,
    "diagnostics_": _diagnostics,
    "transform_int8": _int8,
    "transform_percentile": _percentile,
    "transform_pca": _pca,
    "normalize_": _normalize,
    "probe_attnpool": _attention,
    "probe_lr_schedule": _lr,
    "probe_": _probe,
    "loss_functions": _losses,
    "finetune_heads": _heads,
    "finetune_schedule": _ft_schedule,
    "pooling": _pooling,
    "metric_log_keys": _log_keys,
    "embedding_end_to_end": _end_to_end,
}
"""Which check runs a case, by the beginning of its name; the first match counts."""

_PLAIN = frozenset(CHECKS.values())
