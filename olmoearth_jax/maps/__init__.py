"""Embedding archives of regions, and maps from labels."""
