"""Downstream evaluation: embeddings, kNN, probes, fine-tuning, diagnostics (spec/evals.md)."""

from olmoearth_jax.exports import exported

__getattr__, __dir__ = exported(
    __name__,
    {
        "callback": "DownstreamEvaluator build_evaluator",
        "datasets": "DataUnavailable Reader open_split",
        "embeddings": "Extraction PCA extract fit_pca",
        "finetune": "FineTuner",
        "knn": "knn_scores neighbours run_knn",
        "balanced_trials": "run_trials",
        "linear_probe": "train_probe",
        "models": "EmbeddingModel EncoderModel Precomputed RawBands baseline load_checkpoint",
        "runner": "Hooks TaskResult run_task",
        "samples": "EvalSample collate make_sample",
        "scoring": "EvalResult score",
    },
)
