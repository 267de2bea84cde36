"""Pretraining, evaluation and use of OlmoEarth models in JAX."""

__version__ = "0.1.0"
