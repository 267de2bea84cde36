"""Downstream evaluation: embeddings, kNN, probes, fine-tuning, diagnostics (spec/evals.md)."""
